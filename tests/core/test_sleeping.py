"""Sleeping and waking as decisions: who sleeps, who is stopped instead, and what a sleeper means for others."""

from __future__ import annotations

import pytest

from modelswap.core import effects, events
from modelswap.core.facts import DeviceFacts
from modelswap.core.states import InstanceState
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
    assert of(out, effects.Sleep) == [effects.Sleep(instance=a, model="a", level=1)]
    assert not of(out, effects.PutOut)
    assert made.state("a") == "draining"
    out = made.slept("a")
    assert made.state("a") == "asleep"
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


# ── sleepers and others ──────────────────────────────────────────────────────────────────────────────────────


def test_a_sleeper_holds_no_capacity() -> None:
    """Beside a sleeper the whole device is free; views show it with its level, and not as use of the device."""
    made = asleep()
    shot = made.scheduler.snapshot(made.now)
    (device,) = shot.devices
    assert (device.used, device.resident, device.asleep) == (1, "b", ("a",))
    assert [(i.model, i.state, i.asleep) for i in shot.instances] == [
        ("a", InstanceState.ASLEEP, 1),
        ("b", InstanceState.READY, 0),
    ]
    assert [m.sleep_level for m in shot.models] == [1, 1, 1]
    assert made.state("a") == "asleep"


def test_a_sleeper_is_dropped_beside_a_resident_model() -> None:
    """Dropping one needs no swap and takes nothing from others; afterwards its model starts cold."""
    made = asleep()
    out = made.drop_sleeper("a")
    assert [(e.model, e.kill) for e in of(out, effects.PutOut)] == [("a", False)]
    assert made.state("a") == "stopping"
    assert made.state("b") == "ready"
    made.go_out("a")
    assert made.state("a") == "absent"
    assert made.scheduler.world.devices["gpu0"].dirty == 0
    assert not of(made.drop_sleeper("b"), effects.PutOut)


def test_a_target_is_dropped_in_the_midst_of_its_swap() -> None:
    """The swap waits until it has gone, has the memory verified, and starts the model cold."""
    made = asleep()
    made.want("a", 3)
    made.after(20)
    made.drop_sleeper("a")
    made.drained("b")
    made.slept("b")
    assert not of(made.released(), effects.BringIn)
    out = made.go_out("a")
    assert of(out, effects.VerifyReleased)
    assert [e.model for e in of(made.released(), effects.BringIn)] == ["a"]


def test_a_sleeper_that_dies() -> None:
    """It is cleared away; that says nothing against the model."""
    made = asleep(crashes_forgiven=0)
    out = made.die("a")
    assert [(e.model, e.kill) for e in of(out, effects.PutOut)] == [("a", True)]
    assert made.scheduler.world.models["a"].backoff is None
    made.go_out("a")
    assert made.state("a") == "absent"


def test_a_sleeper_that_cannot_be_killed() -> None:
    """Its device is stuck for swaps until it has gone; the resident model goes on."""
    made = asleep()
    made.drop_sleeper("a")
    made.want("a", 3)
    out = made.handle(events.PutOutFailed(at=made.now, instance=made.instance("a"), message="it can't be killed"))
    assert [e.code for e in said(out, Refuse)] == ["device_stuck"]
    made.go_out("a")
    assert made.state("b") == "ready"
    assert not said(made.want("a", 4), Refuse)


def test_unloading_a_sleeper() -> None:
    """It is stopped without a swap, and the operator hears when it has gone."""
    made = asleep()
    out = made.unload("a")
    assert [e.model for e in of(out, effects.PutOut)] == ["a"]
    assert [(e.previous, e.mechanism) for e in of(made.go_out("a"), effects.Answer)] == [("a", "stop")]
    assert made.state("b") == "ready"


def test_unloading_a_resident_model_stops_it() -> None:
    """An unload gives all memory back: it never sleeps, whatever its way."""
    made = bench()
    made.reside("a")
    made.unload("a")
    assert of(made.drained("a"), effects.PutOut)


def test_unloading_while_it_falls_asleep() -> None:
    """It is stopped as soon as it sleeps."""
    made = draining(bench())
    made.drained("a")
    made.unload("a")
    assert of(made.slept("a"), effects.PutOut)
    assert of(made.go_out("a"), effects.Answer)


def test_a_config_that_changes_the_sleepers_model() -> None:
    """It could never be woken again, so it is stopped."""
    for models in ((model("a", definition="v2"), model("b")), (model("b"),), (model("a", device=None), model("b"))):
        made = asleep()
        made.configure(*models)
        made.handle(events.Tick(at=made.now))
        assert made.scheduler.world.instances[made.instance("a")].state is InstanceState.STOPPING
        made.go_out("a")


