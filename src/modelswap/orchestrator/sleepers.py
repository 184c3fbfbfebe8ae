"""What sleepers cost, and which of them are given up for it.

The host memory of a sleeper is reserved before it sleeps for the first time, and counts until its process ends: what
was pinned for it is kept while it is awake.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import structlog

from modelswap.core import events
from modelswap.engines.programs import local
from modelswap.orchestrator import hostmemory
from modelswap.orchestrator.budget import Sleeper
from modelswap.orchestrator.hosting import Hosted, Outside, pause
from modelswap.orchestrator.measurements import COLD, STANDBY, sleeping, waking
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import Running
from modelswap.spec.config import Model

LOOK_EVERY: Final = 1.0
RESERVE_LIMIT: Final = 15.0
"""How long the end of other sleepers may be waited for before one is put to sleep in their place, in seconds."""
PINNED: Final = 1.5
"""Host memory that a sleeper's weights take, in times their size: blocks are rounded up to powers of two."""
SLACK: Final = 1.1
"""What was measured may come to so much more the next time."""
CLEARLY: Final = 1.1
"""A sleeper is given up only for one that is worth so many times as much; else they would take turns for nothing."""
USUAL_PROCESS: Final = 2 << 30
"""Host memory that an engine's processes take besides weights, where they can't be looked at."""
USUAL_RESIDUE: Final = 3 << 29
"""Device memory that a sleeper keeps (context, graphs) until it is measured: 1.5 GiB."""

_WEIGHTS: Final = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_log = structlog.get_logger(__name__)


def sleepers(outside: Outside, *, but: str = "") -> list[Sleeper]:
    """Return what sleeps and could be given up: not what falls asleep, wakes or is being stopped. ``but``: nor this."""
    return [
        _sleeper(one)
        for one in outside.hosted.values()
        if one.asleep and one.instance != but and not (one.given_up or one.leaving or _busy(one))
    ]


def residues(outside: Outside, *, but: str = "") -> int:
    """Return the device bytes that sleepers hold, those on their way out included; ``but``: not this one."""
    return sum(one.residue for one in outside.hosted.values() if one.asleep and one.instance != but)


def spent(outside: Outside, *, but: str = "") -> int:
    """Return the host bytes that count against the budget: sleepers', and standbys'."""
    own = sum(one.host_bytes for one in outside.hosted.values() if one.instance != but)
    return own + outside.memory.standbys()


def spare(outside: Outside) -> int:
    """Return the host bytes that may still be spent on being quick; negative if too many are."""
    memory = outside.memory
    return hostmemory.spare(memory.budget(), spent(outside), memory.available(), memory.total)


def room(outside: Outside, hosted: Hosted, size: int, current: int) -> int:
    """Return the host bytes that are left over if an instance sleeps with ``size`` of them; negative: that many miss.

    ``current`` is what its processes take already.
    """
    memory = outside.memory
    budget = memory.budget()
    free = memory.available() - max(0, size - current)
    return hostmemory.spare(budget, spent(outside, but=hosted.instance) + size, free, memory.total)


def lesser(outside: Outside, model: str, *, but: str = "") -> list[Sleeper]:
    """Return the sleepers that are clearly worth less than ``model``, for which they may be given up."""
    own = outside.ranking.credit(model)
    return [one for one in sleepers(outside, but=but) if outside.ranking.credit(one.model) * CLEARLY <= own]


async def expected_host(outside: Outside, hosted: Hosted, level: int) -> tuple[int, int]:
    """Return the host bytes that an instance is expected to take asleep, and what it takes now."""
    if level in hosted.levels and hosted.host_bytes:
        return hosted.host_bytes, hosted.host_bytes
    current = await process_bytes(outside, hosted.running)
    known = outside.measurements.of(hosted.model, hosted.definition, sleeping(level)).host
    if known is not None:
        return max(int(known * SLACK), hosted.host_bytes), current
    weights = 0
    if level == 1:
        known_weights = outside.weights.get(hosted.definition)
        weights = int(PINNED * (await _held(outside, hosted) if known_weights is None else known_weights))
    return max((current or USUAL_PROCESS) + weights, hosted.host_bytes), current


