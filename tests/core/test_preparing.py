"""Models that must be prepared before their swaps."""

from __future__ import annotations

import msgspec

from modelswap.core import effects, events
from modelswap.core.snapshot import ModelView
from modelswap.protocol.messages import Close, Contended, Drained, Forget, HeldLease, Open, Progress, Refuse
from tests.core.scheduling import Bench, model, of, said


def unprepared_b() -> Bench:
    """A bench with model a resident and idle, and a model b that must be prepared."""
    bench = Bench(model("a"), model("b", prepare=True), model("c"), max_wait=20.0, backoff_first=2.0)
    bench.hello()
    bench.reside("a")
    return bench


def view(bench: Bench, name: str) -> ModelView:
    """What is shown of a model."""
    return next(m for m in bench.scheduler.snapshot(bench.now).models if m.name == name)


def swap_to(bench: Bench, name: str, source: str = "a") -> None:
    """Put the resident model out until the next one is being started."""
    bench.after(2.1)
    bench.drained(source)
    bench.go_out(source)
    bench.released()
    assert bench.state(name) == "starting"


def test_preparing_disturbs_nobody() -> None:
    """While a model is prepared, the resident one is told of no contention and stays, however long it is idle."""
    bench = unprepared_b()
    out = bench.want("b", 1)
    assert [(e.model, e.definition) for e in of(out, effects.Prepare)] == [("b", "v1")]
    out += bench.after(300.0)
    assert not said(out, Contended)
    assert not said(out, Close)
    assert bench.state("a") == "ready"


def test_prepare_is_asked_for_once() -> None:
    """More waiters, from gateways and the admin API, cause no second preparing."""
    bench = unprepared_b()
    bench.want("b", 1)
    bench.want("b", 2)
    bench.handle(events.Ensure(at=bench.now, request=1, model="b"))
    bench.after(10.0)
    assert len(of(bench.out, effects.Prepare)) == 1


def test_a_model_without_waiters_is_not_prepared() -> None:
    """Nothing is fetched before somebody asks for it."""
    bench = Bench(model("a", prepare=True))
    bench.hello()
    bench.after(10.0)
    assert not of(bench.history, effects.Prepare)
    assert view(bench, "a").preparation == "needed"


def test_prepared_model_comes_in_and_its_wait_counts() -> None:
    """Once prepared, a model's oldest waiter counts with its whole wait: it goes before one that came later."""
    bench = unprepared_b()
    bench.want("b", 1)
    bench.after(30.0)
    bench.running["g", "a"] = 1
    bench.usage("a", 1)
    bench.want("c", 2)
    bench.usage("a", 1)
    bench.prepared("b")
    bench.usage("a", 0)
    swap_to(bench, "b")
    [started] = of(bench.out, effects.BringIn)
    assert (started.model, started.adopted) == ("b", False)
    assert view(bench, "b").preparation == "done"


def test_others_are_served_while_one_is_prepared() -> None:
    """A swap to a prepared model goes on past an older waiter of an unprepared one."""
    bench = unprepared_b()
    bench.want("b", 1, age=100.0)
    bench.want("c", 2)
    swap_to(bench, "c")


def test_prepared_once_is_prepared_for_good() -> None:
    """The next swap to a prepared model needs no preparing."""
    bench = unprepared_b()
    bench.want("b", 1)
    bench.prepared("b")
    swap_to(bench, "b")
    bench.come_in("b")
    bench.admit(1, "b")
    bench.usage("b", 0)
    bench.want("a", 2)
    swap_to(bench, "a", "b")
    bench.come_in("a")
    bench.out.clear()
    bench.want("b", 3)
    assert not of(bench.out, effects.Prepare)
    assert bench.opened("a").slots == 4


def test_progress_shows_the_stage_of_preparing() -> None:
    """Waiting clients hear at once that their model is prepared, and of every new stage; fractions as time passes."""
    bench = unprepared_b()
    assert [p.stage for p in said(bench.want("b", 1), Progress)] == ["preparing"]
    out = bench.prepare_stage("b", "pulling image", 0.1)
    assert [(p.stage, p.fraction) for p in said(out, Progress)] == [("pulling image", 0.1)]
    assert not said(bench.prepare_stage("b", "pulling image", 0.4), Progress)
    assert said(bench.after(2.1), Progress)[-1].fraction == 0.4
    shown = view(bench, "b")
    assert (shown.preparation, shown.prepare_stage, shown.prepare_fraction) == ("under way", "pulling image", 0.4)
    bench.prepared("b")
    assert said(bench.after(2.1), Progress)[-1].stage in ("queued", "drain")
    shown = view(bench, "b")
    assert (shown.preparation, shown.prepare_stage, shown.prepare_fraction) == ("done", "", None)


