"""Whose weights are read ahead, and until when."""

from __future__ import annotations

from modelswap.core import effects, events
from modelswap.protocol.messages import Forget
from tests.core.scheduling import Bench, model, of


def resident() -> Bench:
    """Model a is resident and idle; b and c are not there."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    return bench


def ahead(out: list[effects.Effect]) -> list[tuple[str, str | None, str]]:
    """What was said of reading ahead."""
    return [(effect.device, effect.model, effect.definition) for effect in of(out, effects.ReadAhead)]


B = ("gpu0", "b", "v1")
C = ("gpu0", "c", "v1")
NONE = ("gpu0", None, "")


def test_it_is_said_when_somebody_waits_behind_a_resident_model_and_ends_once_the_next_is_in() -> None:
    """Said once, however many wait; it goes on while the old one drains, is put out, verified and the next starts."""
    bench = resident()
    assert ahead(bench.want("b", 1)) == [B]
    out = bench.want("b", 2) + bench.after(2.1) + bench.drained("a") + bench.go_out("a") + bench.released()
    assert bench.state("b") == "starting"
    assert ahead(out) == []
    assert ahead(bench.come_in("b")) == [NONE]


def test_a_model_that_finds_the_device_free_is_read_beside_its_start() -> None:
    """An engine imports for many seconds before it reads."""
    bench = Bench()
    bench.hello()
    assert ahead(bench.want("b", 1)) == [B]
    assert bench.state("b") == "starting"
    assert ahead(bench.come_in("b")) == [NONE]


def test_it_is_taken_back_when_the_last_waiter_leaves() -> None:
    """Not when others wait still."""
    bench = resident()
    bench.want("b", 1)
    bench.want("b", 2)
    assert ahead(bench.say(Forget(ticket=1))) == []
    assert ahead(bench.say(Forget(ticket=2))) == [NONE]
    assert ahead(bench.want("b", 3)) == [B]


def test_nothing_is_read_for_a_start_that_nobody_waits_for_any_more() -> None:
    """The start itself goes on."""
    bench = Bench()
    bench.hello()
    bench.want("b", 1)
    assert ahead(bench.say(Forget(ticket=1))) == [NONE]
    assert bench.state("b") == "starting"
    assert ahead(bench.want("b", 2)) == [B]


def test_an_operators_request_counts_as_waiting() -> None:
    """It ends with the request."""
    bench = resident()
    bench.usage("a", 1)
    assert ahead(bench.ensure("b", request=7)) == [B]
    assert ahead(bench.handle(events.Withdraw(at=bench.now, request=7))) == [NONE]


def test_it_follows_a_target_that_changes_while_the_old_model_drains() -> None:
    """The last waiter for b leaves, so the device is drained for c; then for nobody."""
    bench = resident()
    bench.usage("a", 1)
    bench.want("b", 1, age=200.0)
    bench.after(1.0)
    assert bench.state("a") == "draining"
    assert ahead(bench.want("c", 2)) == []
    assert ahead(bench.say(Forget(ticket=1))) == [C]
    out = bench.say(Forget(ticket=2))
    assert ahead(out) == [NONE]
    assert bench.state("a") == "ready"


def test_it_follows_a_target_that_changes_while_the_memory_is_verified() -> None:
    """When c's time comes it is what will be started."""
    bench = resident()
    bench.want("b", 1)
    bench.after(2.1)
    bench.drained("a")
    bench.go_out("a")
    bench.want("c", 2)
    assert ahead(bench.say(Forget(ticket=1))) == [C]
    assert ahead(bench.released()) == []
    assert bench.state("c") == "starting"


def test_whoever_waits_behind_a_start_is_read_once_that_is_over() -> None:
    """One model at a time for each device, first the one that starts."""
    bench = resident()
    bench.want("b", 1)
    bench.after(2.1)
    bench.drained("a")
    bench.go_out("a")
    bench.released()
    assert ahead(bench.want("c", 2)) == []
    assert ahead(bench.come_in("b")) == [C]


def test_a_request_of_higher_priority_takes_the_turn() -> None:
    """What is read is what would come in next, by the same order."""
    bench = resident()
    bench.usage("a", 1)
    assert ahead(bench.want("b", 1)) == [B]
    assert ahead(bench.want("c", 2, priority=5)) == [C]
    assert ahead(bench.say(Forget(ticket=2))) == [B]


