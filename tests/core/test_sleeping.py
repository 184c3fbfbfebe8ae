"""Sleeping and waking as decisions: who sleeps, who is stopped instead, and what a sleeper means for others."""

from __future__ import annotations

import pytest

from modelswap.core import effects, events
from modelswap.core.swap import SwapOutcome
from modelswap.protocol.messages import Close, Drained, HeldLease, Open, Progress, Refuse
from tests.core.scheduling import Bench, model, of, said


def bench(*names: str, **settings: float) -> Bench:
    """A bench with a gateway whose models, a, b and c, sleep (or only those named)."""
    made = Bench(**settings)  # type: ignore[arg-type]
    made.hello()
    made.sleeps(*(names or "abc"))
    return made


def draining(made: Bench, name: str = "a", other: str = "b") -> Bench:
    """``name`` is resident and drains for ``other``, whose request has ticket 2."""
    made.reside(name)
    made.want(other, 2)
    made.after(5)
    assert made.state(name) == "draining"
    made.out.clear()
    return made


# ── falling asleep ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_drained_model_sleeps_instead_of_being_stopped() -> None:
    """It still drains while it falls asleep; asleep, its memory is verified before the next model starts."""
    made = draining(bench())
    a = made.instance("a")
    out = made.drained("a")
    assert of(out, effects.Sleep) == [effects.Sleep(instance=a, model="a", level=1, target="b")]
    assert not of(out, effects.PutOut)
    assert made.state("a") == "draining"
    out = made.slept("a")
    assert made.state("a") == "asleep"
    assert [(e.after, e.asleep) for e in of(out, effects.Transitioned)] == [("asleep", 1)]
    assert of(out, effects.Watch) == [effects.Watch(instance=a, model="a", asleep=True)]
    assert [e.holders for e in of(out, effects.VerifyReleased)] == [(a,)]
    assert not of(out, effects.BringIn)
    assert [e.model for e in of(made.released(), effects.BringIn)] == ["b"]
    record = of(made.come_in("b"), effects.SwapEnded)[0].record
    assert (record.mechanism, record.out, record.source, record.target) == ("cold", "sleep", "a", "b")


def test_how_a_model_came_in() -> None:
    """Who asked for a model, and the swap's record, are told whether it came in by a standby."""
    made = bench("c")
    made.ensure("a", 7)
    report = events.BroughtIn(at=made.now, instance=made.instance("a"), host="h", port=1, slots=1, mechanism="standby")
    out = made.handle(report)
    assert [e.mechanism for e in of(out, effects.Answer)] == ["standby"]
    assert [(e.record.mechanism, e.record.out) for e in of(out, effects.SwapEnded)] == [("standby", "")]


def test_a_way_holds_for_one_definition() -> None:
    """A changed definition is stopped until it is said to sleep, too; what is said of an old one is ignored."""
    made = draining(bench("a"))
    made.drained("a")
    made.slept("a")
    made.configure(model("a", definition="v2"), model("b"), model("c"))
    made.sleeps("a")
    assert made.scheduler.world.models["a"].way == 0
    made.handle(events.Ways(at=made.now, model="a", definition="v2", level=2))
    made.handle(events.Ways(at=made.now, model="nobody", definition="v2", level=2))
    made.configure(model("a", definition="v2", slots=2), model("b"), model("c"))
    assert made.scheduler.world.models["a"].way == 2


def test_the_way_out_can_be_changed_until_it_has_drained() -> None:
    """What was said last decides."""
    made = draining(bench())
    made.sleeps("a", level=0)
    assert of(made.drained("a"), effects.PutOut)


@pytest.mark.parametrize("broken", [False, True])
def test_a_gateway_that_was_lost_may_still_use_it(broken: bool) -> None:
    """Stop, never sleep, once a gateway with a lease was lost or silent; it may still send requests."""
    made = bench()
    made.hello("h")
    made.reside("a")
    if broken:
        for _ in range(11):
            made.now += 1
            made.usage("a", 0)
    else:
        made.handle(events.GatewayLost(at=made.now, gateway="h"))
    made.after(30)
    made.want("b", 2)
    made.after(5)
    out = made.drained("a")
    assert not of(out, effects.Sleep)
    assert of(out, effects.PutOut)


