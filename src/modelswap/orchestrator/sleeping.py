"""Carries out `effects.Sleep`: make a drained instance give the device up, and see that it has."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, NamedTuple, TypeVar

import aiohttp
import structlog

from modelswap.core import events
from modelswap.devices.base import Reading
from modelswap.devices.errors import NotReleased
from modelswap.devices.release import verified_release
from modelswap.engines.base import CannotSleep
from modelswap.orchestrator import sleepers
from modelswap.orchestrator.hooks import run_hooks
from modelswap.orchestrator.hosting import Hosted, Outside, pause
from modelswap.orchestrator.measurements import sleeping
from modelswap.orchestrator.tasks import cancel
from modelswap.protocol.errors import ModelswapError

RUNNING_LIMIT: Final = 5.0
"""How long the engine's own count of running requests may hold up its sleep, in seconds."""
SLEEP_LIMIT: Final = 300.0
"""How long an engine may take to fall asleep or wake at most, in seconds."""
FIRST_LIMIT: Final = 20.0
FIRST_PACE: Final = 1 << 28
"""Where the usual time isn't known: `FIRST_LIMIT`, and a second for so many bytes.

A first sleep pins host memory, which was seen to go at three times that pace (28 GB in 36 s).
"""
LEAST_LIMIT: Final = 10.0
PATIENCE: Final = 10.0
"""Past so many times its usual time, an engine is thought to hang."""
SETTLE_LIMIT: Final = 2.0
GIB: Final = 1 << 30
_REMEDY: Final = "raise device.host_memory, or have more memory free"
_LEAST_SLACK: Final = 1 << 28
_LIKELY_RESIDUE: Final = 2 << 30

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


async def fall_asleep(
    outside: Outside, hosted: Hosted, level: int, release_timeout: float, *, target: str = ""
) -> None:
    """Have an instance sleep at ``level``; reports `Slept` once its device memory is free, else `SleepFailed`.

    ``release_timeout`` is how long the memory may take to appear as free after the engine said that it sleeps.
    ``target`` is the model that comes in instead. When cancelled nothing is reported: whoever cancels stops it.
    """
    try:
        await cancel(hosted.watch)
        hosted.asleep = level
        await outside.journal.lay_down(hosted.instance, level)
        await _quiet(outside, hosted)
        await run_hooks(outside, hosted, "before_unload")
        before = await _reserve(outside, hosted, level, target)
        await _sleep(outside, hosted, level, release_timeout, before)
        if not sleepers.keep_within(outside, hosted):
            raise NoRoom(f"{hosted.model} takes {hosted.host_bytes / GIB:.1f} GiB of host memory; {_REMEDY}")
        await run_hooks(outside, hosted, "after_unload")
    except (CannotSleep, ModelswapError, aiohttp.ClientError, TimeoutError) as failed:
        reason = str(failed) or "no answer"
        note = outside.measurements.noted if isinstance(failed, NotNow) else outside.measurements.failed
        note(hosted.model, hosted.definition, level, reason)
        _fail(outside, hosted, reason)
    except asyncio.CancelledError:
        hosted.asleep = 0  # whoever cancels it ends an engine that served until now
        raise
    except Exception as bug:  # a mistake in an engine's or our code must not leave the scheduler waiting
        _fail(outside, hosted, f"internal error: {bug!r}")
        raise
    else:
        _log.info("asleep", model=hosted.model, level=level, residue=hosted.residue, host_bytes=hosted.host_bytes)
        outside.post(events.Slept(at=outside.clock(), instance=hosted.instance))


class NotNow(CannotSleep):
    """It can't sleep for a reason that says nothing about the engine's sleep, such as requests that still run."""


class NoRoom(NotNow):
    """There is no host memory for it."""


class _Before(NamedTuple):
    """Bytes of host memory before a sleep: what its processes took, what counted for it, what was free."""

    current: int
    kept: int
    free: int


