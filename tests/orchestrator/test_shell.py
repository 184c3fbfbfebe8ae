"""The task that owns the scheduler: order, timers, and what a failure does."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from modelswap.core import effects, events
from modelswap.core.snapshot import Snapshot
from modelswap.orchestrator import shell as shells
from modelswap.orchestrator.shell import Shell
from modelswap.orchestrator.tasks import Tasks, cancel
from modelswap.protocol.messages import Heartbeat
from tests.orchestrator.fakes import until


class Scripted:
    """A scheduler that does as it is told."""

    def __init__(self) -> None:
        self.seen: list[events.Event] = []
        self.deadline: float | None = None
        self.error: Exception | None = None
        self.deadline_error: Exception | None = None
        self.effects: list[effects.Effect] = []

    def handle(self, event: events.Event) -> list[effects.Effect]:
        """Note the event."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.seen.append(event)
        if isinstance(event, events.Tick):
            self.deadline = None
        return self.effects

    def next_deadline(self) -> float | None:
        """Return what was set."""
        if self.deadline_error is not None:
            error, self.deadline_error = self.deadline_error, None
            raise error
        return self.deadline

    def snapshot(self, now: float) -> Snapshot:
        """Return an empty one."""
        return Snapshot(begun=True, generation=1, models=(), instances=(), devices=(), swaps=(), gateways=())


class Rig:
    """A shell over a scripted scheduler."""

    def __init__(self) -> None:
        self.scheduler = Scripted()
        self.carried: list[effects.Effect] = []
        self.carry_error: Exception | None = None
        self.lags: list[float] = []
        self.shell = Shell(self.scheduler, self._carry, clock=time.monotonic, lag=self.lags.append)

    def _carry(self, effect: effects.Effect) -> None:
        if self.carry_error is not None:
            error, self.carry_error = self.carry_error, None
            raise error
        self.carried.append(effect)

    def lost(self, gateway: str) -> events.Event:
        """Return some event."""
        return events.GatewayLost(at=time.monotonic(), gateway=gateway)

    def names(self) -> list[str]:
        """Return the gateways of the events that came through."""
        return [event.gateway for event in self.scheduler.seen if isinstance(event, events.GatewayLost)]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """A running shell."""
    made = Rig()
    task = asyncio.create_task(made.shell.run())
    yield made
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def say(gateway: str) -> effects.Say:
    """Return some effect."""
    return effects.Say(gateway=gateway, message=Heartbeat())


async def test_events_and_effects_keep_their_order(rig: Rig) -> None:
    """However many come at once."""
    rig.scheduler.effects = [say("x"), say("y")]
    for number in range(1000):
        rig.shell.post(rig.lost(str(number)))
    await until(lambda: len(rig.scheduler.seen) == 1000)
    assert rig.names() == [str(number) for number in range(1000)]
    assert rig.carried == [say("x"), say("y")] * 1000
    assert len(rig.lags) == 1000 and min(rig.lags) >= 0


async def test_an_event_whose_time_has_passed_is_dropped_at_its_turn(rig: Rig) -> None:
    """``still`` is asked right before, after everything that came earlier."""
    seen: list[int] = []

    def still() -> bool:
        seen.append(len(rig.scheduler.seen))
        return False

    rig.shell.post(rig.lost("first"))
    rig.shell.post(rig.lost("dropped"), still)
    rig.shell.post(rig.lost("last"))
    await until(lambda: len(rig.scheduler.seen) == 2)
    assert rig.names() == ["first", "last"] and seen == [1]


async def test_a_tick_comes_at_the_deadline(rig: Rig) -> None:
    """Not before it, and without anything else happening."""
    rig.scheduler.deadline = due = time.monotonic() + 0.02
    rig.shell.post(rig.lost("wake"))
    await until(lambda: any(isinstance(event, events.Tick) for event in rig.scheduler.seen))
    assert rig.scheduler.seen[-1].at >= due


