"""Carrying out a sleep, and what is remembered of it, on an engine and a device that do as they are told."""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from modelswap.core import events
from modelswap.devices.base import Reading
from modelswap.orchestrator import sleeping
from modelswap.orchestrator.hosting import Hosted, HostMemory
from modelswap.orchestrator.measurements import sleeping as sleep_at
from modelswap.orchestrator.putting_out import put_out
from tests.orchestrator.fakes import World, until

GIB = 1 << 30
TIMEOUT = 5.0


class Machine:
    """A host and a device; ``pinned`` bytes of host memory go when the engine falls asleep, and the device's come."""

    def __init__(self, world: World, budget: int | None = None, pinned: int = 0) -> None:
        self.world = world
        self.free = 100 * GIB
        self.pinned = pinned
        self.own = GIB
        world.outside.memory = HostMemory(budget=lambda: budget, available=lambda: self.free, total=128 * GIB)
        world.device.reading = Reading(total=80 * GIB, free=20 * GIB)
        world.device.kind = "nvml"
        told = world.engine.sleep

        async def sleep(*arguments: Any) -> None:
            await told(*arguments)
            self.free -= self.pinned
            world.device.reading = Reading(total=80 * GIB, free=78 * GIB)

        world.engine.sleep = sleep  # type: ignore[method-assign, assignment]

    def engine(self, model: str = "a") -> Hosted:
        """Return an engine that has never slept."""
        hosted = self.world.host_running(f"{model}.1.1", model)
        hosted.held = 60 * GIB
        return hosted


@pytest.fixture(autouse=True)
def _processes(world: World) -> None:
    world.runtime.taken = defaultdict(lambda: GIB)


async def fall(world: World, hosted: Hosted, level: int = 1) -> None:
    """Have it fall asleep."""
    await sleeping.fall_asleep(world.outside, hosted, level, TIMEOUT, target="other")


async def test_what_is_pinned_is_seen_by_what_is_free(world: World) -> None:
    """It isn't counted as the process's own; what is reserved is replaced by what was taken."""
    machine = Machine(world, pinned=40 * GIB)
    hosted = machine.engine()
    world.outside.weights["digest"] = 30 * GIB
    await fall(world, hosted)
    assert len(world.of(events.Slept)) == 1 and hosted.host_bytes == 41 * GIB
    assert world.measurements.of("a", "digest", sleep_at(1)).host == 41 * GIB


async def test_memory_that_others_free_meanwhile_does_not_hide_what_is_pinned(world: World) -> None:
    """At level 1 its weights are in host memory, whatever the host's free memory looks like."""
    machine = Machine(world, pinned=-10 * GIB)
    hosted = machine.engine()
    world.outside.weights["digest"] = 30 * GIB
    await fall(world, hosted)
    assert hosted.host_bytes == 31 * GIB


async def test_one_that_takes_more_than_was_reserved_goes_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is the one least worth it; a better one stays, and the level isn't held to have failed."""
    machine = Machine(world, budget=50 * GIB)
    other = world.host_running("b.1.1", "b")
    other.asleep, other.host_bytes = 1, 20 * GIB
    world.outside.ranking.used("b", 100.0, GIB)
    hosted = machine.engine()
    world.measurements.slept("a", "digest", 1, residue=2 * GIB, host=10 * GIB)
    world.runtime.taken["a.1.1"] = 40 * GIB
    await fall(world, hosted)
    (failed,) = world.of(events.SleepFailed)
    assert "40.0 GiB of host memory" in failed.message and "host_memory" in failed.message
    assert not world.of(events.DropSleeper) and not world.of(events.Slept)
    known = world.measurements.of("a", "digest", sleep_at(1))
    assert (known.failures, known.host) == (0, 40 * GIB) and "host_memory" in known.reason


async def test_without_room_it_is_not_put_to_sleep_and_the_reason_is_kept(world: World) -> None:
    """The engine isn't told anything, and the level isn't held to have failed."""
    machine = Machine(world, budget=GIB)
    hosted = machine.engine()
    await fall(world, hosted)
    assert len(world.of(events.SleepFailed)) == 1 and world.engine.slumber == []
    known = world.measurements.of("a", "digest", sleep_at(1))
    assert (known.ok, known.failures) == (None, 0) and "host_memory" in known.reason


async def test_a_deeper_level_after_another_is_a_first_time_again(world: World) -> None:
    """What was pinned at level 1 stays taken, but isn't what level 2 takes."""
    machine = Machine(world)
    hosted = machine.engine()
    hosted.levels, hosted.host_bytes = {1}, 41 * GIB
    await fall(world, hosted, 2)
    assert hosted.host_bytes == 41 * GIB
    known = world.measurements.of("a", "digest", sleep_at(2))
    assert known.host == GIB and known.first is not None and known.steady is None


async def test_what_an_adopted_engine_held_is_learned_to_the_end(world: World) -> None:
    """Memory that comes back bit by bit is waited for, also where its residue is known already."""
    machine = Machine(world)
    hosted = machine.engine()
    hosted.held = None
    world.measurements.slept("a", "digest", 1, residue=2 * GIB, host=GIB)
    world.device.reads = 0
    read = world.device.read

    async def slowly() -> Reading | None:
        found = await read()
        if world.engine.sleeps and found is not None:
            return Reading(total=found.total, free=min(20 + 10 * world.device.reads, 78) * GIB)
        return found

    world.device.read = slowly  # type: ignore[method-assign]
    await fall(world, hosted)
    assert hosted.held == 60 * GIB


async def test_a_busy_engine_is_stopped_and_its_level_not_blamed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What still runs says nothing about how it sleeps."""
    monkeypatch.setattr(sleeping, "RUNNING_LIMIT", 0.02)
    hosted = Machine(world).engine()
    world.engine.counts = [1] * 1000
    await fall(world, hosted)
    assert len(world.of(events.SleepFailed)) == 1 and world.engine.slumber == []
    assert world.measurements.of("a", "digest", sleep_at(1)).failures == 0


async def test_stopped_while_it_falls_asleep(world: World, tmp_path: Path) -> None:
    """Its unloading began with the hook before it, and ends with the one after it."""
    out = tmp_path / "said"
    say = f"import os; open({str(out)!r}, 'a').write(os.environ['MODELSWAP_HOOK'] + ' ')"
    hooks = {moment: [{"command": [sys.executable, "-S", "-c", say]}] for moment in ("before_unload", "after_unload")}
    Machine(world)
    hosted = world.host_running(hooks=hooks)
    hosted.held = GIB
    world.engine.sleep_gate.clear()
    hosted.job = asyncio.create_task(fall(world, hosted))
    await until(lambda: bool(world.engine.slumber))
    await put_out(world.outside, hosted.instance, kill=True)
    assert out.read_text().split() == ["before_unload", "after_unload"]
    assert not world.of(events.Slept) and not world.of(events.SleepFailed)
