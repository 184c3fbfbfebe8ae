"""Carries out `effects.Wake`: wake an instance and prove that it answers as before it slept."""

from __future__ import annotations

import asyncio
from typing import Final

import aiohttp
import structlog

from modelswap.core import events
from modelswap.devices.errors import NotReleased
from modelswap.devices.release import verified_release
from modelswap.engines.base import CanaryFailed, CannotSleep, CannotWake, WakeOutOfMemory
from modelswap.orchestrator import sleepers
from modelswap.orchestrator.hooks import HookFailed, run_hooks
from modelswap.orchestrator.hosting import Hosted, Outside, told
from modelswap.orchestrator.measurements import waking
from modelswap.orchestrator.proving import WrongAnswer, prove_awake
from modelswap.orchestrator.sleeping import limit, or_ended
from modelswap.orchestrator.stopping import stop_surely
from modelswap.orchestrator.tasks import cancel
from modelswap.protocol.errors import ModelswapError

SETTLE_LIMIT: Final = 2.0

_log = structlog.get_logger(__name__)


async def wake(outside: Outside, hosted: Hosted, level: int, release_timeout: float) -> None:
    """Wake an instance that sleeps at ``level``; reports `BroughtIn`, or `WakeFailed` when nothing of it runs any more.

    Short of device memory, it waits for that for ``release_timeout`` seconds and tries once more. When cancelled,
    nothing is reported: whoever cancels stops it.
    """
    began = outside.clock()
    try:
        await cancel(hosted.watch)
        hosted.given_up = False
        sleepers.used(outside, hosted)
        await run_hooks(outside, hosted, "before_load")
        _stage(outside, hosted, "waking")
        await _wake(outside, hosted, level, release_timeout)
        _stage(outside, hosted, "canary")
        await _prove(outside, hosted, level)
        await run_hooks(outside, hosted, "after_load")
    except WrongAnswer as wrong:
        reason = f"its answers are wrong after sleep level {level}, which is off for it until calibrated: {wrong}"
        outside.measurements.wrong(hosted.model, hosted.definition, level, reason)
        await _fail(outside, hosted, reason)
    except HookFailed as failed:
        await _fail(outside, hosted, str(failed))
    except WakeOutOfMemory as short:
        await _fail(outside, hosted, f"there is too little device memory to wake it: {short}")
    except (CannotSleep, CannotWake, CanaryFailed, ModelswapError, aiohttp.ClientError, TimeoutError) as failed:
        reason = str(failed) or "no answer"
        outside.measurements.failed(hosted.model, hosted.definition, level, reason)
        await _fail(outside, hosted, reason)
    except Exception as bug:  # a mistake in an engine's or our code must not leave the scheduler waiting
        await _fail(outside, hosted, f"internal error: {bug!r}")
        raise
    else:
        _awake(outside, hosted, level, outside.clock() - began)


async def _wake(outside: Outside, hosted: Hosted, level: int, release_timeout: float) -> None:
    try:
        await _once(outside, hosted, level)
    except WakeOutOfMemory as short:
        _log.warning("too little device memory to wake; trying once more", model=hosted.model, reason=str(short))
        await _make_room(outside, hosted, release_timeout, short)
        await _once(outside, hosted, level)


async def _once(outside: Outside, hosted: Hosted, level: int) -> None:
    assert hosted.running is not None  # noqa: S101 - for the type checker: it sleeps
    known = outside.measurements.of(hosted.model, hosted.definition, waking(level))
    began = outside.clock()
    try:
        usual = known.steady if level in hosted.levels else known.first
        size = hosted.held if hosted.held is not None else 1 << 40
        async with asyncio.timeout(limit(usual, size)):
            await or_ended(
                outside, hosted, hosted.engine.wake(outside.http, hosted.spec, hosted.running.address, level)
            )
    except TimeoutError:
        raise CannotWake(f"{hosted.model} did not wake within {outside.clock() - began:.0f} s") from None


async def _make_room(outside: Outside, hosted: Hosted, timeout: float, short: WakeOutOfMemory) -> None:
    """Wait until what it needs is free; other sleepers go if that is what is missing."""
    needed = max(hosted.held - hosted.residue, 0) if hosted.held is not None else None
    reading = await outside.device.read()
    if reading is not None and needed is not None and reading.free < needed:
        others = sleepers.sleepers(outside, but=hosted.instance)
        victims = outside.ranking.victims(others, need_device=needed - reading.free)
        sleepers.give_up(outside, victims, f"its device memory is needed for {hosted.model}")
    try:
        if needed is None:
            await verified_release(outside.device, None, min(timeout, SETTLE_LIMIT))
        else:
            await verified_release(outside.device, needed, timeout, ours=outside.runtime.owns)
    except NotReleased as kept:
        raise WakeOutOfMemory(f"{short}; {kept}") from kept


async def _prove(outside: Outside, hosted: Hosted, level: int) -> None:
    running = hosted.running
    assert running is not None  # noqa: S101 - for the type checker: it has just been woken
    if await hosted.engine.asleep(outside.http, hosted.spec, running.address):
        raise CannotWake(f"{hosted.model} said that it woke from level {level}, but it still sleeps")
    await or_ended(outside, hosted, prove_awake(outside, hosted, running.address))


def _awake(outside: Outside, hosted: Hosted, level: int, seconds: float) -> None:
    assert hosted.running is not None  # noqa: S101 - for the type checker: it answers
    measured = outside.measurements
    measured.took(hosted.model, hosted.definition, waking(level), seconds, first=level not in hosted.levels)
    measured.proved(hosted.model, hosted.definition, level)
    hosted.levels.add(level)
    hosted.asleep = 0
    outside.journal.woke(hosted.instance)
    address = hosted.running.address
    outside.post(
        events.BroughtIn(
            at=outside.clock(),
            instance=hosted.instance,
            host=address.host,
            port=address.port,
            slots=hosted.slots,
            mechanism="wake",
        )
    )


async def _fail(outside: Outside, hosted: Hosted, reason: str) -> None:
    """Stop what is left of the instance, then report why it failed."""
    _log.warning("can't be woken; it is started anew", model=hosted.model, instance=hosted.instance, reason=reason)
    if hosted.running is not None:
        await stop_surely(outside, hosted, hosted.running, 0.0)
    message = told(f"{hosted.model} could not be woken: {reason}", await outside.last_lines(hosted))
    outside.hosted.pop(hosted.instance, None)
    outside.post(events.WakeFailed(at=outside.clock(), instance=hosted.instance, message=message))


def _stage(outside: Outside, hosted: Hosted, stage: str) -> None:
    outside.post(events.BringInStage(at=outside.clock(), instance=hosted.instance, stage=stage))
