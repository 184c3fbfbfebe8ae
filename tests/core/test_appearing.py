"""Engines that somebody else starts."""

from __future__ import annotations

import pytest

from modelswap.core import effects, events
from modelswap.core.facts import DeviceFacts
from modelswap.core.swap import SwapOutcome
from modelswap.protocol.messages import Epoch, HeldLease, Refuse
from tests.core.scheduling import Bench, model, of, said


def turned_away(out: list[effects.Effect]) -> str:
    """The reason why the one engine that appeared is to go."""
    [effect] = of(out, effects.TurnAway)
    return effect.reason


def test_on_a_free_device_it_becomes_resident() -> None:
    """It is waited for like an adopted start, and then open to everybody under its own address."""
    bench = Bench()
    bench.hello()
    [effect] = of(bench.appear("a"), effects.BringIn)
    assert (effect.instance, effect.model, effect.definition, effect.adopted) == ("by-hand", "a", "v1", True)
    assert bench.state("a") == "starting"
    [ended] = of(bench.come_in("a", port=9500), effects.SwapEnded)
    assert (ended.record.target, ended.record.mechanism, ended.record.outcome) == ("a", "cold", SwapOutcome.OK)
    assert bench.opened("a").port == 9500
    assert not of(bench.history, effects.TurnAway)


def test_it_serves_whoever_waits_for_it() -> None:
    """ensure_model is answered, and requests are served, by what somebody started."""
    bench = Bench(model("a", prepare=True))
    bench.hello()
    bench.handle(events.Ensure(at=bench.now, request=4, model="a"))
    bench.appear("a")
    [answer] = of(bench.come_in("a"), effects.Answer)
    assert (answer.request, answer.mechanism, answer.previous) == (4, "cold", None)


def test_its_time_is_no_measure() -> None:
    """How long it took since it was seen says nothing about how long bringing the model in takes."""
    bench = Bench()
    bench.hello()
    bench.appear("a")
    bench.now += 0.1
    bench.come_in("a")
    assert bench.scheduler.snapshot(bench.now).models[0].swap_seconds is None


def test_it_goes_while_another_holds_the_device() -> None:
    """The reason names the holder, which isn't disturbed, and whose next swap still verifies the memory."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    assert turned_away(bench.appear("b")) == "gpu0 is held by a"
    assert bench.state("a") == "ready"
    bench.want("b", 1)
    bench.after(2.1)
    bench.drained("a")
    assert of(bench.go_out("a"), effects.VerifyReleased)


@pytest.mark.parametrize("appears", ["a", "b", "c"])
@pytest.mark.parametrize("phase", ["drain", "out", "release", "in"])
def test_it_goes_while_a_swap_is_under_way(appears: str, phase: str) -> None:
    """Whichever model it is of: the source, the target, or a third one; the swap goes on as if nothing had been."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.want("b", 1)
    bench.after(2.1)
    for name in ("drain", "out", "release", "in"):
        if name == "out":
            bench.drained("a")
        elif name == "release":
            bench.go_out("a")
        elif name == "in":
            bench.released()
        if name == phase:
            assert turned_away(bench.appear(appears)) == "a swap to b is under way on gpu0"
    assert len(of(bench.out, effects.TurnAway)) == 1
    bench.come_in("b")
    assert bench.state("b") == "ready"
    assert len(of(bench.out, effects.BringIn)) == 1