def test_failed_preparing_refuses_waiters_and_backs_off() -> None:
    """Waiters hear why a model can't be prepared; only after the backoff, which doubles, is it tried again."""
    bench = unprepared_b()
    for ticket, pause in ((1, 2.0), (2, 4.0)):
        assert of(bench.want("b", ticket), effects.Prepare)
        [refused] = said(bench.prepare_fails("b", message="disk full"), Refuse)
        assert (refused.ticket, refused.code, refused.message) == (ticket, "model_start_failed", "disk full")
        assert refused.retry_after_ms == pause * 1000
        out = bench.want("b", 100 + ticket)
        assert said(out, Refuse)
        assert not of(out, effects.Prepare)
        bench.after(pause)
    assert bench.state("a") == "ready"
    assert view(bench, "b").preparation == "needed"


def test_permanently_failed_preparing_says_not_to_retry() -> None:
    """A model whose image doesn't exist is refused as broken, to admin requests as well."""
    bench = unprepared_b()
    bench.want("b", 1)
    bench.handle(events.Ensure(at=bench.now, request=1, model="b"))
    out = bench.prepare_fails("b", permanent=True)
    assert [(r.code, r.should_retry) for r in said(out, Refuse)] == [("model_broken", False)]
    assert [a.code for a in of(out, effects.Answer)] == ["model_broken"]


def test_preparing_goes_on_without_waiters() -> None:
    """When nobody waits any more, the preparing isn't undone, and its end starts nothing."""
    bench = unprepared_b()
    bench.want("b", 1)
    bench.say(Forget(ticket=1))
    assert view(bench, "b").preparation == "under way"
    out = bench.prepared("b") + bench.after(10.0)
    assert not of(out, effects.BringIn)
    assert not said(out, Close)
    bench.want("b", 2)
    assert len(of(bench.out, effects.Prepare)) == 1
    swap_to(bench, "b")


def test_failed_preparing_without_waiters_backs_off() -> None:
    """A model whose preparing fails after its waiters have left is not prepared again at once."""
    bench = unprepared_b()
    bench.want("b", 1)
    bench.say(Forget(ticket=1))
    bench.prepare_fails("b")
    assert said(bench.want("b", 2), Refuse)


def test_ensure_waits_for_preparing() -> None:
    """ensure_model of an unprepared model is answered when it is resident."""
    bench = unprepared_b()
    bench.handle(events.Ensure(at=bench.now, request=7, model="b"))
    assert of(bench.out, effects.Prepare)
    assert bench.state("a") == "ready"
    bench.prepared("b")
    assert bench.state("a") == "draining"
    swap_to(bench, "b")
    [answer] = of(bench.come_in("b"), effects.Answer)
    assert (answer.request, answer.previous, answer.mechanism) == (7, "a", "cold")


def test_unprepared_start_is_prepared_again_without_loss() -> None:
    """A start that finds its image gone keeps its waiters; twice in a row, then it counts as a failure."""
    bench = Bench(model("a", prepare=True))
    bench.hello()
    bench.want("a", 1)
    for _ in range(2):
        bench.prepared("a")
        bench.released()
        assert bench.state("a") == "starting"
        out = bench.fail("a", unprepared=True)
        assert not said(out, Refuse)
        assert [e.model for e in of(out, effects.Prepare)] == ["a"]
        assert bench.state("a") == "absent"
    bench.prepared("a")
    bench.released()
    out = bench.fail("a", unprepared=True, message="no such container")
    assert [r.message for r in said(out, Refuse)] == ["no such container"]
    assert view(bench, "a").preparation == "needed"
    bench.after(2.0)
    assert of(bench.want("a", 2), effects.Prepare)


def test_a_start_that_went_well_forgives_unprepared_ones() -> None:
    """Only unprepared starts in a row count."""
    bench = Bench(model("a", prepare=True))
    bench.hello()
    bench.want("a", 1)
    bench.prepared("a")
    bench.fail("a", unprepared=True)
    bench.prepared("a")
    bench.released()
    bench.come_in("a")
    assert bench.scheduler.world.models["a"].unprepared_starts == 0


def test_unprepared_counts_as_failure_where_nothing_is_prepared() -> None:
    """A model that needs no preparing can't be helped by it."""
    bench = Bench()
    bench.hello()
    bench.want("a", 1)
    assert said(bench.fail("a", unprepared=True), Refuse)


