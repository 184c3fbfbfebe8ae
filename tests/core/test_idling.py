"""What happens when nobody asks (time to live, preload), and what pinned models keep others from."""

from __future__ import annotations

from typing import Literal

import pytest

from modelswap.core import effects, events
from modelswap.core.facts import DeviceFacts, ModelFacts
from modelswap.core.swap import SwapOutcome
from modelswap.protocol.errors import OUTCOMES, Code
from modelswap.protocol.messages import Open, Refuse
from tests.core.scheduling import Bench, model, of, said


def bench(*models: ModelFacts) -> Bench:
    """A bench with a gateway."""
    made = Bench(*models)
    made.hello()
    return made


# ── time to live ─────────────────────────────────────────────────────────────────────────────────────────────


def test_an_idle_model_is_put_out_after_its_time_to_live() -> None:
    """Not a moment earlier, and also if nothing else happens: the scheduler asks for a tick then."""
    made = bench(model("a", ttl=60.0), model("b"))
    made.reside("a")
    idle_at = made.now
    made.after(59.9)
    assert made.state("a") == "ready"
    made.after(0.2)
    assert made.state("a") == "draining"
    assert made.now == pytest.approx(idle_at + 60.1)
    assert of(made.drained("a"), effects.PutOut)
    record = of(made.go_out("a"), effects.SwapEnded)[0].record
    assert (record.source, record.target, record.mechanism, record.out) == ("a", None, "stop", "stop")


def test_the_deadline_of_a_time_to_live() -> None:
    """Between two events the scheduler tells exactly when it is due."""
    made = bench(model("a", ttl=1.0), model("b"))
    made.reside("a")
    assert made.scheduler.next_deadline() == pytest.approx(made.now + 1.0)


def test_activity_begins_the_time_anew() -> None:
    """What runs or has run since counts, as gateways report it."""
    made = bench(model("a", ttl=60.0), model("b"))
    made.reside("a")
    made.after(50)
    made.usage("a", 1)
    made.after(50)
    made.usage("a", 0, idle=5.0)
    made.after(54)
    assert made.state("a") == "ready"
    made.after(2)
    assert made.state("a") == "draining"


@pytest.mark.parametrize(
    ("idle", "level", "effect"),
    [("sleep", 2, "Sleep"), ("sleep", 0, "PutOut"), ("stop", 2, "PutOut"), ("keep", 2, None)],
)
def test_how_an_idle_model_goes(idle: Literal["sleep", "stop", "keep"], level: int, effect: str | None) -> None:
    """It sleeps if it may and is to, else it is stopped; or it is kept."""
    made = bench(model("a", ttl=60.0, idle=idle), model("b"))
    made.sleeps("a", level=level)
    made.reside("a")
    made.after(100)
    if effect is None:
        assert made.state("a") == "ready"
        return
    out = made.drained("a")
    assert [type(e).__name__ for e in out if isinstance(e, effects.Sleep | effects.PutOut)] == [effect]


def test_asleep_for_long() -> None:
    """A sleeper has no time to live; it is woken for who asks."""
    made = bench(model("a", ttl=60.0), model("b"))
    made.sleeps("a")
    made.reside("a")
    made.after(61)
    made.drained("a")
    record = of(made.slept("a"), effects.SwapEnded)[0].record
    assert (record.mechanism, record.out, record.target) == ("sleep", "sleep", None)
    made.after(600)
    assert made.state("a") == "asleep"
    made.want("a", 1)
    assert of(made.released(), effects.Wake)


def test_idle_for_another_it_sleeps_whatever_idle_says() -> None:
    """`idle: stop` is about being idle for nobody; a swap goes by the way alone."""
    made = bench(model("a", ttl=60.0, idle="stop"), model("b"))
    made.sleeps("a")
    made.reside("a")
    made.want("b", 1)
    made.after(20)
    assert of(made.drained("a"), effects.Sleep)


def test_asked_for_while_it_is_put_out_for_being_idle() -> None:
    """As long as it only drains it is opened again; what asks for another is a swap as ever."""
    made = bench(model("a", ttl=60.0), model("b"))
    made.reside("a")
    made.after(61)
    assert made.state("a") == "draining"
    out = made.want("a", 2)
    assert made.state("a") == "ready"
    assert said(out, Open)
    assert [e.record.outcome for e in of(out, effects.SwapEnded)] == [SwapOutcome.CANCELLED]
    made.admit(2, "a")
    made.usage("a", 0)
    made.after(61)
    made.want("b", 3)
    assert made.state("a") == "draining"


def test_unloaded_while_it_is_put_out_for_being_idle() -> None:
    """An operator's unload isn't undone by who asks for it."""
    made = bench(model("a", ttl=60.0), model("b"))
    made.sleeps("a")
    made.reside("a")
    made.after(61)
    made.unload("a")
    made.want("a", 2)
    assert of(made.drained("a"), effects.PutOut)


