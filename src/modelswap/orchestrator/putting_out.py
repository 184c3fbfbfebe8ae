"""Carries out `effects.PutOut`: stop an instance and all that belongs to it."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from modelswap.core import events
from modelswap.orchestrator.hooks import run_hooks
from modelswap.orchestrator.hosting import Hosted, Outside, pause
from modelswap.orchestrator.measurements import STOP
from modelswap.orchestrator.stopping import stop_grace, stop_surely
from modelswap.orchestrator.tasks import cancel

RUNNING_LIMIT: Final = 2.0
"""How long an engine's own count of running requests may hold up a stop after all gateways have drained, in seconds."""

_log = structlog.get_logger(__name__)


async def put_out(outside: Outside, instance: str, *, kill: bool) -> None:
    """Stop an instance; reports `events.PutOut`, or `events.PutOutFailed` and then `events.PutOut` after all."""
    hosted = outside.hosted.get(instance)
    if hosted is not None:
        hosted.leaving = True
        await cancel(hosted.job)
        await cancel(hosted.watch)
        if hosted.running is not None:
            served = hosted.ready and not kill and not hosted.asleep
            if served:
                await _quiet(outside, hosted)
                await run_hooks(outside, hosted, "before_unload")
            began = outside.clock()
            await stop_surely(outside, hosted, hosted.running, 0.0 if kill else stop_grace(hosted))
            if served:
                outside.measurements.took(hosted.model, hosted.definition, STOP, outside.clock() - began)
            if hosted.ready and not hosted.asleep:
                await run_hooks(outside, hosted, "after_unload")
        outside.hosted.pop(instance, None)
    outside.post(events.PutOut(at=outside.clock(), instance=instance))


async def _quiet(outside: Outside, hosted: Hosted) -> None:
    """Wait a moment until the engine itself counts nothing running: its last answers may be on their way."""
    assert hosted.running is not None  # noqa: S101 - for the type checker: the caller looked
    began = outside.clock()
    try:
        async with asyncio.timeout(RUNNING_LIMIT):
            while True:
                if not await hosted.engine.running(outside.http, hosted.spec, hosted.running.address):
                    return
                await asyncio.sleep(pause(outside.clock() - began))
    except TimeoutError:
        _log.warning("still busy after draining", model=hosted.model, instance=hosted.instance)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in asking, it must be stopped
        _log.warning("can't be asked what runs", model=hosted.model, instance=hosted.instance, error=repr(error))