def test_unprepared_start_lets_others_in_meanwhile() -> None:
    """While a model is prepared again, whoever else has waiters comes in."""
    bench = unprepared_b()
    bench.want("b", 1)
    bench.prepared("b")
    swap_to(bench, "b")
    bench.want("a", 2)
    bench.fail("b", unprepared=True)
    assert [e.model for e in of(bench.released(), effects.BringIn)] == ["a"]


def test_changed_definition_is_prepared_anew() -> None:
    """A reload that changes a model's definition has it prepared anew for its waiters; old reports mean nothing."""
    bench = unprepared_b()
    bench.want("b", 1)
    out = bench.handle(
        events.Configure(
            at=bench.now,
            models=(model("a"), model("b", prepare=True, definition="v2")),
            devices=(bench.scheduler.world.devices["gpu0"].facts,),
            settings=bench.settings,
        )
    )
    assert [e.definition for e in of(out, effects.Prepare)] == ["v2"]
    bench.prepare_stage("b", "pulling image", 0.5)
    assert view(bench, "b").prepare_stage == ""
    assert not said(bench.prepare_fails("b"), Refuse)
    bench.prepared("b")
    assert view(bench, "b").preparation == "under way"
    bench.prepared("b", "v2")
    swap_to(bench, "b")


def test_reload_without_change_keeps_preparing() -> None:
    """A reload that doesn't touch a model asks for nothing again."""
    bench = unprepared_b()
    bench.want("b", 1)
    bench.prepare_stage("b", "pulling image")
    bench.configure(model("a"), model("b", prepare=True, priority=1))
    assert len(of(bench.out, effects.Prepare)) == 1
    assert view(bench, "b").prepare_stage == "pulling image"


def test_model_removed_while_it_is_prepared() -> None:
    """Waiters of a model that is taken out of the config are told, and reports about it change nothing."""
    bench = unprepared_b()
    bench.want("b", 1)
    bench.configure(model("a"))
    assert [r.code for r in said(bench.out, Refuse)] == ["model_not_found"]
    bench.prepare_stage("b", "pulling image")
    bench.prepare_fails("b")
    bench.prepared("b")


def test_swap_is_undone_when_its_target_needs_preparing_after_all() -> None:
    """A reload that changes the target while the old model drains opens the old one again until it is prepared."""
    bench = unprepared_b()
    bench.want("b", 1)
    bench.prepared("b")
    bench.after(2.1)
    assert bench.state("a") == "draining"
    closed = bench.epoch("a")
    bench.configure(model("a"), model("b", prepare=True, definition="v2"))
    assert bench.state("a") == "ready"
    bench.say(Drained(model="a", epoch=closed))
    assert [e.definition for e in of(bench.out, effects.Prepare)] == ["v1", "v2"]
    bench.prepared("b", "v2")
    swap_to(bench, "b")


def test_device_is_free_for_others_when_the_target_needs_preparing_after_all() -> None:
    """The same once the old model is being stopped: the device goes to who can come in, and then to the target."""
    for phase in ("out", "release"):
        bench = unprepared_b()
        bench.want("b", 1)
        bench.prepared("b")
        bench.after(2.1)
        bench.drained("a")
        if phase == "release":
            bench.go_out("a")
        bench.configure(model("a"), model("b", prepare=True, definition="v2"), model("c"))
        if phase == "out":
            bench.go_out("a")
        bench.want("c", 2)
        assert [e.model for e in of(bench.released(), effects.BringIn)] == ["c"]
        bench.come_in("c")
        bench.admit(2, "c")
        bench.usage("c", 0)
        bench.prepared("b", "v2")
        swap_to(bench, "b", "c")


def test_start_of_a_definition_that_no_longer_holds() -> None:
    """A start fails after its model's definition was changed: that backs nobody off, the new one is prepared."""
    bench = unprepared_b()
    bench.want("b", 1)
    bench.prepared("b")
    swap_to(bench, "b")
    bench.configure(model("a"), model("b", prepare=True, definition="v2"))
    out = bench.fail("b", unprepared=True)
    assert not said(out, Refuse)
    bench.prepared("b", "v2")
    assert [e.definition for e in of(bench.released(), effects.BringIn)] == ["v2"]


def test_definition_changed_and_changed_back_during_a_start() -> None:
    """What is being started was prepared, whatever the config said meanwhile."""
    bench = unprepared_b()
    bench.want("b", 1)
    bench.prepared("b")
    swap_to(bench, "b")
    bench.configure(model("a"), model("b", prepare=True, definition="v2"))
    bench.configure(model("a"), model("b", prepare=True))
    bench.come_in("b")
    assert bench.state("b") == "ready"


