"""What the simulator found wrong once, each as a short history that shows it."""

from __future__ import annotations

from modelswap.core import effects, events
from modelswap.core.admission import Admission
from modelswap.core.outgoing import Admit, Reconnect
from modelswap.protocol.messages import (
    Catalog,
    CatalogModel,
    Close,
    Drained,
    Epoch,
    Forget,
    HeldLease,
    Limits,
    Open,
    Usage,
)
from tests.core.scheduling import Bench, model, of, said

OLD = Epoch(1, 1)


def open_lease(slots: int = 1, revision: int = 0) -> Open:
    """Return a lease on model a."""
    return Open(model="a", epoch=OLD, host="127.0.0.1", port=1, slots=slots, revision=revision)


def connected_gateway(term: float = 10.0) -> Admission:
    """Return a gateway that knows model a and ticked at 0."""
    admission = Admission("g")
    admission.connect(0.0)
    limits = Limits(queue_timeout_ms=1_000_000, queue_requests=100, queue_bytes=1 << 20)
    models = (CatalogModel(name="a"),)
    admission.receive(Catalog(generation=1, term_ms=int(term * 1000), limits=limits, models=models), 0.0)
    admission.tick(0.0)
    admission.take()
    return admission


def test_hello_gives_no_slots_away_that_are_in_use() -> None:
    """While a gateway says hello again, another doesn't get the slot in which its request runs."""
    bench = Bench(model("a", slots=1))
    bench.hello("g")
    bench.hello("h")
    bench.want("a", 1, "g")
    bench.come_in("a", slots=1)
    bench.admit(1, "a", "g")
    bench.want("a", 1, "h")
    held = HeldLease(model="a", epoch=bench.epoch("a", "g"), slots=1, in_flight=1)
    assert not said(bench.hello("g", held), Open, "h")


def test_a_slot_for_a_ticket_that_left_goes_on() -> None:
    """A slot given for a request whose client leaves goes to the gateway where somebody waits."""
    bench = Bench(model("a", slots=1))
    bench.hello("g")
    bench.hello("h")
    bench.want("a", 1, "g")
    bench.want("a", 1, "h")
    bench.come_in("a", slots=1)
    assert bench.opened("a", "g").slots == 1
    bench.say(Forget(ticket=1), "g")
    assert bench.opened("a", "g").slots == 0
    bench.usage("a", 0, "g")
    assert bench.opened("a", "h").slots == 1


def test_admissions_alone_raise_no_share() -> None:
    """Requests that ended unreported between two admissions don't count as slots that a gateway has."""
    bench = Bench(model("a", slots=3))
    bench.hello("g")
    bench.hello("h")
    for ticket in (1, 2, 3):
        bench.want("a", ticket, "g")
        bench.want("a", ticket, "h")
    bench.come_in("a", slots=3)
    shares = {name: bench.opened("a", name).slots for name in "gh"}
    few = min(shares, key=lambda name: shares[name])
    for ticket in (1, 2, 3):
        bench.admit(ticket, "a", few)
    instance = bench.scheduler.world.instances[bench.instance("a")]
    assert instance.leases[few, bench.epoch("a", few)].upper == shares[few]


