"""Admin requests, reloads, adoption and shutdown."""

from __future__ import annotations

import msgspec

from modelswap.core import effects, events
from modelswap.protocol.messages import Close, Epoch, HeldLease, Open, Refuse, Usage, Want
from tests.core.scheduling import Bench, model, of, said


def test_ensure_answers_when_ready() -> None:
    """ensure_model is answered when the model is open, with the previous one and the mechanism."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.handle(events.Ensure(at=bench.now, request=7, model="b"))
    assert bench.state("a") == "draining"
    bench.drained("a")
    bench.go_out("a")
    bench.released()
    bench.now += 3.0
    [answer] = of(bench.come_in("b", port=9100), effects.Answer)
    assert (answer.request, answer.previous, answer.mechanism, answer.port) == (7, "a", "cold", 9100)
    assert answer.code is None
    assert answer.seconds == 3.0


def test_ensure_of_resident_answers_at_once() -> None:
    """ensure_model of the resident model does nothing and says so."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    [answer] = of(bench.handle(events.Ensure(at=bench.now, request=7, model="a")), effects.Answer)
    assert answer.mechanism == "resident"


def test_ensure_of_unknown_model_and_failure() -> None:
    """ensure_model is refused for an unknown model, and when the start fails."""
    bench = Bench()
    [answer] = of(bench.handle(events.Ensure(at=bench.now, request=1, model="nope")), effects.Answer)
    assert answer.code == "model_not_found"
    bench.handle(events.Ensure(at=bench.now, request=2, model="a"))
    [answer] = of(bench.fail("a", message="no such file"), effects.Answer)
    assert (answer.request, answer.code, answer.message) == (2, "model_start_failed", "no such file")


def test_withdrawn_ensure_is_forgotten() -> None:
    """Who asked and left is answered by nobody; a swap that only they wanted is undone while it can be."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.handle(events.Ensure(at=bench.now, request=7, model="b"))
    bench.handle(events.Withdraw(at=bench.now, request=7))
    assert bench.state("a") == "ready"
    assert not of(bench.history, effects.Answer)


def test_unload_puts_out_and_answers() -> None:
    """unload drains and stops, answers when nothing is left, and at once when nothing runs."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.handle(events.Unload(at=bench.now, request=1))
    bench.drained("a")
    [answer] = of(bench.go_out("a"), effects.Answer)
    assert (answer.previous, answer.mechanism) == ("a", "stop")
    [answer] = of(bench.handle(events.Unload(at=bench.now, request=2, model="a")), effects.Answer)
    assert (answer.previous, answer.mechanism) == (None, "absent")


def test_reload_leaves_unchanged_models_alone() -> None:
    """A reload that doesn't change a model's definition doesn't touch its instance."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.configure(model("a", priority=5), model("b", definition="v2"))
    assert bench.state("a") == "ready"
    assert not of(bench.out, effects.PutOut)


def test_reload_puts_out_what_changed() -> None:
    """A model whose definition changed is drained and stopped, and started anew when asked for."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.configure(model("a", definition="v2"), model("b"))
    assert bench.state("a") == "draining"
    bench.want("a", 1)
    bench.drained("a")
    bench.go_out("a")
    bench.released()
    assert of(bench.history, effects.BringIn)[-1].definition == "v2"


def test_reload_refuses_tickets_of_removed_models() -> None:
    """Whoever waits for a model that was taken out of the config is told."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.want("b", 1)
    bench.configure(model("a"))
    assert [r.code for r in said(bench.out, Refuse)] == ["model_not_found"]
    assert bench.state("a") == "ready"


def test_reload_changes_slots_of_running_instance() -> None:
    """A changed concurrency is told to gateways without a restart."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.configure(model("a", slots=2), model("b"))
    bench.usage("a", 0)
    assert bench.opened("a").slots == 2


