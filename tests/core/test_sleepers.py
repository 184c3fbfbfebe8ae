"""What a sleeper means for others, and what ends its sleep other than waking."""

from __future__ import annotations

from modelswap.core import effects, events
from modelswap.core.facts import DeviceFacts
from modelswap.core.states import InstanceState
from modelswap.protocol.messages import Close, HeldLease, Refuse
from tests.core.scheduling import Bench, model, of, said


def asleep(**settings: float) -> Bench:
    """a sleeps, b is resident and idle; all models sleep."""
    made = Bench(**settings)  # type: ignore[arg-type]
    made.hello()
    made.sleeps("b", "c")
    made.lull("a", "b")
    return made


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
    assert made.state("b") == "ready"
    made.unload("b")
    made.drained("b")
    made.go_out("b")
    assert said(made.want("c", 4), Refuse)
    made.go_out("a")
    assert not said(made.want("c", 5), Refuse)


def test_unloading_a_sleeper() -> None:
    """It is stopped without a swap, and the operator hears when it has gone."""
    made = asleep()
    out = made.unload("a")
    assert [e.model for e in of(out, effects.PutOut)] == ["a"]
    assert [(e.previous, e.mechanism) for e in of(made.go_out("a"), effects.Answer)] == [("a", "stop")]
    assert made.state("b") == "ready"


def test_unloading_a_resident_model_stops_it() -> None:
    """An unload gives all memory back: it never sleeps, whatever its way."""
    made = asleep()
    made.unload("b")
    assert of(made.drained("b"), effects.PutOut)


def test_unloading_while_it_falls_asleep() -> None:
    """It is stopped as soon as it sleeps."""
    made = asleep()
    made.want("c", 3)
    made.after(20)
    made.drained("b")
    made.unload("b")
    assert of(made.slept("b"), effects.PutOut)
    assert of(made.go_out("b"), effects.Answer)


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
