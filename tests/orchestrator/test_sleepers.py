"""What sleepers cost, which of them are given up, and how the scheduler hears how models are put out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelswap.core import events
from modelswap.devices.base import Reading
from modelswap.orchestrator import sleepers
from modelswap.orchestrator.facts import Configured
from modelswap.orchestrator.hosting import Hosted, HostMemory
from modelswap.orchestrator.measurements import COLD, STANDBY, STOP, sleeping, waking
from modelswap.orchestrator.ways import Chooser
from tests.orchestrator.fakes import World, config

GIB = 1 << 30
ANSWER = ("one", "two", "three", "four")


def asleep(world: World, model: str, host: int = GIB, residue: int = 10) -> Hosted:
    """Return a sleeper."""
    hosted = world.host_running(f"{model}.1.1", model)
    hosted.asleep, hosted.host_bytes, hosted.residue = 1, host, residue
    return hosted


def memory(world: World, budget: int | None = None, free: int = 1 << 40) -> None:
    """Say what host memory there is."""
    world.outside.memory = HostMemory(budget=lambda: budget, available=lambda: free, total=64 * GIB)


def dropped(world: World) -> list[str]:
    """Return whom the scheduler was asked to stop."""
    return [event.instance for event in world.of(events.DropSleeper)]


async def test_short_of_host_memory_the_least_worth_goes(world: World) -> None:
    """As soon as more is spent than may be; each is asked for once, and counts until it has gone."""
    memory(world, budget=2 * GIB)
    for model in "abc":
        asleep(world, model)
    for model in "ac":
        world.outside.ranking.used(model, 30.0, GIB)
    assert sleepers.spent(world.outside) == 3 * GIB
    sleepers.keep_within(world.outside)
    sleepers.keep_within(world.outside)
    assert dropped(world) == ["b.1.1"]
    assert {one.model for one in sleepers.sleepers(world.outside)} == {"a", "c"}


async def test_the_kernels_killer_is_forestalled(world: World) -> None:
    """Without a budget, sleepers go when the host itself is short."""
    memory(world, free=40 * GIB)
    asleep(world, "a")
    sleepers.keep_within(world.outside)
    assert dropped(world) == []
    memory(world, free=GIB)
    sleepers.keep_within(world.outside)
    assert dropped(world) == ["a.1.1"]


async def test_standbys_count(world: World) -> None:
    """What they take, sleepers can't."""
    memory(world, budget=2 * GIB)
    world.outside.memory.standbys = lambda: 3 * GIB
    asleep(world, "a")
    sleepers.keep_within(world.outside)
    assert dropped(world) == ["a.1.1"]


async def test_a_new_sleeper_displaces_only_what_is_worth_less(world: World) -> None:
    """Room is made for it, and waited for; else it isn't put to sleep."""
    memory(world, budget=GIB)
    old = asleep(world, "a")
    world.outside.ranking.used("a", 10.0, GIB)
    new = world.host_running("b.1.1", "b")
    world.outside.ranking.used("b", 5.0, GIB)
    assert not await sleepers.reserve(world.outside, new, GIB, 0)
    assert dropped(world) == [] and new.host_bytes == 0
    for _ in range(3):
        world.outside.ranking.used("b", 30.0, GIB)

    def stopped(_event: events.Event) -> None:
        del world.outside.hosted[old.instance]

    world.outside.post = stopped
    assert await sleepers.reserve(world.outside, new, GIB, 0)
    assert new.host_bytes == GIB


async def test_what_an_instance_has_reserved_once_it_keeps(world: World) -> None:
    """Sleeping again needs no more room."""
    memory(world, budget=GIB)
    again = world.host_running("a.1.1", "a")
    again.host_bytes = GIB
    assert await sleepers.reserve(world.outside, again, GIB, 0)
    assert not await sleepers.reserve(world.outside, again, 2 * GIB, 0)


async def test_what_a_sleeper_will_take_is_measured_or_guessed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A little more than was measured; before, what its weights take when they are pinned."""
    (tmp_path / "model.gguf").write_bytes(b"x" * 1000)
    hosted = world.host_running("a.1.1", "a")
    hosted.held = 2000
    world.runtime.taken["a.1.1"] = 100
    assert (await sleepers.expected_host(world.outside, hosted, 1)) == (3100, 100)
    world.outside.weights["digest"] = 1000
    assert await sleepers.expected_host(world.outside, hosted, 1) == (1600, 100)
    assert (await sleepers.expected_host(world.outside, hosted, 2)) == (100, 100)
    world.measurements.slept("a", "digest", 1, residue=1, host=1000)
    assert (await sleepers.expected_host(world.outside, hosted, 1)) == (1100, 100)
    folder = config(a={"model": str(tmp_path)}).models["a"]
    assert sleepers.weights_on_disk(folder) == 1000
    assert sleepers.weights_on_disk(config(a={"model": "no/such"}).models["a"]) is None


async def test_the_one_that_comes_in_instead_is_spared(world: World) -> None:
    """Its sleeper is about to be woken: dropping it would make whoever waits for it wait for a start."""
    memory(world, budget=GIB)
    asleep(world, "a")
    new = world.host_running("b.1.1", "b")
    world.outside.ranking.used("b", 30.0, GIB)
    assert not await sleepers.reserve(world.outside, new, GIB, 0, sparing="a")
    assert dropped(world) == []


async def test_another_level_is_reserved_for_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What level 2 took says nothing about level 1, which pins weights; what was pinned stays when it drops them."""
    world.runtime.taken["a.1.1"] = 100
    world.outside.weights["digest"] = 1000
    hosted = world.host_running("a.1.1", "a")
    hosted.levels, hosted.host_bytes = {2}, 100
    assert await sleepers.expected_host(world.outside, hosted, 2) == (100, 100)
    assert await sleepers.expected_host(world.outside, hosted, 1) == (1600, 100)
    hosted.levels, hosted.host_bytes = {1}, 1600
    assert await sleepers.expected_host(world.outside, hosted, 2) == (1600, 100)


