"""Carries out `effects.Watch` and `effects.Probe`: sees whether a ready instance is alive and well."""

from __future__ import annotations

import asyncio
from typing import Final

import aiohttp
import structlog

from modelswap.core import events
from modelswap.orchestrator.endings import death
from modelswap.orchestrator.hosting import Hosted, Outside, told
from modelswap.runtimes.base import Running

MISSES: Final = 3
PROBE_LIMIT: Final = 5.0
_LEAST_HEALTH_LIMIT: Final = 5.0

_log = structlog.get_logger(__name__)


async def watch(outside: Outside, hosted: Hosted, *, asleep: bool = False) -> None:
    """Report `events.Died` when the instance ends, or misses three health checks in a row.

    One that is ``asleep`` isn't asked: some engines answer that they are well then, others run a request for it.
    """
    running = hosted.running
    assert running is not None  # noqa: S101 - for the type checker: only what runs is watched
    ended = asyncio.ensure_future(outside.ended(running))
    checks = asyncio.ensure_future(_checks(outside, hosted, running, asleep=asleep))
    try:
        await asyncio.wait({ended, checks}, return_when=asyncio.FIRST_COMPLETED)
        reason = death(hosted, ended.result()) if ended.done() else checks.result()
    finally:
        for task in (ended, checks):
            task.cancel()
        await asyncio.gather(ended, checks, return_exceptions=True)
    if not hosted.leaving:
        message = told(reason, await outside.last_lines(hosted))
        outside.post(events.Died(at=outside.clock(), instance=hosted.instance, message=message))


async def _checks(outside: Outside, hosted: Hosted, running: Running, *, asleep: bool) -> str:
    """Ask for its health until it hangs; returns that in words."""
    misses = 0
    while misses < MISSES:
        interval = hosted.spec.health_interval
        if interval <= 0 or asleep:
            # Looked at again now and then: the config may be loaded anew.
            await asyncio.sleep(60.0)
            continue
        await asyncio.sleep(interval)
        limit = max(interval, _LEAST_HEALTH_LIMIT)
        healthy = await _healthy(outside, hosted, running, limit)
        misses = 0 if healthy else misses + 1
    return f"{hosted.model} hangs: it missed {MISSES} health checks in a row"


async def _healthy(outside: Outside, hosted: Hosted, running: Running, limit: float) -> bool:
    try:
        async with asyncio.timeout(limit):
            return await hosted.engine.healthy(outside.http, hosted.spec, running.address)
    except (aiohttp.ClientError, TimeoutError):
        return False
    except Exception as error:  # noqa: BLE001 - a mistake in an engine's code must not leave the instance unwatched
        _log.error("health check failed", model=hosted.model, instance=hosted.instance, exc_info=error)
        return False


async def probe(outside: Outside, instance: str) -> None:
    """Look at once whether an instance is alive and healthy; reports `events.Probed`."""
    hosted = outside.hosted.get(instance)
    if hosted is None or hosted.running is None or hosted.leaving:
        outside.post(events.Probed(at=outside.clock(), instance=instance, healthy=False, message="it has gone"))
        return
    problem = await _problem(outside, hosted, hosted.running)
    outside.post(
        events.Probed(at=outside.clock(), instance=instance, healthy=problem is None, message=problem or ""),
    )


async def _problem(outside: Outside, hosted: Hosted, running: Running) -> str | None:
    ended = asyncio.ensure_future(outside.ended(running))
    answer = asyncio.ensure_future(_healthy(outside, hosted, running, PROBE_LIMIT))
    try:
        await asyncio.wait({ended, answer}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            return told(death(hosted, ended.result()), await outside.last_lines(hosted))
        if answer.result():
            return None
        if ended.done() or not await outside.listening(running):
            return f"{hosted.model} does not listen any more"
        return f"{hosted.model} does not answer its health check"
    finally:
        for task in (ended, answer):
            task.cancel()
        await asyncio.gather(ended, answer, return_exceptions=True)
