"""Carries out `effects.VerifyReleased`: sees that the device has the room that the next model needs."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from modelswap.core import events
from modelswap.devices.base import Device
from modelswap.devices.errors import NotReleased
from modelswap.devices.release import verified_release
from modelswap.engines.base import Engine
from modelswap.orchestrator.hosting import Outside
from modelswap.spec.config import Device as DeviceConfig
from modelswap.spec.config import Model

WATCH_TERM: Final = 30.0
"""How long one look goes on after `ReleaseFailed`, in seconds; then comes the next."""
WATCH_PAUSE: Final = 1.0
USUAL_SHARE: Final = 0.95
"""Of what was free last time must be free again, where nobody can tell what the next model needs."""

_log = structlog.get_logger(__name__)


async def verify_released(
    outside: Outside, name: str, config: DeviceConfig, model: Model | None, engine: Engine | None
) -> None:
    """Report `Released` when ``model`` fits on the device ``name``.

    Where nobody can tell what it needs, most of what was free when the device was last empty must be free again. After
    ``release_timeout``, strict: `ReleaseFailed`, and `Released` when it has come back after all; warn: go on.
    """
    needed: int | None = None
    try:
        needed = await _needed(outside.device, model, engine)
        await _verify(outside, _usual(outside) if needed is None else needed, config.release_timeout)
    except Exception as failed:  # noqa: BLE001 - not released, or not readable, or whatever a driver may raise
        # What is usual is no need: if less is free, somebody else may have come to stay.
        unusual = needed is None and isinstance(failed, NotReleased)
        if config.on_release_timeout == "warn" or unusual:
            _log.warning("memory not released; going on", device=name, reason=str(failed))
            outside.free_when_empty = None
        else:
            _log.error("memory not released", device=name, reason=str(failed))
            outside.post(events.ReleaseFailed(at=outside.clock(), device=name, message=str(failed)))
            await _until_released(outside, needed)
            _log.info("memory released after all", device=name)
    outside.post(events.Released(at=outside.clock(), device=name))


def _usual(outside: Outside) -> int | None:
    free = outside.free_when_empty
    return None if free is None else int(free * USUAL_SHARE)


async def _until_released(outside: Outside, needed: int | None) -> None:
    while True:
        try:
            await _verify(outside, needed, WATCH_TERM)
        except Exception:  # noqa: BLE001 - as above
            await asyncio.sleep(WATCH_PAUSE)
        else:
            return


async def _verify(outside: Outside, target: int | None, timeout: float) -> None:
    reading = await verified_release(outside.device, target, timeout, ours=outside.runtime.owns)
    if reading is not None:
        outside.free_when_empty = reading.free


async def _needed(device: Device, model: Model | None, engine: Engine | None) -> int | None:
    """Return the bytes that must be free, None where nobody can tell."""
    reading = await device.read()
    if model is None or reading is None:
        return None
    if model.memory is not None:
        # One that can never fit is refused when it is started, and must not hold up the others for ever.
        return int(model.memory) if model.memory <= reading.total else None
    return engine.device_bytes(model, reading.total) if engine is not None else None
