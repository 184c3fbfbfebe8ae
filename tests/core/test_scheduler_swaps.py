"""The swap transaction as the scheduler decides it."""

from __future__ import annotations

import pytest

from modelswap.core import effects, events
from modelswap.core.states import ForbiddenTransitionError, InstanceState
from modelswap.core.swap import SwapOutcome
from modelswap.core.world import ModelRecord, World
from modelswap.protocol.errors import Code
from modelswap.protocol.messages import Catalog, Close, Contended, Drained, Forget, Open, Progress, Refuse
from tests.core.scheduling import Bench, model, of, said


def test_first_request_brings_model_in() -> None:
    """The first request for a model starts it at once, and its lease is opened when it is healthy."""
    bench = Bench()
    bench.hello()
    [started] = of(bench.want("a", 1), effects.BringIn)
    assert started.model == "a"
    assert not started.adopted
    [opened] = said(bench.come_in("a", slots=4, port=9001), Open)
    assert (opened.model, opened.port, opened.slots) == ("a", 9001, 4)


def test_waiters_are_coalesced() -> None:
    """Many requests for one model cause one start."""
    bench = Bench()
    bench.hello()
    for ticket in range(20):
        bench.want("a", ticket)
    assert len(of(bench.out, effects.BringIn)) == 1


def test_swap_goes_through_every_phase_in_order() -> None:
    """Close, drained, put out, memory verified, brought in, opened: each waits for the one before."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.want("b", 1)
    assert [c.model for c in said(bench.after(2.1), Close)] == ["a"]
    assert bench.state("a") == "draining"
    assert [e.model for e in of(bench.drained("a"), effects.PutOut)] == ["a"]
    assert [e.model for e in of(bench.go_out("a"), effects.VerifyReleased)] == ["b"]
    assert [e.model for e in of(bench.released(), effects.BringIn)] == ["b"]
    out = bench.come_in("b")
    assert [o.model for o in said(out, Open)] == ["b"]
    [ended] = of(out, effects.SwapEnded)
    assert (ended.record.source, ended.record.target, ended.record.outcome) == ("a", "b", SwapOutcome.OK)
    assert set(ended.record.phases) == {"drain", "out", "release", "in"}


def test_nothing_starts_before_memory_is_verified() -> None:
    """As long as the device hasn't given the memory back, nothing is started."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.want("b", 1)
    bench.after(2.1)
    bench.drained("a")
    bench.go_out("a")
    bench.out.clear()
    bench.after(100)
    assert not of(bench.out, effects.BringIn)


def test_floor_is_served_before_leaving() -> None:
    """What waited when a model came in is served before it can be put out."""
    bench = Bench(max_wait=0.0, min_residency=0.0, linger=0.0)
    bench.hello()
    bench.want("a", 1)
    bench.want("a", 2)
    bench.want("b", 3)
    bench.come_in("a")
    bench.admit(1, "a")
    assert bench.state("a") == "ready"
    bench.admit(2, "a")
    assert bench.state("a") == "draining"


def test_later_arrivals_do_not_raise_the_floor() -> None:
    """Requests that came after the opening don't keep a model in."""
    bench = Bench(max_wait=0.0, min_residency=0.0)
    bench.hello()
    bench.want("a", 1)
    bench.come_in("a", slots=1)
    bench.admit(1, "a")
    bench.want("a", 2)
    bench.want("b", 3)
    assert bench.state("a") == "draining"


def test_contention_is_told() -> None:
    """Gateways hear that others wait, and that they don't any more."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    assert [c.contended for c in said(bench.want("b", 1), Contended)] == [True]
    assert [c.contended for c in said(bench.say(Forget(ticket=1)), Contended)] == [False]


def test_idle_is_not_believed_before_a_fresh_report() -> None:
    """An idleness reported before contention was told doesn't count until it is confirmed."""
    bench = Bench()
    bench.answering = False
    bench.hello()
    bench.reside("a")
    bench.after(5)
    bench.want("b", 1)
    assert bench.state("a") == "ready"
    bench.usage("a", 0, idle=5)
    assert bench.state("a") == "draining"


