"""Carries out `effects.VerifyReleased`: sees that the device has the room that the next model needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from modelswap.core import events
from modelswap.devices.base import Device
from modelswap.devices.errors import NotReleased
from modelswap.devices.release import verified_release
from modelswap.engines.base import Engine
from modelswap.orchestrator import sleepers
from modelswap.orchestrator.hosting import Hosted, Outside
from modelswap.spec.config import Device as DeviceConfig
from modelswap.spec.config import Model

WATCH_TERM: Final = 5.0
"""How long one look goes on after `ReleaseFailed`, in seconds; the next is for what the config says by then."""
WATCH_PAUSE: Final = 1.0
USUAL_SHARE: Final = 0.95
"""Of what was free last time must be free again, where nobody can tell what the next model needs."""
PATIENCE: Final = 0.2
"""The part of ``release_timeout`` after which sleepers are given up, if what they hold is what is missing."""

_log = structlog.get_logger(__name__)


async def verify_released(
    outside: Outside,
    name: str,
    config: DeviceConfig,
    model: Model | None,
    engine: Engine | None,
    sleeper: Hosted | None = None,
    *,
    current: Callable[[], Model | None] | None = None,
) -> None:
    """Report `Released` when ``model`` fits on the device ``name``.

    Where nobody can tell what it needs, most of what was free when the device was last empty must be free again. If
    what sleepers hold is what is missing, those least worth it are given up. After ``release_timeout``, strict:
    `ReleaseFailed`, and `Released` when it has come back after all; warn: go on. ``sleeper`` is the model's own
    instance, if that is to be woken. ``current`` returns the model as the config has it by now: to ask for less is one
    of the remedies.
    """
    needed: int | None = None
    try:
        needed = await _needed(outside.device, model, engine, sleeper)
        await _first(outside, _usual(outside) if needed is None else needed, config.release_timeout, sleeper)
    except Exception as failed:  # noqa: BLE001 - not released, or not readable, or whatever a driver may raise
        # What is usual is no need: if less is free, somebody else may have come to stay.
        unusual = needed is None and isinstance(failed, NotReleased)
        if config.on_release_timeout == "warn" or unusual:
            _log.warning("memory not released; going on", device=name, reason=str(failed))
            outside.free_when_empty = None
        else:
            _log.error("memory not released", device=name, reason=str(failed))
            outside.post(events.ReleaseFailed(at=outside.clock(), device=name, message=str(failed)))
            await _until_released(outside, (lambda: model) if current is None else current, engine, sleeper)
            _log.info("memory released after all", device=name)
    outside.post(events.Released(at=outside.clock(), device=name))


def _usual(outside: Outside) -> int | None:
    free = outside.free_when_empty
    return None if free is None else max(int(free * USUAL_SHARE) - sleepers.residues(outside), 0)


async def _first(outside: Outside, target: int | None, timeout: float, sleeper: Hosted | None) -> None:
    """Wait for the memory; give up sleepers when it is clear, or likely after a while, that theirs is missing."""
    but = sleeper.instance if sleeper is not None else ""
    if target is None or not sleepers.sleepers(outside, but=but):
        await _verify(outside, target, timeout)
        return
    reading = await outside.device.read()
    if reading is not None:
        _make_room(outside, target - (reading.total - sleepers.residues(outside)), but)
    try:
        await _verify(outside, target, timeout * PATIENCE)
    except NotReleased as late:
        if late.reading is not None:
            _make_room(outside, target - late.reading.free, but)
        await _verify(outside, target, timeout * (1 - PATIENCE))


def _make_room(outside: Outside, missing: int, but: str) -> None:
    victims = outside.ranking.victims(sleepers.sleepers(outside, but=but), need_device=missing)
    sleepers.give_up(outside, victims, "its device memory is needed")


async def _until_released(
    outside: Outside, current: Callable[[], Model | None], engine: Engine | None, sleeper: Hosted | None
) -> None:
    while True:
        try:
            await _verify(outside, await _needed(outside.device, current(), engine, sleeper), WATCH_TERM)
        except Exception:  # noqa: BLE001 - as above
            await asyncio.sleep(WATCH_PAUSE)
        else:
            return


async def _verify(outside: Outside, target: int | None, timeout: float) -> None:
    reading = await verified_release(outside.device, target, timeout, ours=outside.runtime.owns)
    if reading is not None:
        outside.free_when_empty = reading.free + sleepers.residues(outside)


async def _needed(device: Device, model: Model | None, engine: Engine | None, sleeper: Hosted | None) -> int | None:
    """Return the bytes that must be free, None where nobody can tell."""
    reading = await device.read()
    if model is None or reading is None:
        return None
    held = sleeper.residue if sleeper is not None else 0
    if sleeper is not None and sleeper.held is not None:
        return max(sleeper.held - held, 0)
    if model.memory is not None:
        # One that can never fit is refused when it is started, and must not hold up the others for ever.
        return max(int(model.memory) - held, 0) if model.memory <= reading.total else None
    needed = engine.device_bytes(model, reading.total) if engine is not None else None
    return None if needed is None else max(needed - held, 0)
