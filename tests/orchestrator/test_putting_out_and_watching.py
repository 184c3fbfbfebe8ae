"""How instances are stopped, watched and looked at."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from modelswap.core import events
from modelswap.engines.base import Readiness
from modelswap.orchestrator.bringing_in import bring_in
from modelswap.orchestrator.putting_out import put_out
from modelswap.orchestrator.watching import probe, watch
from modelswap.protocol.errors import ModelswapError
from tests.orchestrator.fakes import World, until


async def test_a_drained_instance_is_stopped_with_its_grace(world: World) -> None:
    """The engine's grace counts where the config has none."""
    world.host_running()
    await put_out(world.outside, "a.1.1", kill=False)
    assert world.runtime.stops == [("a.1.1", 7.0)]
    assert [event.instance for event in world.of(events.PutOut)] == ["a.1.1"]
    assert world.outside.hosted == {}


async def test_the_configs_grace_goes_first(world: World) -> None:
    """``stop_grace`` of the model is used."""
    world.host_running(stop_grace=2.5)
    await put_out(world.outside, "a.1.1", kill=False)
    assert world.runtime.stops == [("a.1.1", 2.5)]


async def test_a_dead_instance_is_killed_without_grace_or_questions(world: World) -> None:
    """``kill`` asks nothing and waits for nothing."""
    world.host_running()
    world.engine.count_error = AssertionError("must not be asked")
    await put_out(world.outside, "a.1.1", kill=True)
    assert world.runtime.stops == [("a.1.1", 0.0)]


async def test_last_requests_of_the_engine_are_waited_for(world: World) -> None:
    """The engine's own count must come to 0 before it is stopped."""
    world.host_running()
    world.engine.counts = [2, 1, 0]
    await put_out(world.outside, "a.1.1", kill=False)
    assert world.engine.counts == [] and world.of(events.PutOut)