def test_adoption_waits_for_gateways_and_reloads_nothing() -> None:
    """A new orchestrator adopts what runs, hears the known gateways, and goes on with the same instance."""
    bench = Bench(begin=False)
    bench.handle(
        events.Adopted(at=bench.now, instance="a.0.5", model="a", definition="v1", host="127.0.0.1", port=9009, slots=4)
    )
    bench.handle(events.Begin(at=bench.now, expected=frozenset({"g"})))
    assert not said(bench.out, Open)
    held = HeldLease(model="a", epoch=Epoch(0, 3), slots=4, in_flight=2)
    out = bench.hello("g", held, tickets=(Want(ticket=5, model="a", age_ms=100),))
    [opened] = said(out, Open)
    assert (opened.port, opened.epoch) == (9009, Epoch(1, 1))
    # Two may still run under the old lease, whose four slots haven't been given back.
    assert opened.slots == 0
    out = bench.say(Usage(model="a", epoch=Epoch(0, 3), revision=9, in_flight=2))
    assert said(out, Open)[0].slots == 2
    assert not said(bench.history, Close)
    assert not of(bench.history, effects.BringIn)


def test_adoption_goes_on_after_a_term_without_the_gateway() -> None:
    """A journalled gateway that never comes back holds up decisions for one term and no longer."""
    bench = Bench(begin=False, term=10.0)
    bench.handle(
        events.Adopted(at=bench.now, instance="a.0.5", model="a", definition="v1", host="127.0.0.1", port=9, slots=4)
    )
    bench.handle(events.Begin(at=bench.now, expected=frozenset({"gone"})))
    bench.handle(events.Ensure(at=bench.now, request=1, model="a"))
    assert not of(bench.out, effects.Answer)
    assert [a.mechanism for a in of(bench.after(10.0), effects.Answer)] == ["resident"]


def test_adoption_takes_up_a_start() -> None:
    """An instance that was starting when the orchestrator died is waited for, not started again."""
    bench = Bench(begin=False)
    bench.handle(
        events.Adopted(
            at=bench.now, instance="a.0.5", model="a", definition="v1", host="127.0.0.1", port=9, slots=4, ready=False
        )
    )
    [taken_up] = of(bench.handle(events.Begin(at=bench.now)), effects.BringIn)
    assert taken_up.adopted
    bench.hello()
    bench.want("a", 1)
    bench.come_in("a")
    assert bench.state("a") == "ready"


def test_shutdown_drains_refuses_and_finishes() -> None:
    """A shutdown refuses who waits, drains what runs, stops it, and says when all is done."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    bench.want("b", 1)
    out = bench.handle(events.Shutdown(at=bench.now))
    assert [r.code for r in said(out, Refuse)] == ["shutting_down"]
    assert said(bench.want("a", 2), Refuse)
    bench.drained("a")
    assert of(bench.go_out("a"), effects.Finished)


def test_shutdown_stops_a_start() -> None:
    """A start that is under way is stopped by a shutdown."""
    bench = Bench()
    bench.hello()
    bench.want("a", 1)
    out = bench.handle(events.Shutdown(at=bench.now))
    assert [e.model for e in of(out, effects.PutOut)] == ["a"]
    assert of(bench.go_out("a"), effects.Finished)


def test_second_shutdown_stops_at_once() -> None:
    """A second signal ends what still runs without waiting for it."""
    bench = Bench()
    bench.hello()
    bench.want("a", 1)
    bench.come_in("a")
    bench.admit(1, "a")
    bench.handle(events.Shutdown(at=bench.now))
    out = bench.handle(events.Shutdown(at=bench.now, now=True))
    assert said(out, Close)[0].abort
    assert of(out, effects.PutOut)[0].kill
    bench.drained("a")
    assert of(bench.go_out("a"), effects.Finished)


def test_shutdown_of_nothing_finishes_at_once() -> None:
    """With nothing running a shutdown is done at once."""
    bench = Bench()
    assert of(bench.handle(events.Shutdown(at=bench.now)), effects.Finished)


def test_measured_times_of_earlier_runs_count() -> None:
    """A model's swap time from before a restart sets its residency from the start."""
    known = msgspec.structs.replace(model("a"), swap_seconds=10.0)
    bench = Bench(known, model("b"), begin=False)
    bench.handle(
        events.Adopted(at=bench.now, instance="a.0.5", model="a", definition="v1", host="127.0.0.1", port=9, slots=4)
    )
    bench.handle(events.Begin(at=bench.now))
    bench.hello()
    bench.want("b", 1)
    bench.after(1.9)
    assert bench.state("a") == "ready"
    assert next(m.swap_seconds for m in bench.scheduler.snapshot(bench.now).models if m.name == "a") == 10.0