def test_a_gateway_that_is_back_has_said_what_it_holds() -> None:
    """After its hello a lost gateway is no reason to stop any more; its lease drains like any other."""
    made = bench()
    made.hello("h")
    made.reside("a")
    made.handle(events.GatewayLost(at=made.now, gateway="h"))
    made.hello("h")
    made.usage("a", 0, "h")
    made.want("b", 2)
    made.after(5)
    assert not of(made.drained("a"), effects.Sleep)
    assert of(made.drained("a", "h"), effects.Sleep)


def test_a_gateway_that_nobody_has_heard_of_since_a_restart() -> None:
    """What was adopted is stopped if a gateway of the journal never came back; else it sleeps."""
    for missing in (True, False):
        made = Bench(begin=False)
        made.handle(
            events.Adopted(at=made.now, instance="a.0.1", model="a", definition="v1", host="127.0.0.1", port=9, slots=4)
        )
        made.handle(events.Begin(at=made.now, expected=frozenset({"g", "h"} if missing else {"g"})))
        made.hello()
        made.after(15)
        made.sleeps("a")
        made.want("b", 2)
        made.after(5)
        out = made.drained("a")
        assert bool(of(out, effects.PutOut)) is missing
        assert bool(of(out, effects.Sleep)) is not missing


def test_a_doubtful_gateway() -> None:
    """While any gateway may use leases that nobody knows of, nothing is put to sleep."""
    made = draining(bench())
    made.hello("h")
    made.scheduler.world.doubtful["x"] = made.now + 100
    assert of(made.drained("a"), effects.PutOut)


def test_sleep_that_fails() -> None:
    """An engine that won't sleep is killed; the swap goes on when it has gone."""
    made = draining(bench())
    made.drained("a")
    out = made.sleep_fails("a")
    assert [(e.model, e.kill) for e in of(out, effects.PutOut)] == [("a", True)]
    assert made.state("a") == "stopping"
    assert not of(made.slept("a"), effects.Transitioned)
    made.go_out("a")
    assert of(made.released(), effects.BringIn)
    assert of(made.come_in("b"), effects.SwapEnded)[0].record.out == "stop"


def test_dying_while_it_falls_asleep() -> None:
    """It is cleared away like any engine that died; reports about its sleep come too late."""
    made = draining(bench())
    made.drained("a")
    assert [e.kill for e in of(made.die("a"), effects.PutOut)] == [True]
    assert not of(made.sleep_fails("a"), effects.PutOut)
    made.go_out("a")
    assert of(made.released(), effects.BringIn)


def test_it_cannot_be_opened_again_while_it_falls_asleep() -> None:
    """Once it has been told to sleep the swap goes on, also when nobody waits for the other any more."""
    made = draining(bench())
    made.drained("a")
    made.handle(events.GatewayLost(at=made.now, gateway="g"))
    assert made.state("a") == "draining"
    out = made.slept("a")
    made.after(20)
    made.released()
    assert made.state("a") == "asleep"
    assert not of(out, effects.BringIn)


@pytest.mark.parametrize("now", [False, True])
def test_shutdown_while_it_falls_asleep(now: bool) -> None:
    """A shutdown stops what falls asleep: at once, or as soon as it sleeps."""
    made = draining(bench())
    made.drained("a")
    out = made.handle(events.Shutdown(at=made.now, now=now))
    assert bool(of(out, effects.PutOut)) is now
    made.slept("a")
    assert made.state("a") == "stopping"
    assert of(made.go_out("a"), effects.Finished)


# ── waking ───────────────────────────────────────────────────────────────────────────────────────────────────


def asleep(*names: str, **settings: float) -> Bench:
    """a sleeps, b is resident and idle; a is then asked for with ticket 3, until b is about to fall asleep."""
    made = bench(*names, **settings)
    made.lull("a", "b")
    return made