def test_it_goes_while_an_unload_is_under_way() -> None:
    """A device that is being cleared isn't free yet."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.handle(events.Unload(at=bench.now, request=1))
    assert turned_away(bench.appear("b")) == "an unload is under way on gpu0"


def test_unknown_and_outdated_ones_go() -> None:
    """What isn't in the config, or was made from another definition, is nobody's."""
    bench = Bench()
    assert "not in the config" in turned_away(bench.appear("x"))
    assert "another definition" in turned_away(bench.appear("a", definition="v0"))


def test_memory_is_verified_after_one_that_went() -> None:
    """An engine that was turned away from an idle device may have taken memory there: that must be back first."""
    bench = Bench()
    bench.hello()
    bench.appear("a", definition="v0")
    out = bench.want("a", 1)
    assert of(out, effects.VerifyReleased)
    assert not of(out, effects.BringIn)
    assert of(bench.released(), effects.BringIn)


def test_memory_is_verified_again_after_one_that_came_late() -> None:
    """The same when the swap had only gateways left to wait for."""
    bench = Bench()
    bench.hello("g", HeldLease(model="a", epoch=Epoch(0, 1), slots=1, in_flight=0))
    bench.want("b", 1)  # waits until the lease on what is gone has been drained
    assert bench.scheduler.snapshot(bench.now).swaps[0].phase == "release"
    out = bench.appear("a")
    assert turned_away(out)
    assert of(out, effects.VerifyReleased)
    bench.handle(events.GatewayLost(at=bench.now, gateway="g"))
    bench.after(10.0)
    bench.hello()
    bench.want("b", 2)
    assert not of(bench.out, effects.BringIn)
    assert of(bench.released(), effects.BringIn)


def test_unverified_memory_does_not_matter_to_what_runs_already() -> None:
    """On a device that nobody holds but whose memory hasn't been seen to be back it stays; the next start verifies."""
    bench = Bench(begin=False)
    bench.handle(events.Begin(at=bench.now))
    bench.hello()
    assert bench.scheduler.world.devices["gpu0"].dirty == 1
    assert of(bench.appear("a"), effects.BringIn)
    bench.come_in("a")
    bench.usage("a", 0)
    bench.want("b", 1)
    bench.after(2.1)
    bench.drained("a")
    assert of(bench.go_out("a"), effects.VerifyReleased)
    assert of(bench.released(), effects.BringIn)


def test_a_shared_device_has_room_for_what_fits() -> None:
    """On a device of two places a second engine stays, a third goes, and unverified memory stays unverified."""
    bench = Bench(begin=False)
    models = tuple(model(name) for name in "abc")
    bench.handle(
        events.Configure(at=bench.now, models=models, devices=(DeviceFacts("gpu0", 2),), settings=bench.settings)
    )
    bench.handle(events.Begin(at=bench.now))
    bench.hello()
    bench.appear("a", "a-by-hand")
    bench.come_in("a")
    assert bench.scheduler.world.devices["gpu0"].dirty == 1
    bench.appear("b", "b-by-hand")
    bench.come_in("b")
    assert turned_away(bench.appear("c", "c-by-hand")) == "gpu0 is held by a, b"


def test_a_model_that_failed_is_cleared() -> None:
    """Whoever starts a model by hand knows better than its backoff."""
    bench = Bench(backoff_first=100.0)
    bench.hello()
    bench.want("a", 1)
    bench.fail("a", permanent=True)
    assert bench.state("a") == "failed"
    assert of(bench.appear("a"), effects.BringIn)
    assert not said(bench.want("a", 2), Refuse)
    bench.come_in("a")
    assert bench.state("a") == "ready"


def test_failing_after_all() -> None:
    """What was started by hand and isn't healthy ends like any start that failed."""
    bench = Bench()
    bench.hello()
    bench.appear("a")
    bench.want("a", 1)
    assert said(bench.fail("a"), Refuse)
    assert bench.state("a") == "failed"


def test_a_second_instance_of_what_runs_goes() -> None:
    """A model has one instance; and hearing twice of the same one changes nothing."""
    bench = Bench()
    bench.hello()
    bench.appear("a")
    assert not of(bench.appear("a"), effects.TurnAway)
    assert turned_away(bench.appear("a", "other")) == "a swap to a is under way on gpu0"
    bench.come_in("a")
    assert turned_away(bench.appear("a", "another")) == "another instance of a is ready"


