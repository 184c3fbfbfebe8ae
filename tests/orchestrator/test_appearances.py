"""Engines that somebody else starts: noticed, taken up on a free device, else stopped and told."""

from __future__ import annotations

import asyncio

import pytest

from modelswap.core import effects, events
from modelswap.core.states import InstanceState
from modelswap.engines.base import Readiness
from modelswap.orchestrator import appearances
from modelswap.orchestrator.appearances import TURN_AWAY_GRACE, look_around, notice, turn_away, watch_appearances
from modelswap.orchestrator.feed import Item
from modelswap.orchestrator.service import Service
from modelswap.orchestrator.tasks import cancel
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import Exit, Running
from tests.orchestrator.fakes import Bench, World, config, until


def started(bench: Bench, model: str, number: int = 1) -> Running:
    """Have somebody else start a container of a model."""
    definition = bench.configured().definitions[model]
    running = bench.runtime.spawn(f"foreign.{model}.{number}", model, definition, container=f"c0ffee{number}" + "0" * 8)
    bench.runtime.appearances.put_nowait(running)
    return running


async def ensure(service: Service, model: str) -> effects.Answer:
    """Have a model made resident."""
    number, answer = service.answers.expect()
    service.post(events.Ensure(at=service.clock(), request=number, model=model))
    return await answer


def resident(service: Service) -> str | None:
    """Return which model has the device."""
    return next((device.resident for device in service.shell.snapshot().devices), None)


def told(feed: asyncio.Queue[Item | None]) -> list[bytes]:
    """Return what a subscriber has heard so far of starts by others."""
    items = [feed.get_nowait() for _ in range(feed.qsize())]
    return [item.data for item in items if item is not None and item.kind == "foreign_start"]


def count(service: Service, model: str, outcome: str) -> float | None:
    """Return how many starts by others ended so."""
    labels = {"model": model, "outcome": outcome}
    return service.metrics.registry.get_sample_value("modelswap_foreign_starts_total", labels)


async def test_on_a_free_device_it_becomes_resident(bench: Bench) -> None:
    """It is tried out like a start of ours, journalled with its container, counted and told."""
    async with bench.running() as service:
        with service.feed.subscribe() as feed:
            running = started(bench, "a")
            await until(lambda: resident(service) == "a")
            (said,) = told(feed)
        assert bench.engine.canaries == 1 and bench.runtime.orders == [] and bench.runtime.stops == []
        entry = service.journal.entries[running.instance]
        assert (entry.container, entry.born) == (running.container, running.born)
        await until(lambda: service.journal.entries[running.instance].state is InstanceState.READY)
        assert count(service, "a", "adopted") == 1 and count(service, "a", "stopped") == 0
        assert b'"outcome":"adopted"' in said
        assert (await ensure(service, "a")).port == running.address.port
        assert (await ensure(service, "b")).previous == "a"
        assert [stopped for stopped, _ in bench.runtime.stops] == [running.instance]


async def test_while_another_holds_the_device_it_is_stopped_and_told(bench: Bench) -> None:
    """The resident model notices nothing."""
    async with bench.running() as service:
        await ensure(service, "b")
        with service.feed.subscribe() as feed:
            running = started(bench, "a")
            await until(lambda: running.instance not in bench.runtime.living)
            (said,) = told(feed)
        assert resident(service) == "b"
        assert bench.runtime.stops == [(running.instance, TURN_AWAY_GRACE)]
        assert b'"outcome":"stopped"' in said and b"gpu0 is held by b" in said
        assert running.instance not in service.outside.hosted and running.instance not in service.journal.entries
        assert count(service, "a", "stopped") == 1
        await until(lambda: not service.outside.turning_away)