async def test_what_is_on_the_device_bounds_weights_that_nobody_knows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that an earlier orchestrator started may pin all that it holds; other sleepers' part isn't its own."""
    world.runtime.taken["a.1.1"] = 100
    hosted = world.host_running("a.1.1", "a")
    asleep(world, "b", residue=10)
    world.device.hold(50)
    assert await sleepers.expected_host(world.outside, hosted, 1) == (160, 100)


async def test_what_a_start_from_standby_takes_is_what_a_sleeper_saves(world: World) -> None:
    """Sleeping is worth the time that the quickest start would take more."""
    for model, standby in (("a", None), ("b", 5.0)):
        world.measurements.took(model, "digest", COLD, 60.0)
        if standby is not None:
            world.measurements.took(model, "digest", STANDBY, standby)
        sleepers.used(world.outside, world.host_running(f"{model}.1.1", model))
    assert world.outside.ranking.credit("b") < world.outside.ranking.credit("a") / 5


class Choice:
    """A chooser over models ``a`` and ``b``."""

    def __init__(self, world: World, **fields: Any) -> None:
        self.world = world
        self.reading: Reading | None = Reading(total=100, free=100)
        world.engine.levels = (1, 2)
        self.configured = Configured.of(config(a=fields, b={}), lambda _kind: world.engine)
        self.chooser = Chooser(world.outside, lambda: self.configured, lambda: self.reading)

    def knows(self, level: int = 1, sleep: float = 1.0, wake: float = 1.0, residue: int = 5) -> None:
        """Have ``a`` measured."""
        known, definition = self.world.measurements, self.configured.definitions["a"]
        for _ in range(2):
            known.answered("a", definition, ANSWER)
        known.took("a", definition, COLD, 30.0)
        known.took("a", definition, STOP, 1.0)
        known.took("a", definition, sleeping(level), sleep)
        known.took("a", definition, waking(level), wake)
        known.slept("a", definition, level, residue=residue, host=GIB)
        known.proved("a", definition, level)

    def told(self) -> list[tuple[str, int]]:
        """Return what the scheduler hears now."""
        before = len(self.world.events)
        self.chooser.tell()
        found = [event for event in self.world.events[before:] if isinstance(event, events.Ways)]
        return [(event.model, event.level) for event in found]


async def test_changes_are_told_once(world: World) -> None:
    """Nothing at first, since all models are stopped; then each change."""
    memory(world)
    choice = Choice(world)
    assert choice.told() == []
    choice.knows()
    assert choice.told() == [("a", 1)]
    assert choice.told() == []
    world.measurements.wrong("a", choice.configured.definitions["a"], 1, "gibberish")
    assert choice.told() == [("a", 2)]


async def test_no_reading_no_sleeper(world: World) -> None:
    """On a device that can't be read, nobody could see the memory come back."""
    memory(world)
    choice = Choice(world)
    choice.knows()
    choice.reading = None
    assert choice.told() == []


async def test_a_model_beside_the_others_is_never_put_to_sleep(world: World) -> None:
    """It has no device to give up."""
    memory(world)
    choice = Choice(world, device="none")
    choice.knows()
    assert choice.told() == []


async def test_the_budget_rules_a_level_out(world: World) -> None:
    """With too little host memory for level 1, level 2 is tried; what lesser sleepers hold counts as free."""
    memory(world, budget=GIB // 2)
    choice = Choice(world)
    choice.knows()
    assert choice.told() == [("a", 2)]
    memory(world, budget=GIB)
    other = asleep(world, "b")
    world.outside.ranking.used("b", 1000.0, GIB)
    assert choice.told() == []
    world.outside.ranking.dropped("b")
    world.outside.ranking.used("a", 100.0, GIB)
    world.outside.ranking.clock = 0.0
    assert choice.told() == [("a", 1)] and other.asleep


async def test_a_residue_that_others_have_no_room_beside_rules_a_level_out(world: World) -> None:
    """The other models' needs come first."""
    memory(world)
    world.engine.needs = 90
    choice = Choice(world)
    choice.knows(residue=20)
    assert choice.told() == [("a", 2)]  # which has not been measured yet
    choice.knows(level=2, residue=20)
    assert choice.told() == [("a", 0)]


async def test_a_changed_definition_is_begun_anew(world: World) -> None:
    """The scheduler has forgotten, and so have we."""
    memory(world)
    choice = Choice(world)
    choice.knows()
    choice.told()
    choice.configured = Configured.of(config(a={"args": ["--new"]}, b={}), lambda _kind: world.engine)
    assert choice.told() == []
    choice.knows()
    assert choice.told() == [("a", 1)]
