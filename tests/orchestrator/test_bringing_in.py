"""How an instance is started, awaited and tried out, and every way in which that fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from structlog.testing import capture_logs

from modelswap.core import events
from modelswap.engines.base import CanaryFailed, Diagnosis, Place, Readiness, StandbyPlan
from modelswap.orchestrator.bringing_in import bring_in
from modelswap.orchestrator.hosting import FAST_PAUSE, FIRST_PAUSE, SLOW_PAUSE, pause
from modelswap.orchestrator.tasks import cancel
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.base import NotPrepared, StartFailed
from modelswap.spec.config import Model
from tests.orchestrator.fakes import World, until


async def test_a_start_is_journalled_before_the_spawn_and_reported_with_its_address(world: World) -> None:
    """The intent is in the database when the runtime is asked, and `BroughtIn` carries address and slots."""
    hosted = world.host()
    world.runtime.start_gate.clear()
    job = asyncio.create_task(bring_in(world.outside, hosted, adopted=False))
    await world.runtime.starting.wait()
    rows = await world.store.read("select instance, model, definition, host, port, state, pid from instances")
    assert rows == [("a.1.1", "a", "digest", "127.0.0.1", hosted.address.port, "starting", 0)]  # type: ignore[union-attr]
    world.runtime.start_gate.set()
    await job
    (brought,) = world.of(events.BroughtIn)
    running = world.runtime.living["a.1.1"]
    assert (brought.instance, brought.host, brought.port) == ("a.1.1", "127.0.0.1", running.address.port)
    assert brought.slots == 3 and hosted.ready
    entry = world.journal.entries["a.1.1"]
    assert (entry.pid, entry.born, entry.slots) == (running.pid, running.born, 3)
    assert world.engine.canaries == 1


@pytest.mark.parametrize(("concurrency", "told", "slots"), [(8, 5, 8), (None, 5, 5), (None, None, 3)])
async def test_slots_come_from_the_config_then_the_engine_then_its_default(
    world: World, concurrency: int | None, told: int | None, slots: int
) -> None:
    """``concurrency`` goes before what the engine says, and that before what its kind usually runs."""
    world.engine.said = Readiness(ready=True, slots=told)
    await bring_in(world.outside, world.host(concurrency=concurrency), adopted=False)
    assert world.of(events.BroughtIn)[0].slots == slots


async def test_progress_is_told_when_it_changes(world: World) -> None:
    """Stages and whole percents are reported once each."""
    world.engine.said = Readiness(ready=False, stage="weights", fraction=0.251)
    job = asyncio.create_task(bring_in(world.outside, world.host(), adopted=False))
    await until(lambda: bool(world.of(events.BringInStage)))
    world.engine.said = Readiness(ready=False, stage="weights", fraction=0.259)
    await asyncio.sleep(0.05)
    world.engine.said = Readiness(ready=True)
    await job
    told = [(event.stage, event.fraction) for event in world.of(events.BringInStage)]
    assert told == [("weights", 0.251), ("canary", None)]


async def test_an_adopted_start_is_only_waited_for(world: World) -> None:
    """Nothing is started for an instance that runs already."""
    hosted = world.host_running()
    hosted.ready = False
    await bring_in(world.outside, hosted, adopted=True)
    assert world.runtime.orders == []
    assert world.of(events.BroughtIn)[0].port == hosted.address.port  # type: ignore[union-attr]


async def test_a_stranger_on_the_address_is_not_taken_for_the_engine(world: World) -> None:
    """Ready counts only when the listening socket belongs to our process."""
    world.runtime.listens = False
    job = asyncio.create_task(bring_in(world.outside, world.host(), adopted=False))
    await until(lambda: bool(world.of(events.BringInStage)))
    await asyncio.sleep(0.05)
    assert not world.of(events.BroughtIn) and world.engine.canaries == 0
    world.runtime.listens = True
    await job
    assert world.of(events.BroughtIn)


async def test_an_engine_that_cannot_be_asked_yet_is_asked_again(world: World) -> None:
    """A connection that breaks while loading is no failure."""
    world.engine.readiness_error = aiohttp.ServerDisconnectedError()
    job = asyncio.create_task(bring_in(world.outside, world.host(), adopted=False))
    await until(lambda: bool(world.of(events.BringInStage)))
    world.engine.readiness_error = None
    await job
    assert world.of(events.BroughtIn)


@pytest.mark.parametrize(
    ("permanent", "code"), [(False, Code.MODEL_START_FAILED), (True, Code.MODEL_BROKEN)], ids=["passing", "permanent"]
)
async def test_a_process_that_ends_fails_the_start_at_once(world: World, permanent: bool, code: Code) -> None:
    """The message has the diagnosis and the last log lines, and the code says whether it can pass."""
    world.engine.said = Readiness(ready=False)
    world.engine.diagnosis = Diagnosis("no such file; mend 'model'", permanent)
    job = asyncio.create_task(bring_in(world.outside, world.host(), adopted=False))
    await until(lambda: "a.1.1" in world.runtime.living)
    world.runtime.die("a.1.1", 3)
    await job
    (failed,) = world.of(events.BringInFailed)
    assert (failed.code, failed.permanent) == (code, permanent)
    assert failed.message == (
        "a failed to start: no such file; mend 'model'\nIts last log lines:\nfirst line\nlast line"
    )
    assert world.engine.diagnosed == [(3, ["first line", "last line"])]
    assert world.outside.hosted == {}


async def test_a_start_that_somebody_killed_is_told_as_that(world: World) -> None:
    """SIGKILL says nothing about the model."""
    world.engine.said = Readiness(ready=False)
    job = asyncio.create_task(bring_in(world.outside, world.host(), adopted=False))
    await until(lambda: "a.1.1" in world.runtime.living)
    world.runtime.die("a.1.1", -9)
    await job
    assert world.of(events.BringInFailed)[0].blameless


async def test_a_start_whose_port_another_program_took_is_told_as_that(world: World) -> None:
    """What the engine's log shows to be chance says nothing about the model."""
    world.engine.said = Readiness(ready=False)
    world.engine.diagnosis = Diagnosis("its port was taken", permanent=False, blameless=True)
    job = asyncio.create_task(bring_in(world.outside, world.host(), adopted=False))
    await until(lambda: "a.1.1" in world.runtime.living)
    world.runtime.die("a.1.1", 1)
    await job
    assert world.of(events.BringInFailed)[0].blameless