def test_a_failed_start_ends_it() -> None:
    """While the model backs off nobody waits for it."""
    bench = Bench()
    bench.hello()
    bench.want("b", 1)
    assert ahead(bench.fail("b")) == [NONE]


def test_sleepers_are_not_read() -> None:
    """They have their weights; one that was dropped is read again once it has gone."""
    bench = Bench()
    bench.hello()
    bench.sleeps("b")
    bench.lull("a", "b")
    assert ahead(bench.want("a", 1)) == []
    assert ahead(bench.drop_sleeper("a")) == []
    assert bench.state("a") == "stopping"
    assert ahead(bench.go_out("a")) == [("gpu0", "a", "v1")]


def test_a_sleeper_that_dropped_its_weights_is_read() -> None:
    """At level 2 it reads them again; from when it is woken it does so itself."""
    bench = Bench()
    bench.hello()
    bench.sleeps("b")
    bench.lull("a", "b", level=2)
    assert ahead(bench.want("a", 1)) == [("gpu0", "a", "v1")]
    bench.after(10)
    bench.drained("b")
    assert ahead(bench.slept("b")) == []
    assert ahead(bench.released()) == [NONE]
    assert bench.state("a") == "waking"


def test_what_needs_no_device_is_not_read() -> None:
    """It starts at once, and there is no turn to wait for."""
    bench = Bench(model("a"), model("embedder", device=None))
    bench.hello()
    bench.reside("a")
    assert ahead(bench.want("embedder", 1)) == []
    assert bench.state("embedder") == "starting"


def test_what_is_resident_or_goes_out_for_idleness_is_not_read() -> None:
    """Its weights were read when it came in."""
    bench = Bench(model("a", ttl=10.0), model("b"))
    bench.hello()
    bench.reside("a")
    assert ahead(bench.want("a", 1)) == []
    bench.admit(1, "a")
    bench.usage("a", 0)
    assert ahead(bench.after(11.0)) == []
    assert bench.state("a") == "draining"
    assert ahead(bench.want("b", 2)) == [B]


def test_a_model_is_read_only_once_it_is_prepared() -> None:
    """Before that its weights may not be there."""
    bench = Bench(model("a"), model("b", prepare=True))
    bench.hello()
    bench.reside("a")
    assert ahead(bench.want("b", 1)) == []
    assert ahead(bench.prepared("b")) == [B]


def test_a_start_that_was_adopted_is_not_read() -> None:
    """It has begun long ago; whoever waits behind it is read afterwards."""
    bench = Bench(begin=False)
    bench.handle(
        events.Adopted(
            at=bench.now, instance="b.0.1", model="b", definition="v1", ready=False, host="", port=0, slots=1
        )
    )
    bench.handle(events.Begin(at=bench.now))
    bench.after(11.0)
    bench.hello()
    bench.want("b", 1)
    bench.want("c", 2)
    assert bench.state("b") == "starting"
    assert ahead(bench.history) == []
    assert ahead(bench.come_in("b")) == [C]


def test_nothing_is_said_before_decisions_begin() -> None:
    """What the waiters wait for may be running already."""
    bench = Bench(begin=False)
    bench.handle(
        events.Adopted(
            at=bench.now, instance="a.0.1", model="a", definition="v1", ready=True, host="127.0.0.1", port=9, slots=1
        )
    )
    bench.handle(events.Begin(at=bench.now, expected=frozenset({"g", "h"})))
    bench.hello()
    assert ahead(bench.want("b", 1)) == []
    assert ahead(bench.hello("h")) == [B]


def test_a_changed_definition_is_said_anew() -> None:
    """It may name other weights; a model that is gone from the config is taken back."""
    bench = resident()
    bench.usage("a", 1)
    bench.want("b", 1)
    bench.configure(model("a"), model("b", definition="v2"), model("c"))
    assert ahead(bench.out) == [B, ("gpu0", "b", "v2")]
    bench.out.clear()
    bench.configure(model("a"), model("c"))
    assert ahead(bench.out) == [NONE]


def test_a_shutdown_ends_it() -> None:
    """Nobody waits any more."""
    bench = resident()
    bench.usage("a", 1)
    bench.want("b", 1)
    assert ahead(bench.handle(events.Shutdown(at=bench.now))) == [NONE]