async def test_a_failing_scheduler_is_told_counted_and_goes_on(rig: Rig) -> None:
    """Its story is in the log, health is false for good, and the next event is still handled."""
    with capture_logs() as logs:
        rig.scheduler.error = RuntimeError("forbidden\nits story: …")
        rig.shell.post(rig.lost("bad"))
        rig.shell.post(rig.lost("good"))
        await until(lambda: rig.names() == ["good"])
    assert "its story" in logs[0]["story"] and "bad" in logs[0]["during"]
    assert rig.shell.failures == 1
    assert rig.shell.problems() == ["the scheduler failed 1 times, last with RuntimeError: forbidden; restart it"]


async def test_a_failing_effect_keeps_none_after_it(rig: Rig) -> None:
    """The others are carried out, and health is false."""
    rig.scheduler.effects = [say("x"), say("y")]
    rig.carry_error = ValueError("no")
    rig.shell.post(rig.lost("g"))
    await until(lambda: rig.carried == [say("y")])
    assert rig.shell.failures == 1 and rig.shell.problems()


async def test_a_failing_deadline_is_no_end_either(rig: Rig) -> None:
    """The loop comes round again."""
    rig.scheduler.deadline_error = ValueError("no")
    rig.shell.post(rig.lost("g"))
    await until(lambda: rig.shell.failures == 1)
    rig.shell.post(rig.lost("h"))
    await until(lambda: rig.names() == ["g", "h"])


async def test_health_is_false_before_it_runs_when_it_ended_and_when_it_is_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A heartbeat tells."""
    now = 100.0
    shell = Shell(Scripted(), lambda _: None, clock=lambda: now)
    assert shell.problems() == ["the scheduler's loop has ended"]
    task = asyncio.create_task(shell.run())
    await asyncio.sleep(0)
    assert shell.problems() == []
    now += shells.STUCK_AFTER + 1
    assert shell.problems() == ["the scheduler's loop has been stuck for 6 s"]
    shell.post(events.GatewayLost(at=now, gateway="g"))
    await until(lambda: shell.problems() == [])
    await cancel(task)
    assert shell.problems() == ["the scheduler's loop has ended"]


async def test_the_heart_beats_without_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle is not stuck."""
    monkeypatch.setattr(shells, "BEAT", 0.005)
    beats = 0

    def clock() -> float:
        nonlocal beats
        beats += 1
        return time.monotonic()

    shell = Shell(Scripted(), lambda _: None, clock=clock)
    task = asyncio.create_task(shell.run())
    await until(lambda: beats > 10)
    await cancel(task)


async def test_a_deadline_in_the_past_does_not_starve_the_others(rig: Rig) -> None:
    """A scheduler that keeps asking for a tick gets one a millisecond."""

    class Insistent(Scripted):
        def next_deadline(self) -> float | None:
            return 0.0

    scheduler = Insistent()
    shell = Shell(scheduler, lambda _: None, clock=time.monotonic)
    task = asyncio.create_task(shell.run())
    await until(lambda: len(scheduler.seen) > 5)
    await cancel(task)


async def test_a_frozen_shell_decides_nothing_more(rig: Rig) -> None:
    """What is queued is dropped, and what comes is not queued."""
    rig.shell.post(rig.lost("late"))
    rig.shell.freeze()
    rig.shell.post(rig.lost("later"))
    await until(lambda: rig.shell.problems() == ["the scheduler's loop has ended"])
    assert rig.scheduler.seen == []


async def test_tasks_are_owned_until_they_end() -> None:
    """A failure is logged and counted; `close` cancels and awaits the rest, also what they start meanwhile."""
    tasks = Tasks()

    async def fail() -> None:
        raise RuntimeError("unforeseen")

    async def stay() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            tasks.start(asyncio.sleep(0), "late")

    with capture_logs() as logs:
        failed = tasks.start(fail(), "failing")
        await asyncio.wait([failed])
        await until(lambda: tasks.failures == 1)
    assert logs[0]["task"] == "failing"
    staying = tasks.start(stay(), "staying")
    await asyncio.sleep(0)
    await tasks.close()
    assert staying.cancelled()
    await cancel(None)
    await cancel(staying)