def test_hello_confirms_a_lease_that_stays_as_it_was() -> None:
    """A gateway that was paused suspends its leases, so each is opened again even if its share hasn't changed."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    held = HeldLease(model="a", epoch=bench.epoch("a"), slots=4, in_flight=0)
    assert [(o.epoch, o.slots) for o in said(bench.hello("g", held), Open)] == [(held.epoch, 4)]


def test_a_paused_gateway_admits_nothing_however_it_wakes() -> None:
    """Whatever comes first after a pause, an opening or an end, admits nobody: the leases may have been broken."""
    for wake in ("open", "leave", "wait"):
        admission = connected_gateway()
        admission.receive(open_lease(), 0.0)
        lease = admission.enter("a", 0.0)
        assert lease is not None
        admission.wait("a", 0.0, 0.0, 1)
        admission.take()
        if wake == "open":
            admission.receive(open_lease(slots=2, revision=1), 9.0)
        elif wake == "leave":
            admission.leave(lease, 9.0)
        else:
            admission.leave(lease, 0.0)
            admission.take()
            admission.wait("a", 9.0, 9.0, 1)
        out = admission.take()
        assert not [item for item in out if isinstance(item, Admit)], wake
        assert [item for item in out if isinstance(item, Reconnect)], wake
        # What was said to the old connection confirms nothing.
        admission.receive(open_lease(slots=5, revision=2), 9.1)
        assert not admission.take()


def test_bringing_in_waits_for_a_gateway_that_was_cut_off() -> None:
    """A gateway whose connection broke may go on sending to an address that the next engine could get."""
    for returns in (True, False):
        bench = Bench(term=10.0)
        bench.hello("g")
        bench.hello("h")
        bench.reside("a")
        bench.handle(events.GatewayLost(at=bench.now, gateway="g"))
        bench.now += 2.0  # linger
        bench.want("b", 1, "h")
        bench.usage("a", 0, "h", idle=2.0)
        bench.drained("a", "h")
        bench.go_out("a")
        bench.released()
        assert bench.state("b") == "absent"
        if returns:
            bench.hello("g")
        else:
            bench.after(10.0)
        assert bench.state("b") == "starting"


def test_bringing_in_waits_for_a_lease_on_what_is_gone() -> None:
    """A gateway that comes back with a lease on an engine that is gone must have let go of it first."""
    bench = Bench()
    held = HeldLease(model="a", epoch=Epoch(0, 1), slots=1, in_flight=0)
    assert [c.epoch for c in said(bench.hello("g", held), Close)] == [held.epoch]
    bench.want("b", 1)
    assert bench.state("b") == "absent"
    bench.say(Drained(model="a", epoch=held.epoch))
    assert bench.state("b") == "starting"


def test_memory_is_verified_before_the_first_start() -> None:
    """What an earlier orchestrator put out may still hold the device's memory."""
    bench = Bench(begin=False)
    bench.handle(events.Begin(at=bench.now))
    bench.hello()
    out = bench.want("a", 1)
    assert of(out, effects.VerifyReleased)
    assert not of(out, effects.BringIn)
    assert of(bench.released(), effects.BringIn)


def test_leases_on_what_died_before_decisions_began_are_closed() -> None:
    """A gateway that says hello after an adopted engine's death is told to close its lease on it."""
    bench = Bench(begin=False)
    bench.handle(
        events.Adopted(
            at=bench.now, instance="a.0.1", model="a", definition="v1", host="127.0.0.1", port=1, slots=1, ready=True
        )
    )
    bench.handle(events.Begin(at=bench.now, expected=frozenset({"g", "h"})))
    bench.handle(events.Died(at=bench.now, instance="a.0.1", message="it died"))
    held = HeldLease(model="a", epoch=Epoch(0, 1), slots=1, in_flight=0)
    assert [c.epoch for c in said(bench.hello("g", held), Close)] == [held.epoch]


def test_a_report_from_before_the_close_frees_no_slots() -> None:
    """What a gateway said before it heard that its lease was closed doesn't bound what it has let through since."""
    bench = Bench(model("a", slots=2), model("b"))
    bench.hello("g")
    bench.want("a", 1, "g")
    bench.come_in("a", slots=2)
    bench.admit(1, "a", "g")
    bench.hello("h")
    assert bench.opened("a", "g").slots == 2
    bench.handle(events.Ensure(at=bench.now, request=1, model="b"))
    assert bench.state("a") == "draining"
    bench.usage("a", 1, "g")  # on its way already; another request goes through before the close arrives
    bench.handle(events.Withdraw(at=bench.now, request=1))
    bench.want("a", 1, "h")
    assert bench.opened("a", "h").slots == 0
    closed = bench.epoch("a", "g")
    assert closed == bench.epoch("a", "h")


def test_a_report_before_decisions_began_frees_no_slots() -> None:
    """A gateway that goes on under an adopted lease may use all of it, whatever runs there just now."""
    bench = Bench(begin=False)
    bench.handle(
        events.Adopted(
            at=bench.now, instance="a.0.1", model="a", definition="v1", host="127.0.0.1", port=1, slots=2, ready=True
        )
    )
    bench.handle(events.Begin(at=bench.now, expected=frozenset({"g", "h"})))
    old = Epoch(0, 1)
    bench.hello("g", HeldLease(model="a", epoch=old, slots=2, in_flight=0))
    bench.say(Usage(model="a", epoch=old, revision=-1, in_flight=0), "g")
    bench.hello("h")
    bench.want("a", 1, "h")
    assert bench.opened("a", "h").slots == 0
    bench.say(Drained(model="a", epoch=old), "g")
    assert bench.opened("a", "h").slots > 0


def test_a_scheduler_that_overslept_takes_nobody_for_silent() -> None:
    """After our own process stood still for longer than a term, gateways get another one to be heard."""
    bench = Bench(term=10.0)
    bench.hello()
    bench.reside("a")
    bench.now += 30.0
    assert not of(bench.handle(events.Tick(at=bench.now)), effects.Disconnect)
    assert of(bench.silence(10.0), effects.Disconnect)