async def test_an_engine_that_stays_busy_is_stopped_all_the_same(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for the engine's own count is bounded."""
    monkeypatch.setattr("modelswap.orchestrator.putting_out.RUNNING_LIMIT", 0.02)
    world.host_running()
    world.engine.counts = [1] * 1000
    await put_out(world.outside, "a.1.1", kill=False)
    assert world.of(events.PutOut)


@pytest.mark.parametrize("error", [aiohttp.ServerDisconnectedError(), ValueError("bug")])
async def test_an_engine_that_cannot_be_asked_is_stopped_all_the_same(world: World, error: Exception) -> None:
    """A broken connection doesn't hold up a stop."""
    world.host_running()
    world.engine.count_error = error
    await put_out(world.outside, "a.1.1", kill=False)
    assert world.of(events.PutOut)


async def test_an_unknown_instance_is_gone_already(world: World) -> None:
    """The scheduler gets its answer whatever happened before."""
    await put_out(world.outside, "a.9.9", kill=False)
    assert [event.instance for event in world.of(events.PutOut)] == ["a.9.9"]


async def test_what_cannot_be_killed_is_told_once_and_watched_until_it_goes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`PutOutFailed` first, `PutOut` when it has gone after all."""
    monkeypatch.setattr("modelswap.orchestrator.stopping.STUCK_PAUSE", 0.001)
    world.host_running()
    world.runtime.survives = 3
    await put_out(world.outside, "a.1.1", kill=False)
    assert [type(event) for event in world.events] == [events.PutOutFailed, events.PutOut]
    assert "survived SIGKILL" in world.of(events.PutOutFailed)[0].message
    assert [grace for _, grace in world.runtime.stops] == [7.0, 0.0, 0.0, 0.0]


async def test_putting_out_cancels_a_start_and_stops_what_came_of_it(world: World) -> None:
    """Nothing more is heard of the start."""
    world.engine.said = Readiness(ready=False)
    hosted = world.host()
    hosted.job = asyncio.create_task(bring_in(world.outside, hosted, adopted=False))
    await until(lambda: bool(world.of(events.BringInStage)))
    await put_out(world.outside, "a.1.1", kill=False)
    assert hosted.job.cancelled() and not world.runtime.living
    assert [type(event) for event in world.events] == [events.BringInStage, events.PutOut]


async def test_putting_out_before_the_spawn_starts_nothing(world: World) -> None:
    """A start that is still asking for its address ends quietly."""
    hosted = world.host()
    hosted.job = asyncio.create_task(bring_in(world.outside, hosted, adopted=False))
    await put_out(world.outside, "a.1.1", kill=False)
    assert [type(event) for event in world.events] == [events.PutOut] and not world.runtime.living


async def test_a_watched_instance_that_ends_is_told_with_its_log(world: World) -> None:
    """`Died` says how it ended."""
    hosted = world.host_running()
    watching = asyncio.create_task(watch(world.outside, hosted))
    await asyncio.sleep(0)
    world.runtime.die("a.1.1", -11)
    await watching
    (died,) = world.of(events.Died)
    assert died.message == ("a died: its engine killed by signal 11\nIts last log lines:\nfirst line\nlast line")


async def test_a_container_that_somebody_stops_is_told_as_that(world: World) -> None:
    """`docker stop` behind our back is no crash, and noticed at once."""
    hosted = world.host_running(container="c0ffee")
    watching = asyncio.create_task(watch(world.outside, hosted))
    await asyncio.sleep(0)
    world.runtime.die("a.1.1", 143)
    await watching
    (died,) = world.of(events.Died)
    assert died.message.startswith("a was stopped from outside (exit status 143), as by `docker stop`\nIts last log")


async def test_a_runtime_that_cannot_tell_for_now_has_not_seen_an_end(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instance outlives its runtime's trouble, and goes on being watched."""
    monkeypatch.setattr("modelswap.orchestrator.hosting.LOST_PAUSE", 0.001)
    world.runtime.wait_errors = [ModelswapError("Docker is away")] * 3
    hosted = world.host_running(container="c0ffee")
    watching = asyncio.create_task(watch(world.outside, hosted))
    await until(lambda: not world.runtime.wait_errors)
    assert not watching.done() and world.events == []
    world.runtime.die("a.1.1", 1)
    await watching
    assert len(world.of(events.Died)) == 1


async def test_a_probe_answers_even_if_the_runtime_cannot(world: World) -> None:
    """An engine that doesn't answer is unwell, whoever listens at its address."""
    world.host_running(container="c0ffee")
    world.engine.well = False
    world.runtime.listening_error = ModelswapError("Docker is away")
    await probe(world.outside, "a.1.1")
    assert not world.of(events.Probed)[0].healthy


@pytest.mark.parametrize("error", [None, aiohttp.ServerDisconnectedError(), TimeoutError(), ValueError("bug")])
async def test_three_missed_health_checks_mean_it_hangs(world: World, error: Exception | None) -> None:
    """However they are missed."""
    world.engine.well = False
    world.engine.health_error = error
    await watch(world.outside, world.host_running(health_interval=0.01))
    assert world.engine.health_checks == 3
    assert "hangs" in world.of(events.Died)[0].message


async def test_a_health_check_that_succeeds_forgives_those_missed(world: World) -> None:
    """Only misses in a row count."""
    world.engine.health_answers = [False, False, True, False, False, True]
    watching = asyncio.create_task(watch(world.outside, world.host_running(health_interval=0.005)))
    await until(lambda: world.engine.health_checks > 6)
    assert not watching.done()
    watching.cancel()
    await asyncio.wait([watching])
    assert world.events == []


async def test_health_is_never_asked_with_interval_zero(world: World) -> None:
    """Only the process is watched then."""
    hosted = world.host_running(health_interval=0)
    watching = asyncio.create_task(watch(world.outside, hosted))
    await asyncio.sleep(0.02)
    world.runtime.die("a.1.1")
    await watching
    assert world.engine.health_checks == 0 and world.of(events.Died)


async def test_an_instance_that_is_being_put_out_does_not_die(world: World) -> None:
    """Its end is no news then."""
    hosted = world.host_running()
    hosted.watch = asyncio.create_task(watch(world.outside, hosted))
    await asyncio.sleep(0)
    await put_out(world.outside, "a.1.1", kill=False)
    assert [type(event) for event in world.events] == [events.PutOut]


async def test_a_probe_finds_a_healthy_instance_healthy(world: World) -> None:
    """The gateway's trouble was its own."""
    world.host_running()
    await probe(world.outside, "a.1.1")
    assert world.of(events.Probed)[0].healthy


@pytest.mark.parametrize("trouble", ["dead", "ill", "deaf", "leaving", "unknown"])
async def test_a_probe_tells_what_is_wrong(world: World, trouble: str) -> None:
    """Whether it died, doesn't answer, doesn't listen, is on its way out or was never there."""
    hosted = world.host_running()
    expected = {
        "dead": "a died: its engine exited with status 1",
        "ill": "a does not answer its health check",
        "deaf": "a does not listen any more",
        "leaving": "it has gone",
        "unknown": "it has gone",
    }[trouble]
    world.engine.well = trouble not in ("ill", "deaf")
    world.runtime.listens = trouble != "deaf"
    hosted.leaving = trouble == "leaving"
    if trouble == "dead":
        world.runtime.die("a.1.1")
    if trouble == "unknown":
        world.outside.hosted.clear()
    await probe(world.outside, "a.1.1")
    (probed,) = world.of(events.Probed)
    assert not probed.healthy and probed.message.startswith(expected)