async def test_no_start_begins_before_it_has_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be about to take the device's memory."""
    gate, real = asyncio.Event(), bench.runtime.stop

    async def stop(running: Running, grace: float) -> Exit:
        if bench.runtime.foreign(running):
            await gate.wait()
        return await real(running, grace)

    monkeypatch.setattr(bench.runtime, "stop", stop)
    async with bench.running() as service:
        await ensure(service, "b")
        running = started(bench, "a")
        await until(lambda: bool(service.outside.turning_away))
        asking = asyncio.create_task(ensure(service, "a"))
        await until(lambda: any(entry.model == "a" for entry in service.journal.entries.values()))
        await asyncio.sleep(0.02)
        assert running.instance in bench.runtime.living and len(bench.runtime.orders) == 1
        gate.set()
        assert (await asking).mechanism == "cold"
        assert list(bench.runtime.living) == [bench.runtime.orders[1].instance]


async def test_one_that_ends_again_at_once_disturbs_nobody(bench: Bench) -> None:
    """Whoever waits is served by a start of ours."""
    async with bench.running() as service:
        bench.engine.said = Readiness(ready=False)
        running = started(bench, "a")
        await until(lambda: bool(service.shell.snapshot().swaps))
        bench.runtime.die(running.instance, 143)
        await until(lambda: not service.shell.snapshot().swaps)
        bench.engine.said = Readiness(ready=True)
        assert (await ensure(service, "a")).mechanism == "cold"
        assert running.instance not in service.journal.entries


async def test_a_model_added_by_a_reload_may_run_already(bench: Bench) -> None:
    """Its container was none of our business before, and is now."""
    bench.config = config(b={})
    async with bench.running() as service:
        bench.config = config(a={}, b={})
        started(bench, "a")
        await until(bench.runtime.appearances.empty)
        assert service.outside.hosted == {}
        await service.reload()
        await until(lambda: resident(service) == "a")


async def test_an_appearance_is_told_once(world: World) -> None:
    """Neither what is known nor what is being turned away is news, and unknown models' instances are nobody's."""
    configured = Bench(world.store._path.parent).configured()
    running = world.runtime.spawn("foreign.a", "a", configured.definitions["a"], container="c0ffee")
    world.runtime.spawn("foreign.x", "gone", "d", container="beef")
    world.runtime.spawn("b.1", "b", configured.definitions["b"])
    await look_around(world.outside, configured)
    notice(world.outside, configured, running)
    (appeared,) = world.of(events.Appeared)
    assert (appeared.instance, appeared.model, appeared.slots) == ("foreign.a", "a", 3)
    assert (appeared.host, appeared.port) == (running.address.host, running.address.port)
    assert appeared.definition == configured.definitions["a"]
    del world.outside.hosted["foreign.a"]
    leaving = asyncio.create_task(turn_away(world.outside, running))
    world.outside.turning_away["foreign.a"] = leaving
    await look_around(world.outside, configured)
    assert len(world.events) == 1
    await leaving


async def test_a_runtime_that_cannot_tell_is_asked_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trouble with Docker must not end the watch, nor a look around fail a reload."""
    monkeypatch.setattr(appearances, "WATCH_AGAIN", 0.001)
    configured = Bench(world.store._path.parent).configured()
    failures = [ModelswapError("Docker is away"), ModelswapError("Docker is away"), RuntimeError("unforeseen")]
    real = world.runtime.appeared

    async def appeared() -> Running:
        if failures:
            raise failures.pop()
        return await real()

    async def instances() -> list[Running]:
        raise ModelswapError("Docker is away")

    monkeypatch.setattr(world.runtime, "appeared", appeared)
    watching = asyncio.create_task(watch_appearances(world.outside, lambda: configured))
    world.runtime.appearances.put_nowait(world.runtime.spawn("foreign.a", "a", configured.definitions["a"]))
    await until(lambda: bool(world.of(events.Appeared)))
    await cancel(watching)
    monkeypatch.setattr(world.runtime, "instances", instances)
    await look_around(world.outside, configured)
    assert len(world.events) == 1


async def test_one_that_cannot_be_stopped_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without grace, until it has gone; the scheduler needn't know."""
    monkeypatch.setattr(appearances, "STUCK_PAUSE", 0.001)
    world.runtime.survives = 2
    await turn_away(world.outside, world.runtime.spawn("foreign.a", "a", "d", container="c0ffee"))
    assert [grace for _, grace in world.runtime.stops] == [TURN_AWAY_GRACE, 0.0, 0.0]
    assert world.events == [] and world.runtime.living == {}