async def test_a_container_that_reached_its_memory_limit_is_told_as_that(world: World) -> None:
    """It was SIGKILL, but trying again for the same waiters would be of no use."""
    hosted = world.host_running(container="c0ffee")
    world.engine.said = Readiness(ready=False)
    job = asyncio.create_task(bring_in(world.outside, hosted, adopted=True))
    await until(lambda: bool(world.of(events.BringInStage)))
    world.runtime.die("a.1.1", 137, oom=True)
    await job
    (failed,) = world.of(events.BringInFailed)
    assert not failed.blameless and failed.code is Code.MODEL_START_FAILED
    assert "reached its memory limit" in failed.message and "(exit status 137)" in failed.message
    assert "last line" in failed.message
    assert world.engine.diagnosed[0][0] == -9


@pytest.mark.parametrize("code", [137, 143])
async def test_a_container_that_is_stopped_while_it_starts_is_started_again(world: World, code: int) -> None:
    """`docker stop` and `docker kill` say nothing about the model."""
    hosted = world.host_running(container="c0ffee")
    world.engine.said = Readiness(ready=False)
    job = asyncio.create_task(bring_in(world.outside, hosted, adopted=True))
    await until(lambda: bool(world.of(events.BringInStage)))
    world.runtime.die("a.1.1", code)
    await job
    assert world.of(events.BringInFailed)[0].blameless


