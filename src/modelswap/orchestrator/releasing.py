"""Carries out `effects.VerifyReleased`: sees that the device has the room that the next model needs."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from modelswap.core import events
from modelswap.devices.base import Device
from modelswap.devices.release import verified_release
from modelswap.engines.base import Engine
from modelswap.orchestrator.hosting import Outside
from modelswap.spec.config import Device as DeviceConfig
from modelswap.spec.config import Model

WATCH_TERM: Final = 30.0
"""How long one look goes on after `ReleaseFailed`, in seconds; then comes the next."""
WATCH_PAUSE: Final = 1.0

_log = structlog.get_logger(__name__)


async def verify_released(
    outside: Outside, name: str, config: DeviceConfig, model: Model | None, engine: Engine | None
) -> None:
    """Report `Released` when ``model`` fits on the device ``name`` (None: when its memory has stopped coming back).

    After ``release_timeout``, strict: `ReleaseFailed`, and `Released` when it has come back after all; warn: go on.
    """
    try:
        await _verify(outside.device, model, engine, config.release_timeout)
    except Exception as failed:  # noqa: BLE001 - not released, or not readable, or whatever a driver may raise
        if config.on_release_timeout == "warn":
            _log.warning("memory not released; going on", device=name, reason=str(failed))
        else:
            _log.error("memory not released", device=name, reason=str(failed))
            outside.post(events.ReleaseFailed(at=outside.clock(), device=name, message=str(failed)))
            await _until_released(outside.device, model, engine)
            _log.info("memory released after all", device=name)
    outside.post(events.Released(at=outside.clock(), device=name))


async def _until_released(device: Device, model: Model | None, engine: Engine | None) -> None:
    while True:
        try:
            await _verify(device, model, engine, WATCH_TERM)
        except Exception:  # noqa: BLE001 - as above
            await asyncio.sleep(WATCH_PAUSE)
        else:
            return


async def _verify(device: Device, model: Model | None, engine: Engine | None, timeout: float) -> None:
    await verified_release(device, await _target(device, model, engine), timeout)


async def _target(device: Device, model: Model | None, engine: Engine | None) -> int | None:
    """Return the bytes that must be free, None where nobody can tell."""
    reading = await device.read()
    if model is None or reading is None:
        return None
    if model.memory is not None:
        # One that can never fit is refused when it is started, and must not hold up the others for ever.
        return int(model.memory) if model.memory <= reading.total else None
    return engine.device_bytes(model, reading.total) if engine is not None else None