def test_models_beside_the_others_have_a_time_to_live_too() -> None:
    """A model without a device is put out like any other."""
    made = bench(model("a"), model("e", device=None, ttl=60.0))
    made.want("e", 1)
    made.come_in("e")
    made.admit(1, "e")
    made.usage("e", 0)
    made.after(61)
    assert made.state("e") == "draining"


def test_two_idle_models_on_one_device() -> None:
    """Each has its own time."""
    made = Bench(model("a", ttl=60.0), model("b", ttl=30.0), begin=False)
    made.handle(
        events.Configure(at=made.now, models=made.models, devices=(DeviceFacts("gpu0", 2),), settings=made.settings)
    )
    made.handle(events.Begin(at=made.now))
    made.hello()
    made.reside("a")
    made.reside("b", 901)
    made.after(31)
    assert (made.state("a"), made.state("b")) == ("ready", "draining")
    made.drained("b")
    made.go_out("b")
    made.after(30)
    assert made.state("a") == "draining"


# ── pinned models ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pinned_model_is_not_left() -> None:
    """Who asks for another is told at once, by which model and what to do; clients needn't try again."""
    made = bench(model("a", pinned=True, ttl=60.0), model("b"))
    made.reside("a")
    refusal = said(made.want("b", 1), Refuse)[0]
    assert (refusal.code, refusal.status, refusal.should_retry) == (Code.MODEL_PINNED, 503, False)
    assert "'a' is pinned on gpu0" in refusal.message
    assert "Release the pin" in refusal.message
    made.after(600)
    assert made.state("a") == "ready"
    assert made.scheduler.snapshot(made.now).models[0].pinned
    assert OUTCOMES[Code.MODEL_PINNED].should_retry is False


def test_pinned_but_not_resident() -> None:
    """A pin holds nobody off before its model is in; who waits when it comes in is refused then."""
    made = bench(model("a", pinned=True), model("b"))
    made.reside("b")
    made.want("a", 1)
    made.after(20)
    assert not said(made.want("b", 2), Refuse)
    made.drained("b")
    made.go_out("b")
    made.released()
    assert [r.ticket for r in said(made.come_in("a"), Refuse)] == [2]


def test_pinned_at_run_time() -> None:
    """A pin refuses who waits already, and holds until it is released."""
    made = bench()
    made.reside("a")
    made.usage("a", 1)
    made.want("b", 1)
    assert [r.code for r in said(made.pin("a"), Refuse)] == [Code.MODEL_PINNED]
    assert said(made.want("b", 2), Refuse)
    made.pin("a", pinned=False)
    assert not said(made.want("b", 3), Refuse)


def test_pinning_all() -> None:
    """Without a name all that is resident is pinned, or every pin is released, those of the config too."""
    made = bench(model("a"), model("b", pinned=True))
    made.reside("a")
    made.pin(None)
    pins = {name: record.pinned for name, record in made.scheduler.world.models.items()}
    assert pins == {"a": True, "b": True}
    made.pin(None, pinned=False)
    assert not any(record.pinned for record in made.scheduler.world.models.values())


def test_a_pin_and_the_config() -> None:
    """What was said at run time holds across reloads, until the config says something new."""
    made = bench(model("a"), model("b"))
    made.pin("a")
    made.configure(model("a", definition="v2"), model("b"))
    assert made.scheduler.world.models["a"].pinned
    made.pin("a", pinned=False)
    made.configure(model("a", definition="v2", pinned=True), model("b"))
    assert made.scheduler.world.models["a"].pinned


def test_an_operator_may_leave_a_pinned_model() -> None:
    """An operator's request goes before the pin, also for those who wait for the same; the pin stays for later."""
    made = bench(model("a", pinned=True), model("b"))
    made.reside("a")
    made.ensure("b", 7)
    assert made.state("a") == "draining"
    assert not said(made.want("b", 1), Refuse)
    made.drained("a")
    made.go_out("a")
    made.released()
    made.come_in("b")
    made.admit(1, "b")
    made.usage("b", 0)
    made.want("a", 2)
    made.after(20)
    made.drained("b")
    made.go_out("b")
    made.released()
    made.come_in("a")
    assert said(made.want("b", 3), Refuse)


def test_an_operator_who_has_gone() -> None:
    """Who waited for the same model as an operator is refused when only the pin is left to go by."""
    made = bench(model("a", pinned=True), model("b"))
    made.want("a", 900)
    made.come_in("a")
    made.ensure("b", 7)  # waits for the gate floor
    assert not said(made.want("b", 1), Refuse)
    out = made.handle(events.Withdraw(at=made.now, request=7))
    assert [r.ticket for r in said(out, Refuse)] == [1]


def test_unloading_a_pinned_model() -> None:
    """It goes, and others may come."""
    made = bench(model("a", pinned=True), model("b"))
    made.reside("a")
    made.unload("a")
    assert not said(made.want("b", 1), Refuse)
    made.drained("a")
    made.go_out("a")
    assert of(made.released(), effects.BringIn)