@pytest.mark.parametrize("where", ["allocate", "start"])
async def test_what_has_to_be_made_ready_again_is_told_as_that(
    world: World, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container or an image that has gone meanwhile costs its waiters nothing but time."""
    missing = NotPrepared("its container has been removed")

    async def allocate(spec: Model) -> Place:
        raise missing

    if where == "allocate":
        monkeypatch.setattr(world.runtime, "allocate", allocate)
    else:
        world.runtime.start_error = missing
    await bring_in(world.outside, world.host(), adopted=False)
    (failed,) = world.of(events.BringInFailed)
    assert failed.unprepared and not failed.permanent and not failed.blameless
    assert failed.message == "a has to be made ready again: its container has been removed"
    assert world.outside.hosted == {}


async def test_nothing_starts_before_what_others_started_has_ended(world: World) -> None:
    """It may hold the device; the intent is journalled meanwhile."""
    gone = asyncio.Event()

    async def ends() -> None:
        await gone.wait()

    leaving = asyncio.create_task(ends())
    world.outside.turning_away["foreign.b"] = leaving
    leaving.add_done_callback(lambda _: world.outside.turning_away.clear())
    job = asyncio.create_task(bring_in(world.outside, world.host(), adopted=False))
    await until(lambda: "a.1.1" in world.journal.entries)
    await asyncio.sleep(0.01)
    assert not world.runtime.starting.is_set()
    gone.set()
    await job
    assert world.of(events.BroughtIn)


async def test_what_others_started_and_nobody_can_stop_fails_the_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, and the start doesn't wait for ever."""
    monkeypatch.setattr("modelswap.orchestrator.bringing_in.TURNING_AWAY_LIMIT", 0.01)
    leaving = asyncio.create_task(asyncio.sleep(1000))
    world.outside.turning_away["foreign.b"] = leaving
    await bring_in(world.outside, world.host(), adopted=False)
    (failed,) = world.of(events.BringInFailed)
    assert failed.message.startswith("a can't be started: foreign.b, which somebody else started, has not ended")
    assert not leaving.done() and world.runtime.orders == []
    leaving.cancel()


async def test_a_runtime_that_cannot_tell_who_listens_is_asked_again(world: World) -> None:
    """A start doesn't fail because Docker is away for a moment."""
    world.runtime.listening_error = ModelswapError("Docker is away")
    job = asyncio.create_task(bring_in(world.outside, world.host(), adopted=False))
    await until(lambda: bool(world.of(events.BringInStage)))
    await asyncio.sleep(0.02)
    assert not job.done()
    world.runtime.listening_error = None
    await job
    assert world.of(events.BroughtIn)


async def test_an_end_explains_the_broken_connection_before_it(world: World) -> None:
    """The canary's connection breaks a moment before the process has ended."""
    world.engine.canary_error = aiohttp.ServerDisconnectedError()
    job = asyncio.create_task(bring_in(world.outside, world.host(), adopted=False))
    await until(lambda: world.engine.canaries == 1)
    world.runtime.die("a.1.1", -11)
    await job
    (failed,) = world.of(events.BringInFailed)
    assert "a failed to start: " in failed.message and not failed.blameless
    assert world.engine.diagnosed[0][0] == -11


async def test_a_start_that_takes_too_long_is_stopped_and_told(world: World) -> None:
    """`start_timeout` ends it: everything is stopped first, then it is SWAP_TIMEOUT with the log."""
    world.engine.said = Readiness(ready=False)
    await bring_in(world.outside, world.host(start_timeout=0.1, stop_grace=0.5), adopted=False)
    (failed,) = world.of(events.BringInFailed)
    assert failed.code is Code.SWAP_TIMEOUT and not failed.permanent
    assert "start_timeout (0.1 s)" in failed.message and "last line" in failed.message
    assert world.runtime.stops == [("a.1.1", 0.5)] and not world.runtime.living


async def test_an_engine_that_says_it_never_will_serve_is_broken(world: World) -> None:
    """A readiness with a problem is permanent."""
    world.engine.said = Readiness(ready=False, problem="it serves 'other'")
    await bring_in(world.outside, world.host(), adopted=False)
    (failed,) = world.of(events.BringInFailed)
    assert failed.code is Code.MODEL_BROKEN and failed.permanent
    assert failed.message.startswith("a can't serve: it serves 'other'")
    assert not world.runtime.living


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (CanaryFailed("it answered with status 500"), "it answered with status 500"),
        (aiohttp.ServerDisconnectedError(), "Server disconnected"),
        (TimeoutError(), "no answer"),
    ],
    ids=["refused", "broken connection", "no answer"],
)
async def test_a_failed_canary_fails_the_start(world: World, error: Exception, told: str) -> None:
    """Nothing is opened that didn't answer its canary."""
    world.engine.canary_error = error
    await bring_in(world.outside, world.host(), adopted=False)
    (failed,) = world.of(events.BringInFailed)
    assert failed.code is Code.MODEL_START_FAILED
    assert "failed its canary request" in failed.message and told in failed.message
    assert not world.runtime.living