async def reserve(outside: Outside, hosted: Hosted, size: int, current: int, *, sparing: str = "") -> bool:
    """Have ``size`` bytes of host memory count for an instance; sleepers that are worth less go for it.

    ``sparing`` is the model that comes in instead, whose sleeper is about to be woken. Returns whether there is room,
    at the latest after `RESERVE_LIMIT`; until then, nothing counts for it that didn't.
    """
    began = outside.clock()
    while (missing := -room(outside, hosted, size, current)) > 0:
        leaving = sum(one.host_bytes for one in outside.hosted.values() if one.given_up)
        if leaving < missing:
            candidates = [one for one in lesser(outside, hosted.model, but=hosted.instance) if one.model != sparing]
            victims = outside.ranking.victims(candidates, need_host=missing - leaving)
            if not victims:
                return False
            give_up(outside, victims, f"its host memory is needed for {hosted.model}")
        if outside.clock() - began > RESERVE_LIMIT:
            return False
        await asyncio.sleep(pause(outside.clock() - began))
    hosted.host_bytes = size
    return True


def give_up(outside: Outside, victims: Iterable[Sleeper], reason: str) -> None:
    """Have sleepers stopped."""
    for victim in victims:
        hosted = outside.hosted.get(victim.instance)
        if hosted is None or hosted.given_up:
            continue
        hosted.given_up = True
        outside.ranking.dropped(victim.model)
        _log.info("sleeper given up", model=victim.model, instance=victim.instance, reason=reason)
        outside.post(events.DropSleeper(at=outside.clock(), instance=victim.instance, reason=reason))


def keep_within(outside: Outside, fresh: Hosted | None = None) -> bool:
    """Give up sleepers, the least worth first, if more host memory is spent than may be.

    ``fresh`` is one that has just been measured in its first sleep. Returns whether it may stay; if it is among those
    that must go, nobody else goes.
    """
    leaving = sum(one.host_bytes for one in outside.hosted.values() if one.given_up)
    short = -spare(outside) - leaving
    if short <= 0:
        return True
    candidates = sleepers(outside)
    if fresh is not None:
        candidates.append(_sleeper(fresh))
    victims = outside.ranking.victims(candidates, need_host=short, partly=True)
    if fresh is not None and any(victim.instance == fresh.instance for victim in victims):
        return False
    give_up(outside, victims, "host memory is short")
    return True


def used(outside: Outside, hosted: Hosted) -> None:
    """Note that a model was asked for, for the ranking."""
    known = outside.measurements
    level = hosted.asleep or 1
    starts = (known.seconds(hosted.model, hosted.definition, way) for way in (COLD, STANDBY))
    start = min((seconds for seconds in starts if seconds is not None), default=0.0)
    awake = known.of(hosted.model, hosted.definition, waking(level))
    saved = start - (awake.steady if awake.steady is not None else awake.first or 0.0)
    size = known.of(hosted.model, hosted.definition, sleeping(level)).host or hosted.host_bytes or USUAL_PROCESS
    outside.ranking.used(hosted.model, saved, size)


async def process_bytes(outside: Outside, running: Running | None) -> int:
    """Return the host memory that an instance takes now; 0 if it can't be told."""
    try:
        return 0 if running is None else await outside.runtime.host_bytes(running)
    except ModelswapError:  # its runtime is away for now
        return 0


def weights_on_disk(spec: Model) -> int | None:
    """Return the size of a model's weights if they lie in a file or folder that it names; None if they don't.

    Blocks for the reading of a folder.
    """
    named = local(spec.model or "", spec)
    if named is None:
        return None
    path = (spec.cwd or Path()) / named
    try:
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in _WEIGHTS]
        return sum(file.stat().st_size for file in files) or None
    except OSError:
        return None


def _sleeper(hosted: Hosted) -> Sleeper:
    return Sleeper(instance=hosted.instance, model=hosted.model, host=hosted.host_bytes, residue=hosted.residue)


async def _held(outside: Outside, hosted: Hosted) -> int:
    """Return the device bytes that an instance was given, the most that its weights can be.

    Of one that an earlier orchestrator has started that isn't known; nothing but sleepers is beside it on the device.
    """
    if hosted.spec.memory is not None:
        return int(hosted.spec.memory)
    if hosted.held is not None:
        return hosted.held
    reading = await outside.device.read()
    return 0 if reading is None else max(reading.total - reading.free - residues(outside, but=hosted.instance), 0)


def _busy(hosted: Hosted) -> bool:
    return hosted.job is not None and not hosted.job.done()