def test_what_fits_beside_a_pinned_model() -> None:
    """Only those are left that aren't pinned, if that is enough; an operator's request may put out all."""
    models = (model("a", pinned=True), model("b"), model("c"), model("d", demand=2))
    made = Bench(*models, begin=False)
    made.handle(events.Configure(at=made.now, models=models, devices=(DeviceFacts("gpu0", 2),), settings=made.settings))
    made.handle(events.Begin(at=made.now))
    made.hello()
    made.reside("a")
    made.reside("b", 901)
    assert not said(made.want("c", 1), Refuse)
    assert [r.code for r in said(made.want("d", 2), Refuse)] == [Code.MODEL_PINNED]
    made.after(20)
    assert (made.state("a"), made.state("b")) == ("ready", "draining")
    made.drained("b")
    made.go_out("b")
    made.released()
    made.come_in("c")
    made.admit(1, "c")
    made.usage("c", 0)
    made.pin("c")
    refusal = said(made.want("b", 3), Refuse)[0]
    assert "'a' and 'c' are pinned" in refusal.message
    assert not said(made.want("c", 4), Refuse)
    made.admit(4, "c")
    made.usage("c", 0)
    made.ensure("d", 7)
    assert (made.state("a"), made.state("c")) == ("draining", "draining")


# ── preloading ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_model_to_preload_comes_in_at_start() -> None:
    """On each device that has nothing, the first; nobody is answered for it."""
    made = Bench(model("a"), model("b", preload=True), model("c", preload=True), model("e", device=None, preload=True))
    out = [e for e in made.history if isinstance(e, effects.VerifyReleased | effects.BringIn)]
    assert [e.model for e in out if isinstance(e, effects.BringIn)] == ["e", "b"]
    made.come_in("b")
    made.come_in("e")
    assert (made.state("b"), made.state("e")) == ("ready", "ready")
    assert not of(made.history, effects.Answer)
    assert not made.scheduler.world.ensures


def test_nothing_is_preloaded_where_something_is() -> None:
    """What was adopted stays; a sleeper alone doesn't count, and may be the one that is preloaded."""
    for asleep in (0, 1):
        made = Bench(model("a", preload=True), model("b"), begin=False)
        made.handle(
            events.Adopted(
                at=made.now,
                instance="x.0.1",
                model="a" if asleep else "b",
                definition="v1",
                host="h",
                port=9,
                slots=4,
                asleep=asleep,
            )
        )
        made.handle(events.Begin(at=made.now))
        made.released()
        assert bool(of(made.out, effects.Wake)) is bool(asleep)
        assert not of(made.out, effects.BringIn)


def test_whoever_waits_goes_before_preloading() -> None:
    """It is for when nobody asks: a waiter's model comes in instead, and isn't left for the other afterwards."""
    made = Bench(model("a", preload=True, prepare=True), model("b"))
    made.hello()
    assert of(made.history, effects.Prepare)
    made.reside("b")
    made.prepared("a")
    made.after(60)
    assert made.state("b") == "ready"
    assert not made.scheduler.world.ensures
    waiting = Bench(model("a", preload=True), model("b"), begin=False)
    waiting.hello()
    waiting.want("b", 1)
    waiting.handle(events.Begin(at=waiting.now))
    assert [e.model for e in of(waiting.released(), effects.BringIn)] == ["b"]


def test_preloading_that_fails() -> None:
    """The model backs off, and is tried again only when somebody asks."""
    made = Bench(model("a", preload=True), model("b"), backoff_first=1.0)
    made.fail("a")
    assert not made.scheduler.world.ensures
    made.after(30)
    assert made.state("a") == "absent"
    assert not of(made.out, effects.Answer)


def test_pinned_while_it_drains_for_another() -> None:
    """As long as it only drains it is opened again, and who waits for the other hears why; asked by nobody, too."""
    made = bench(model("a", ttl=60.0), model("b"))
    made.reside("a")
    made.want("b", 1)
    made.after(20)
    assert made.state("a") == "draining"
    out = made.handle(events.Pin(at=made.now, model="a", pinned=True))
    assert made.state("a") == "ready"
    assert [message.code for message in said(out, Refuse)] == [Code.MODEL_PINNED]
    made.handle(events.Pin(at=made.now, model="a", pinned=False))
    made.after(61)
    assert made.state("a") == "draining"
    made.handle(events.Pin(at=made.now, model="a", pinned=True))
    assert made.state("a") == "ready"


def test_pinned_while_it_drains_for_an_operator() -> None:
    """What an operator has asked for goes first, and so does an unload."""
    made = bench(model("a"), model("b"))
    made.reside("a")
    made.ensure("b")
    made.after(20)
    made.handle(events.Pin(at=made.now, model="a", pinned=True))
    assert made.state("a") == "draining"