def test_swap_is_cancelled_when_last_waiter_leaves_before_anything_stopped() -> None:
    """While the old model drains, the last waiter's leaving opens the old one again, under a new epoch."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    old = bench.epoch("a")
    bench.want("b", 1)
    bench.after(2.1)
    assert bench.state("a") == "draining"
    out = bench.say(Forget(ticket=1))
    assert bench.state("a") == "ready"
    assert said(out, Open)[0].epoch > old
    assert of(out, effects.SwapEnded)[0].record.outcome is SwapOutcome.CANCELLED


def test_swap_goes_on_for_another_waiter() -> None:
    """When the target's last waiter leaves but another model is waited for, the swap goes to that one."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.want("b", 1)
    bench.want("c", 2)
    bench.after(2.1)
    bench.say(Forget(ticket=1))
    bench.drained("a")
    bench.go_out("a")
    assert [e.model for e in of(bench.released(), effects.BringIn)] == ["c"]


def test_load_is_not_aborted_when_waiters_leave() -> None:
    """A load that holds the device goes on without waiters, and the model becomes resident."""
    bench = Bench()
    bench.hello()
    bench.want("a", 1)
    out = bench.say(Forget(ticket=1))
    assert not of(out, effects.PutOut)
    bench.come_in("a")
    assert bench.state("a") == "ready"


def test_oldest_waiter_is_next() -> None:
    """Of two contenders the one whose oldest request waits longest comes in."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.want("b", 1, age=1.0)
    bench.want("c", 2, age=5.0)
    bench.after(2.1)
    bench.drained("a")
    bench.go_out("a")
    assert [e.model for e in of(bench.released(), effects.BringIn)] == ["c"]


def test_priority_counts_as_waiting() -> None:
    """A step of priority goes before a longer wait of up to priority_boost, and not beyond: nobody starves."""
    for age, first in ((20.0, "c"), (40.0, "b")):
        bench = Bench(priority_boost=30.0)
        bench.hello()
        bench.reside("a")
        bench.want("b", 1, age=age)
        bench.want("c", 2, priority=1)
        bench.after(2.1)
        bench.drained("a")
        bench.go_out("a")
        assert [e.model for e in of(bench.released(), effects.BringIn)] == [first]


def test_failed_start_refuses_waiters_and_backs_off() -> None:
    """Waiters of a model that won't start get the reason and a time to come back; the model isn't tried before."""
    bench = Bench(backoff_first=2.0)
    bench.hello()
    bench.want("a", 1)
    [refused] = said(bench.fail("a", message="CUDA out of memory\nlog"), Refuse)
    assert (refused.ticket, refused.status, refused.code) == (1, 503, "model_start_failed")
    assert "CUDA out of memory" in refused.message
    assert refused.retry_after_ms == 2000
    [again] = said(bench.want("a", 2), Refuse)
    assert again.code == "model_start_failed"
    bench.after(2.0)
    bench.want("a", 3)
    bench.released()
    assert bench.state("a") == "starting"


def test_backoff_doubles_and_resets() -> None:
    """Each failure in a row doubles the pause; a success ends the row."""
    bench = Bench(backoff_first=2.0, backoff_longest=5.0)
    bench.hello()
    pauses = []
    for ticket in range(3):
        bench.want("a", ticket)
        bench.released()
        [refused] = said(bench.fail("a"), Refuse)
        assert refused.retry_after_ms is not None
        pauses.append(refused.retry_after_ms)
        bench.after(refused.retry_after_ms / 1000)
    assert pauses == [2000, 4000, 5000]
    bench.want("a", 10)
    bench.released()
    bench.come_in("a")
    bench.admit(10, "a")
    bench.handle(events.Unload(at=bench.now, request=1))
    bench.drained("a")
    bench.go_out("a")
    bench.want("a", 11)
    bench.released()
    assert said(bench.fail("a"), Refuse)[0].retry_after_ms == 2000


def test_permanent_failure_says_not_to_retry() -> None:
    """While a model backs off for a permanent cause, clients are told not to retry by themselves."""
    bench = Bench()
    bench.hello()
    bench.want("a", 1)
    [refused] = said(bench.fail("a", permanent=True), Refuse)
    assert refused.should_retry is False
    assert said(bench.want("a", 2), Refuse)[0].should_retry is False


def test_failed_start_brings_back_whoever_has_waiters() -> None:
    """After a failed start the device is cleaned and the next model with waiters comes in."""
    bench = Bench()
    bench.hello()
    bench.want("a", 1)
    bench.want("b", 2)
    out = bench.fail("a")
    assert of(out, effects.VerifyReleased)
    assert [e.model for e in of(bench.released(), effects.BringIn)] == ["b"]


def test_death_keeps_waiters_and_restarts() -> None:
    """An engine that dies is cleared away and started again for its waiters, once its leases have drained."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.want("a", 1)
    out = bench.handle(events.Died(at=bench.now, instance=bench.instance("a"), message="killed by signal 9"))
    assert of(out, effects.PutOut)[0].kill
    epoch = said(out, Close)[0].epoch
    bench.go_out("a")
    assert bench.state("a") == "stopping"
    bench.say(Drained(model="a", epoch=epoch))
    assert [e.model for e in of(bench.released(), effects.BringIn)] == ["a"]