def waking(*names: str, **settings: float) -> Bench:
    """a is being woken for ticket 3; b sleeps."""
    made = asleep(*names, **settings)
    made.want("a", 3)
    made.after(20)
    made.drained("b")
    made.slept("b")
    made.released()
    assert made.state("a") == "waking"
    return made


def test_a_sleeper_is_woken_after_its_memory_was_verified() -> None:
    """The other sleeps first, then its memory is verified, then the same instance wakes and serves."""
    made = asleep()
    a, b = made.instance("a"), made.instance("b")
    made.want("a", 3)
    made.after(20)
    made.drained("b")
    out = made.slept("b")
    assert not of(out, effects.Wake)
    assert [sorted(e.holders) for e in of(out, effects.VerifyReleased)] == [sorted((a, b))]
    out = made.released()
    assert of(out, effects.Wake) == [effects.Wake(instance=a, model="a", level=1, definition="v1")]
    assert not of(out, effects.BringIn)
    out = made.wake("a")
    assert said(out, Open)[0].model == "a"
    assert of(out, effects.Watch) == [effects.Watch(instance=a, model="a")]
    record = of(out, effects.SwapEnded)[0].record
    assert (record.mechanism, record.out, record.outcome) == ("wake", "sleep", SwapOutcome.OK)
    assert made.instance("a") == a


def test_an_operator_is_told_that_it_was_woken() -> None:
    """The answer to `Ensure` names the mechanism."""
    made = asleep()
    made.ensure("a", 7)
    made.drained("b")
    made.slept("b")
    made.released()
    answers = of(made.wake("a"), effects.Answer)
    assert [(e.mechanism, e.previous) for e in answers] == [("wake", "b")]


def test_waking_that_fails_is_followed_by_a_start() -> None:
    """Its waiters are kept, nothing backs off, and the next try is cold."""
    made = waking()
    out = made.wake_fails("a")
    assert not said(out, Refuse)
    assert of(out, effects.SwapEnded)[0].record.outcome is SwapOutcome.FAILED
    assert made.scheduler.world.models["a"].backoff is None
    assert of(out, effects.VerifyReleased)
    assert [e.model for e in of(made.released(), effects.BringIn)] == ["a"]
    assert said(made.come_in("a"), Open)


def test_a_start_that_fails_counts_as_failed_wake_while_waking() -> None:
    """A shell that reports a failed wake as a failed start loses no waiter."""
    made = waking()
    assert not said(made.fail("a"), Refuse)
    assert of(made.released(), effects.BringIn)


def test_wakes_that_keep_failing_end_the_sleeping() -> None:
    """After a few in a row the model is stopped instead, until it is said to sleep again."""
    made = waking(wakes_forgiven=0)
    made.wake_fails("a")
    assert made.scheduler.world.models["a"].way == 0
    made.sleeps("a")
    assert made.scheduler.world.models["a"].way == 1


def test_progress_of_waking() -> None:
    """Who waits hears that it is being woken, and how far that is."""
    made = waking()
    report = events.BringInStage(at=made.now, instance=made.instance("a"), stage="waking", fraction=0.5)
    made.handle(report)
    assert ("waking", 0.5) in [(e.stage, e.fraction) for e in said(made.after(5), Progress)]


def test_shutdown_while_waking() -> None:
    """It is cancelled, and both are stopped."""
    made = waking()
    out = made.handle(events.Shutdown(at=made.now))
    assert sorted(e.model for e in of(out, effects.PutOut)) == ["a", "b"]
    made.go_out("a")
    assert of(made.go_out("b"), effects.Finished)


def test_a_gateway_with_a_lease_from_before_comes_while_waking() -> None:
    """It is told to close it; nothing new starts before it has."""
    made = waking()
    epoch = made.epoch("a")
    out = made.hello("h", HeldLease(model="a", epoch=epoch, slots=1, in_flight=1))
    assert [e.epoch for e in said(out, Close, "h")] == [epoch]
    assert ("h", epoch) in made.scheduler.world.fences
    made.wake("a")
    assert made.state("a") == "ready"
    made.say(Drained(model="a", epoch=epoch), "h")
    assert not made.scheduler.world.fences