def test_adopted_model_is_prepared_only_for_its_next_start() -> None:
    """An adopted model serves unprepared; once it is out and wanted again, it is prepared first."""
    bench = Bench(model("a"), model("b", prepare=True), begin=False)
    bench.handle(
        events.Adopted(at=bench.now, instance="b.0.5", model="b", definition="v1", host="127.0.0.1", port=9, slots=4)
    )
    bench.handle(events.Begin(at=bench.now))
    bench.hello()
    bench.want("b", 1)
    bench.admit(1, "b")
    bench.usage("b", 0)
    assert not of(bench.history, effects.Prepare)
    bench.want("a", 2)
    bench.after(2.1)
    out = bench.want("b", 3)
    assert [e.model for e in of(out, effects.Prepare)] == ["b"]


def test_failed_preparing_of_a_model_that_drains_is_forgotten_when_it_opens_again() -> None:
    """A model that couldn't be prepared for its next start, but needs none after all, takes requests at once."""
    bench = Bench(model("a"), model("b", prepare=True), begin=False)
    bench.handle(
        events.Adopted(at=bench.now, instance="b.0.5", model="b", definition="v1", host="127.0.0.1", port=9, slots=4)
    )
    bench.handle(events.Begin(at=bench.now))
    bench.hello()
    bench.want("a", 2)
    bench.after(2.1)
    assert bench.state("b") == "draining"
    bench.want("b", 3)
    assert said(bench.prepare_fails("b"), Refuse)
    bench.say(Forget(ticket=2))
    assert bench.state("b") == "ready"
    assert not said(bench.want("b", 4), Refuse)


def test_failed_preparing_does_not_disturb_what_was_started_by_hand() -> None:
    """A model that is started by hand while it is prepared serves its waiters, whatever becomes of the preparing."""
    bench = Bench(model("a", prepare=True))
    bench.hello()
    bench.want("a", 1)
    bench.appear("a")
    assert not said(bench.prepare_fails("a"), Refuse)
    bench.come_in("a")
    assert said(bench.out, Open)
    bench.want("a", 2)
    assert len(of(bench.out, effects.Prepare)) == 1


def test_preparing_begins_before_decisions_do() -> None:
    """A new orchestrator that still waits for gateways prepares already what the others wait for."""
    bench = Bench(model("a"), model("b", prepare=True), begin=False)
    bench.handle(
        events.Adopted(at=bench.now, instance="a.0.5", model="a", definition="v1", host="127.0.0.1", port=9, slots=4)
    )
    bench.handle(events.Begin(at=bench.now, expected=frozenset({"h", "g"})))
    bench.hello()
    assert of(bench.want("b", 1), effects.Prepare)
    assert not said(bench.prepared("b"), Close)
    bench.hello("h", HeldLease(model="a", epoch=bench.scheduler.world.next_epoch(), slots=1, in_flight=0))
    bench.usage("a", 0)
    bench.usage("a", 0, "h")
    bench.after(2.1)
    assert bench.state("a") == "draining"


def test_unload_of_a_model_that_is_prepared() -> None:
    """There is nothing to unload, its waiters go on waiting, and the preparing goes on."""
    bench = unprepared_b()
    bench.want("b", 1)
    [answer] = of(bench.handle(events.Unload(at=bench.now, request=3, model="b")), effects.Answer)
    assert answer.mechanism == "absent"
    bench.prepared("b")
    swap_to(bench, "b")


def test_shutdown_while_a_model_is_prepared() -> None:
    """A shutdown refuses its waiters, waits for no preparing, and nothing is prepared for whoever comes later."""
    bench = Bench(model("a", prepare=True))
    bench.hello()
    bench.want("a", 1)
    out = bench.handle(events.Shutdown(at=bench.now))
    assert [r.code for r in said(out, Refuse)] == ["shutting_down"]
    assert of(out, effects.Finished)
    out = bench.prepared("a") + bench.want("a", 2)
    assert not of(out, effects.BringIn)
    assert not of(out, effects.Prepare)


def test_model_that_needs_preparing_no_more() -> None:
    """A reload that says that nothing needs to be prepared lets the waiters' swap begin."""
    bench = unprepared_b()
    bench.want("b", 1)
    bench.configure(model("a"), msgspec.structs.replace(model("b"), priority=1), model("c"))
    swap_to(bench, "b")
    assert view(bench, "b").preparation == "done"


def test_models_without_device_are_prepared_too() -> None:
    """A model that runs beside the others is started when it is prepared, whoever holds the device."""
    bench = Bench(model("a"), model("e", device=None, prepare=True))
    bench.hello()
    bench.reside("a")
    bench.want("e", 1)
    assert not of(bench.out, effects.BringIn)
    assert [e.model for e in of(bench.prepared("e"), effects.BringIn)] == ["e"]