@pytest.mark.parametrize("where", ["launch", "start"])
async def test_what_cannot_even_be_started_is_told(world: World, where: str) -> None:
    """A missing program is told with its remedy, and nothing is stopped that never ran."""
    error = StartFailed("no such program: serve; install it")
    if where == "launch":
        world.engine.launch_error = error
    else:
        world.runtime.start_error = error
    await bring_in(world.outside, world.host(), adopted=False)
    (failed,) = world.of(events.BringInFailed)
    assert failed.message == "a can't be started: no such program: serve; install it"
    assert failed.code is Code.MODEL_START_FAILED and not failed.permanent
    assert world.runtime.stops == []


async def test_a_model_larger_than_the_device_is_broken(world: World) -> None:
    """It is refused before it is started, permanently."""
    await bring_in(world.outside, world.host(memory="1KiB"), adopted=False)
    (failed,) = world.of(events.BringInFailed)
    assert failed.code is Code.MODEL_BROKEN and failed.permanent
    assert "1.0KiB" in failed.message and "fake device has only 100B" in failed.message
    assert world.runtime.orders == []


async def test_a_bug_in_explaining_a_failure_is_reported_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a diagnosis that fails nor a log that can't be read leaves the scheduler waiting."""

    def diagnose(*_: object) -> Diagnosis:
        raise RuntimeError("unforeseen")

    async def log_tail(*_: object) -> list[str]:
        raise PermissionError("log")

    monkeypatch.setattr(world.engine, "diagnose", diagnose)
    monkeypatch.setattr(world.runtime, "log_tail", log_tail)
    world.engine.said = Readiness(ready=False)
    job = asyncio.create_task(bring_in(world.outside, world.host(), adopted=False))
    await until(lambda: "a.1.1" in world.runtime.living)
    world.runtime.die("a.1.1", 3)
    with pytest.raises(RuntimeError):
        await job
    assert [event.code for event in world.of(events.BringInFailed)] == [Code.INTERNAL]


async def test_a_bug_is_reported_and_raised(world: World) -> None:
    """The scheduler hears of it, and the task's owner, too."""
    world.engine.canary_error = RuntimeError("unforeseen")
    with pytest.raises(RuntimeError, match="unforeseen"):
        await bring_in(world.outside, world.host(), adopted=False)
    (failed,) = world.of(events.BringInFailed)
    assert failed.code is Code.INTERNAL and "unforeseen" in failed.message
    assert not world.runtime.living