def test_crash_loop_backs_off() -> None:
    """A model that keeps dying right after it came in is left alone for a while, after three forgiven times."""
    bench = Bench()
    bench.hello()
    outcomes = []
    for ticket in range(4):
        bench.want("a", ticket)
        bench.released()
        bench.come_in("a")
        bench.admit(ticket, "a")
        bench.want("a", 100 + ticket)
        out = bench.handle(events.Died(at=bench.now, instance=bench.instance("a"), message="segfault"))
        outcomes.append(len(said(out, Refuse)))
        bench.say(Drained(model="a", epoch=said(out, Close)[0].epoch))
        bench.go_out("a")
        bench.say(Forget(ticket=100 + ticket))
        bench.released()
        if bench.state("a") == "starting":
            bench.come_in("a")
            out = bench.handle(events.Unload(at=bench.now, request=ticket))
            bench.drained("a")
            bench.go_out("a")
    assert outcomes == [0, 0, 0, 1]


def test_stuck_device_answers_everybody() -> None:
    """If a process can't be killed, waiters are told at once, later ones too, until it has gone after all."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.want("b", 1)
    bench.after(2.1)
    bench.drained("a")
    out = bench.handle(events.PutOutFailed(at=bench.now, instance=bench.instance("a"), message="PID 7 won't die"))
    assert [r.code for r in said(out, Refuse)] == ["device_stuck"]
    assert [r.code for r in said(bench.want("c", 2), Refuse)] == ["device_stuck"]
    bench.go_out("a")
    bench.released()
    bench.want("c", 3)
    bench.released()
    assert bench.state("c") == "starting"


def test_unreleased_memory_answers_and_goes_on_later() -> None:
    """If memory doesn't come back, waiters hear who holds it; when it does, swaps go on."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.want("b", 1)
    bench.after(2.1)
    bench.drained("a")
    bench.go_out("a")
    out = bench.handle(events.ReleaseFailed(at=bench.now, device="gpu0", message="PID 4121, python, 3.2 GiB, not ours"))
    [refused] = said(out, Refuse)
    assert (refused.code, refused.status) == ("memory_not_released", 503)
    assert "4121" in refused.message
    assert said(bench.want("b", 2), Refuse)
    bench.released()
    assert not said(bench.want("b", 3), Refuse)
    assert bench.state("b") == "starting"


def test_drain_waits_by_default_and_aborts_if_told() -> None:
    """Past drain_timeout a running request is waited for, or ended, as configured."""
    for abort, closes in ((False, 1), (True, 2)):
        bench = Bench(drain_timeout=5.0, abort_on_drain_timeout=abort)
        bench.hello()
        bench.want("a", 1)
        bench.come_in("a")
        bench.admit(1, "a")
        bench.handle(events.Ensure(at=bench.now, request=1, model="b"))
        bench.hello("other")
        bench.now += 5.0
        bench.handle(events.Tick(at=bench.now))
        told = said(bench.out, Close)
        assert len(told) == closes
        assert told[-1].abort is abort


def test_models_without_device_run_beside() -> None:
    """A model that needs no device comes in beside the resident one, and neither puts the other out."""
    bench = Bench(model("a"), model("embedder", device=None))
    bench.hello()
    bench.reside("a")
    [started] = of(bench.want("embedder", 1), effects.BringIn)
    assert started.model == "embedder"
    bench.come_in("embedder", port=9005)
    bench.after(200)
    assert bench.state("a") == bench.state("embedder") == "ready"
    assert not of(bench.history, effects.VerifyReleased)