def test_a_new_definition_waits_for_the_sleeper_of_the_old_one() -> None:
    """A model has one instance: the start waits until the old one has gone."""
    made = asleep()
    made.unload("b")
    made.drained("b")
    made.go_out("b")
    made.configure(model("a", definition="v2"), model("b"), model("c"))
    made.want("a", 3)
    assert not of(made.released(), effects.BringIn)
    out = made.go_out("a") + made.released()
    assert [e.definition for e in of(out, effects.BringIn)] == ["v2"]


def test_shutdown_with_sleepers() -> None:
    """Sleepers are stopped at once, the resident model is drained first."""
    made = asleep()
    out = made.handle(events.Shutdown(at=made.now))
    assert [(e.model, e.kill) for e in of(out, effects.PutOut)] == [("a", False)]
    made.go_out("a")
    made.drained("b")
    assert of(made.go_out("b"), effects.Finished)


def test_shutdown_now_with_sleepers() -> None:
    """Nobody is drained, all are killed."""
    made = asleep()
    out = made.handle(events.Shutdown(at=made.now, now=True))
    assert sorted((e.model, e.kill) for e in of(out, effects.PutOut)) == [("a", True), ("b", True)]


def test_a_sleeper_of_an_earlier_orchestrator() -> None:
    """It is adopted asleep, watched, and woken for who asks first; it needs no preparing."""
    made = Bench(model("a", prepare=True), model("b"), begin=False)
    made.handle(
        events.Adopted(at=made.now, instance="a.0.1", model="a", definition="v1", host="h", port=9, slots=4, asleep=2)
    )
    made.handle(events.Begin(at=made.now))
    assert of(made.out, effects.Watch) == [effects.Watch(instance="a.0.1", model="a", asleep=True)]
    made.hello()
    out = made.want("a", 1)
    assert not of(out, effects.Prepare)
    assert of(out, effects.VerifyReleased)
    wakes = of(made.released(), effects.Wake)
    assert wakes == [effects.Wake(instance="a.0.1", model="a", level=2, definition="v1")]
    out = made.wake_fails("a")
    assert of(out, effects.Prepare)
    made.prepared("a")
    assert [e.model for e in of(made.released(), effects.BringIn)] == ["a"]


def test_a_gateway_that_still_uses_an_adopted_sleeper() -> None:
    """Its requests would wait for ever: the sleeper is killed, which ends them."""
    made = Bench(begin=False)
    made.handle(
        events.Adopted(at=made.now, instance="a.0.1", model="a", definition="v1", host="h", port=9, slots=4, asleep=1)
    )
    made.handle(events.Begin(at=made.now, expected=frozenset({"g"})))
    epoch = made.scheduler.world.next_epoch()
    out = made.hello("g", HeldLease(model="a", epoch=epoch, slots=1, in_flight=1))
    assert said(out, Close)
    assert [(e.instance, e.kill) for e in of(out, effects.PutOut)] == [("a.0.1", True)]


def test_two_models_give_way_to_a_large_one() -> None:
    """One sleeps while the other still drains; nothing comes in before both are done."""
    made = Bench(model("a"), model("b"), model("c", demand=2), begin=False)
    made.handle(
        events.Configure(at=made.now, models=made.models, devices=(DeviceFacts("gpu0", 2),), settings=made.settings)
    )
    made.handle(events.Begin(at=made.now))
    made.hello()
    made.sleeps("a")
    made.reside("a")
    made.reside("b", 901)
    made.want("c", 2)
    made.after(20)
    assert of(made.drained("a"), effects.Sleep)
    made.slept("a")
    assert made.state("b") == "draining"
    assert not of(made.out, effects.VerifyReleased)
    made.drained("b")
    out = made.go_out("b")
    assert of(out, effects.VerifyReleased)
    assert [e.model for e in of(made.released(), effects.BringIn)] == ["c"]


def test_what_somebody_else_starts_beside_a_sleeper() -> None:
    """On a device where only sleepers are it is taken up; a second instance of a sleeper's model is not."""
    made = asleep()
    made.unload("b")
    made.drained("b")
    made.go_out("b")
    out = made.appear("a", "second")
    assert [e.reason for e in of(out, effects.TurnAway)] == ["another instance of a is asleep"]
    assert of(made.appear("c", "third"), effects.BringIn)