async def test_a_failed_start_that_cannot_be_killed_is_told_and_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First `PutOutFailed`, and `BringInFailed` only when nothing runs any more."""
    monkeypatch.setattr("modelswap.orchestrator.stopping.STUCK_PAUSE", 0.001)
    world.engine.canary_error = CanaryFailed("no")
    world.runtime.survives = 2
    await bring_in(world.outside, world.host(), adopted=False)
    kinds = [type(event) for event in world.events if not isinstance(event, events.BringInStage)]
    assert kinds == [events.PutOutFailed, events.BringInFailed]
    assert [grace for _, grace in world.runtime.stops] == [1.0, 0.0, 0.0]


async def test_the_api_key_never_reaches_a_message(world: World) -> None:
    """Log lines that have it are shown without."""
    world.engine.canary_error = CanaryFailed("no")
    world.runtime.log = ["args: api_key=hush-hush"]
    await bring_in(world.outside, world.host(api_key="hush-hush"), adopted=False)
    (failed,) = world.of(events.BringInFailed)
    assert "hush-hush" not in failed.message and "api_key=***" in failed.message


async def test_cancelling_in_the_middle_of_a_spawn_still_learns_what_to_stop(world: World) -> None:
    """Whoever cancels finds the process that came into being meanwhile."""
    hosted = world.host()
    world.runtime.start_gate.clear()
    job = asyncio.create_task(bring_in(world.outside, hosted, adopted=False))
    await world.runtime.starting.wait()
    job.cancel()
    await asyncio.sleep(0)
    world.runtime.start_gate.set()
    await asyncio.wait([job])
    assert job.cancelled() and hosted.running is not None and not world.of(events.BringInFailed)


async def test_cancelling_in_the_middle_of_a_failing_spawn_is_quiet(world: World) -> None:
    """There is nothing to stop then."""
    hosted = world.host()
    world.runtime.start_gate.clear()
    world.runtime.start_error = ModelswapError("no")
    job = asyncio.create_task(bring_in(world.outside, hosted, adopted=False))
    await world.runtime.starting.wait()
    canceller = asyncio.create_task(cancel(job))
    await asyncio.sleep(0)
    world.runtime.start_gate.set()
    await canceller
    assert job.cancelled() and hosted.running is None and world.events == []


async def test_cancelling_while_it_loads_leaves_it_running(world: World) -> None:
    """An orchestrator that ends leaves a start to the next one."""
    world.engine.said = Readiness(ready=False)
    job = asyncio.create_task(bring_in(world.outside, world.host(), adopted=False))
    await until(lambda: bool(world.of(events.BringInStage)))
    await cancel(job)
    assert "a.1.1" in world.runtime.living and world.runtime.stops == []


def test_pauses_grow_from_two_milliseconds_to_a_quarter_second() -> None:
    """Fast engines are looked at often, slow ones don't cost much."""
    assert pause(0.0) == FIRST_PAUSE == 0.002
    assert pause(0.3) == pytest.approx(0.009)
    assert pause(5.0) == FAST_PAUSE == 0.05
    assert pause(60.0) == SLOW_PAUSE == 0.25


async def start_of(world: World, number: int, *, dies: int | None = None) -> tuple[StandbyPlan | None, str]:
    """Start the model for the ``number``th time; returns the plan in its order, and `BringInFailed`'s or no words."""
    world.engine.said = Readiness(ready=dies is None)
    hosted = world.host(instance=f"a.1.{number}")
    job = asyncio.create_task(bring_in(world.outside, hosted, adopted=False))
    if dies is not None:
        await until(lambda: hosted.instance in world.runtime.living)
        world.runtime.die(hosted.instance, dies)
    await job
    failed = world.of(events.BringInFailed)
    world.events.clear()
    return world.runtime.orders[-1].standby, ("forgiven" if failed[0].blameless else "blamed") if failed else ""


async def test_a_start_from_a_standby_that_fails_is_followed_by_a_cold_one(world: World) -> None:
    """For the same waiters, with the reason in the log; whose fault it was shows then."""
    plan = world.engine.standby_plan = StandbyPlan("k", ("python",), Path("wait.py"), {})
    world.runtime.plans = [plan]
    with capture_logs() as logs:
        assert await start_of(world, 1, dies=1) == (plan, "forgiven")
    assert [one["reason"] for one in logs if one["event"] == "cold start instead"] == [
        "the standby became the server, but a failed to start: it ran out of luck; give it more"
    ]
    assert await start_of(world, 2, dies=1) == (None, "blamed")
    assert await start_of(world, 3) == (plan, "")
    world.engine.diagnosis = Diagnosis("no such file", permanent=True)
    assert await start_of(world, 4, dies=1) == (plan, "blamed")


async def test_standbys_that_fail_again_and_again_are_not_used_any_more(world: World) -> None:
    """Three times in a row where a cold start then succeeds: the model's starts are cold until it is calibrated."""
    plan = world.engine.standby_plan = StandbyPlan("k", ("python",), Path("wait.py"), {})
    world.runtime.plans = [plan]
    for number in range(1, 9, 2):
        if number == 3:  # one that succeeds between them begins the count anew
            assert await start_of(world, 30) == (plan, "")
        assert await start_of(world, number, dies=1) == (plan, "forgiven")
        assert await start_of(world, number + 1) == (None, "")
    assert await start_of(world, 10) == (None, "")
    known = world.outside.measurements.of("a", "digest", "standby")
    assert known.ok is False and "ran out of luck" in known.reason
    world.outside.measurements.forget("a")
    assert await start_of(world, 11) == (plan, "")