def test_started_again_by_hand_it_stays() -> None:
    """`docker restart` of the resident model: the old start is cleared away, then the new one is taken up."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.want("a", 1)
    bench.handle(events.Died(at=bench.now, instance=bench.instance("a"), message="exited"))
    out = bench.appear("a")
    assert not of(out, effects.TurnAway)
    assert not of(out, effects.BringIn)
    bench.go_out("a")
    out = bench.drained("a")
    assert [(e.instance, e.adopted) for e in of(out, effects.BringIn)] == [("by-hand", True)]
    bench.come_in("a")
    assert bench.state("a") == "ready"


def test_started_again_by_hand_while_the_old_one_cannot_be_killed() -> None:
    """A stuck device is not free, and nobody waits for that to change."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    old = bench.instance("a")
    bench.handle(events.Died(at=bench.now, instance=old, message="hangs"))
    bench.appear("a")
    out = bench.handle(events.PutOutFailed(at=bench.now, instance=old, message="can't be killed"))
    assert turned_away(out) == "another instance of a is stopping"


def test_before_decisions_begin_it_is_remembered() -> None:
    """Only when it is known what runs, it is decided who stays: the adopted one, or else the one that appeared."""
    for adopted in (True, False):
        bench = Bench(begin=False)
        if adopted:
            bench.handle(
                events.Adopted(
                    at=bench.now, instance="a.0.5", model="a", definition="v1", host="127.0.0.1", port=9, slots=4
                )
            )
        bench.appear("b")
        assert not of(bench.out, effects.TurnAway)
        assert not of(bench.out, effects.BringIn)
        bench.handle(events.Begin(at=bench.now))
        if adopted:
            assert turned_away(bench.out) == "gpu0 is held by a"
        else:
            assert [e.instance for e in of(bench.out, effects.BringIn)] == ["by-hand"]


def test_of_two_before_decisions_begin_the_first_stays() -> None:
    """Of two that were started by hand, the later one finds the device taken."""
    bench = Bench(begin=False)
    bench.appear("a", "first")
    bench.appear("b", "second")
    bench.handle(events.Begin(at=bench.now))
    assert [e.instance for e in of(bench.out, effects.BringIn)] == ["first"]
    assert [e.instance for e in of(bench.out, effects.TurnAway)] == ["second"]


def test_models_without_device_have_their_own_place() -> None:
    """A model that runs beside the others is taken up whoever holds the device."""
    bench = Bench(model("a"), model("e", device=None))
    bench.hello()
    bench.reside("a")
    assert of(bench.appear("e"), effects.BringIn)
    bench.come_in("e")
    assert turned_away(bench.appear("e", "other")) == "another instance of e is ready"


def test_during_a_shutdown_it_goes() -> None:
    """A shutdown stops everything, also what is started meanwhile; what was taken up is put out."""
    bench = Bench()
    bench.hello()
    bench.appear("a")
    out = bench.handle(events.Shutdown(at=bench.now))
    assert [e.instance for e in of(out, effects.PutOut)] == ["by-hand"]
    assert turned_away(bench.appear("b", "late")) == "modelswap is shutting down"
    assert of(bench.go_out("a"), effects.Finished)


def test_it_can_be_unloaded_and_swapped_out() -> None:
    """Once in, it is like any other: drained, stopped, its memory verified."""
    bench = Bench()
    bench.hello()
    bench.appear("a")
    bench.come_in("a")
    bench.handle(events.Unload(at=bench.now, request=1, model="a"))
    bench.drained("a")
    assert of(bench.go_out("a"), effects.Answer)
    assert bench.scheduler.world.devices["gpu0"].dirty == 1


def test_a_model_that_the_config_has_moved() -> None:
    """It belongs to the device that the config names now."""
    bench = Bench()
    bench.hello()
    bench.reside("b")
    devices = (DeviceFacts("gpu0"), DeviceFacts("gpu1"))
    models = (model("b"), model("a", device="gpu1"))
    bench.handle(events.Configure(at=bench.now, models=models, devices=devices, settings=bench.settings))
    assert of(bench.appear("a"), effects.BringIn)