def test_progress_is_told_while_waiting() -> None:
    """Who waits hears of stages as they come, and regularly between them."""
    bench = Bench(progress_interval=2.0)
    bench.hello()
    [first] = said(bench.want("a", 1), Progress)
    assert first.stage == "loading"
    bench.handle(events.BringInStage(at=bench.now, instance=bench.instance("a"), stage="warming up", fraction=0.5))
    told = said(bench.after(2.0), Progress)
    assert [(p.stage, p.fraction) for p in told] == [("warming up", 0.5)]


def test_catalog_follows_states() -> None:
    """Gateways hear of every change of a model's state."""
    bench = Bench()
    bench.hello()
    [catalog] = said(bench.want("a", 1), Catalog)
    assert {m.name: m.state for m in catalog.models} == {"a": "starting", "b": "absent", "c": "absent"}


def test_forbidden_transition_tells_the_story() -> None:
    """A transition that isn't in the table raises with the instance's past."""
    world = World(generation=1)
    record = ModelRecord(facts=model("a"), device="gpu0")
    instance = world.add_instance(record, "a.1.1")
    world.transition(instance, InstanceState.STARTING, "wanted")
    with pytest.raises(ForbiddenTransitionError, match=r"absent -> starting \(wanted\)"):
        world.transition(instance, InstanceState.DRAINING, "oops")


def test_queue_is_bounded() -> None:
    """One request too many, or too many bytes, is refused at once with a time to come back."""
    bench = Bench(queue_requests=2, queue_bytes=100)
    bench.hello()
    bench.want("a", 1, size=60)
    [refused] = said(bench.want("a", 2, size=60), Refuse)
    assert refused.code == "queue_full"
    assert refused.retry_after_ms is not None
    assert not said(bench.want("a", 3, size=1), Refuse)
    assert [r.code for r in said(bench.want("b", 4), Refuse)] == ["queue_full"]


def test_unknown_model_is_refused_with_names() -> None:
    """A model that isn't configured is refused with the names there are."""
    bench = Bench()
    bench.hello()
    [refused] = said(bench.want("nope", 1), Refuse)
    assert refused.status == 404
    assert "a, b, c" in refused.message


def test_late_reports_change_nothing() -> None:
    """Reports about instances that are gone, or in another state, are ignored."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    for event in (
        events.BroughtIn(at=bench.now, instance="old", host="h", port=1, slots=1),
        events.BringInFailed(at=bench.now, instance="old", code=Code.INTERNAL, message=""),
        events.Died(at=bench.now, instance="old", message=""),
        events.PutOut(at=bench.now, instance=bench.instance("a")),
        events.PutOutFailed(at=bench.now, instance="old", message=""),
        events.Probed(at=bench.now, instance="old", healthy=False),
        events.BringInStage(at=bench.now, instance="old", stage=""),
        events.Released(at=bench.now, device="gpu7"),
        events.ReleaseFailed(at=bench.now, device="gpu7", message=""),
    ):
        bench.handle(event)
    assert bench.state("a") == "ready"


def test_blameless_start_is_repeated() -> None:
    """A start that failed by chance is repeated for the same waiters; if it fails again and again, they are told."""
    bench = Bench(mishaps_forgiven=1)
    bench.hello()
    bench.want("a", 1)
    out = bench.fail("a", blameless=True)
    assert not said(out, Refuse)
    assert [e.model for e in of(bench.released(), effects.BringIn)] == ["a"]
    assert [r.ticket for r in said(bench.fail("a", blameless=True), Refuse)] == [1]


def test_failed_start_that_cannot_be_killed_answers_everybody() -> None:
    """If a failed start can't be cleared away, its waiters are told at once; when it has gone, swaps go on."""
    bench = Bench()
    bench.hello()
    bench.want("a", 1)
    out = bench.handle(events.PutOutFailed(at=bench.now, instance=bench.instance("a"), message="PID 7 won't die"))
    assert [r.code for r in said(out, Refuse)] == ["device_stuck"]
    assert said(bench.want("b", 2), Refuse)
    bench.fail("a")
    bench.want("b", 3)
    bench.released()
    assert bench.state("b") == "starting"