async def or_ended(outside: Outside, hosted: Hosted, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of ``work``; raises `CannotSleep` if the instance ends before."""
    running = hosted.running
    assert running is not None  # noqa: S101 - for the type checker: it was awake, or sleeps
    ended = asyncio.ensure_future(outside.ended(running))
    doing = asyncio.ensure_future(work)
    try:
        await asyncio.wait({ended, doing}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise CannotSleep(f"its engine {ended.result()}")
        return doing.result()
    finally:
        for task in (ended, doing):
            task.cancel()
        await asyncio.gather(ended, doing, return_exceptions=True)


def limit(usual: float | None, size: int) -> float:
    """Return how long moving ``size`` bytes may take before it is thought to hang, in seconds."""
    if usual is None:
        return min(FIRST_LIMIT + size / FIRST_PACE, SLEEP_LIMIT)
    return min(max(usual * PATIENCE, LEAST_LIMIT), SLEEP_LIMIT)


async def _quiet(outside: Outside, hosted: Hosted) -> None:
    """Wait until the engine itself counts nothing running: some engines break if they are put to sleep busy."""
    assert hosted.running is not None  # noqa: S101 - for the type checker: it is awake
    began = outside.clock()
    try:
        async with asyncio.timeout(RUNNING_LIMIT):
            while True:
                if not await hosted.engine.running(outside.http, hosted.spec, hosted.running.address):
                    return
                await asyncio.sleep(pause(outside.clock() - began))
    except TimeoutError:
        raise NotNow(f"{hosted.model} is still busy {RUNNING_LIMIT:g} s after it was drained") from None


async def _reserve(outside: Outside, hosted: Hosted, level: int, target: str) -> _Before:
    kept = hosted.host_bytes
    size, current = await sleepers.expected_host(outside, hosted, level)
    if not await sleepers.reserve(outside, hosted, size, current, sparing=target):
        raise NoRoom(f"{hosted.model} would take {size / GIB:.1f} GiB of host memory asleep; {_REMEDY}")
    return _Before(current, kept, outside.memory.available())


async def _sleep(outside: Outside, hosted: Hosted, level: int, release_timeout: float, host: _Before) -> None:
    assert hosted.running is not None  # noqa: S101 - for the type checker: it is awake
    known = outside.measurements.of(hosted.model, hosted.definition, sleeping(level))
    before = await outside.device.read()
    if before is None:
        raise CannotSleep("the device's memory can't be read, so that nobody could see it come back")
    began = outside.clock()
    try:
        usual = known.steady if level in hosted.levels else known.first
        async with asyncio.timeout(limit(usual, before.total - before.free)):
            work = hosted.engine.sleep(outside.http, hosted.spec, hosted.running.address, level)
            await or_ended(outside, hosted, work)
    except TimeoutError:
        raise CannotSleep(f"{hosted.model} did not fall asleep within {outside.clock() - began:.0f} s") from None
    after = await or_ended(outside, hosted, _released(outside, hosted, before, known.residue, release_timeout))
    seconds = outside.clock() - began
    freed = after.free - before.free
    if hosted.held is None:
        hosted.held = freed + (known.residue or 0)
    hosted.residue = max(hosted.held - freed, 0)
    taken = await _host_bytes(outside, hosted, level, host)
    hosted.host_bytes = max(taken, host.kept)
    measured = outside.measurements
    measured.took(hosted.model, hosted.definition, sleeping(level), seconds, first=level not in hosted.levels)
    measured.slept(hosted.model, hosted.definition, level, residue=hosted.residue, host=taken)


async def _released(outside: Outside, hosted: Hosted, before: Reading, residue: int | None, timeout: float) -> Reading:
    """Return a reading of the device when the instance has given back all but its residue; raises `NotReleased`."""
    held = hosted.held
    growth = max(before.total // 50, 1) if held is None else held - _allowed(residue, held)
    wanted = before.free + growth
    try:
        after = await verified_release(outside.device, min(wanted, before.total), timeout, ours=outside.runtime.owns)
        if residue is None or held is None:  # what it gives back is measured now: wait until that is all
            after = await verified_release(outside.device, None, min(timeout, SETTLE_LIMIT)) or after
    except NotReleased as kept:
        raise CannotSleep(f"{hosted.model} said that it sleeps, but {kept}") from kept
    if after is None:
        raise CannotSleep("the device's memory can't be read any more")
    return after


def _allowed(residue: int | None, held: int) -> int:
    """Return what may be left of ``held`` bytes: what was left before and a little more, or what engines do leave."""
    if residue is not None:
        return min(residue + max(residue // 4, _LEAST_SLACK), held * 9 // 10)
    return min(max(held // 4, _LIKELY_RESIDUE), held * 6 // 10)


async def _host_bytes(outside: Outside, hosted: Hosted, level: int, before: _Before) -> int:
    """Return the host memory that a sleeper takes.

    What a driver pins for a process isn't always counted as its own; then only the host's free memory tells. Others
    may have freed some at the same time, but at level 1 its weights are there.
    """
    if level in hosted.levels:
        return hosted.host_bytes  # it keeps what it has pinned, and looking takes time
    own = await sleepers.process_bytes(outside, hosted.running)
    if outside.device.kind in ("nvml", "amdgpu"):
        least = outside.weights.get(hosted.definition, 0) if level == 1 else 0
        pinned = max(before.free - outside.memory.available(), least)
        return max(own, min((before.current or sleepers.USUAL_PROCESS) + pinned, hosted.host_bytes))
    return own or hosted.host_bytes


def _fail(outside: Outside, hosted: Hosted, reason: str) -> None:
    hosted.asleep = 0  # as far as its hooks are concerned; the journal knows better
    _log.warning("can't sleep; it is stopped", model=hosted.model, instance=hosted.instance, reason=reason)
    outside.post(events.SleepFailed(at=outside.clock(), instance=hosted.instance, message=reason))
