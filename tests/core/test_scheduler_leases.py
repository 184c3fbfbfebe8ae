"""Leases: shares, faults, broken and returning gateways."""

from __future__ import annotations

from modelswap.core import effects, events
from modelswap.protocol.messages import Catalog, Close, Epoch, Fault, Heartbeat, HeldLease, Open, Usage
from tests.core.scheduling import Bench, model, of, said


def test_hello_is_answered_with_catalog_and_leases() -> None:
    """A gateway hears the catalog first and then what is open."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    out = bench.hello("h")
    first = next(e for e in out if isinstance(e, effects.Say) and e.gateway == "h")
    assert isinstance(first.message, Catalog)
    assert [o.model for o in said(out, Open, "h")] == ["a"]


def test_slots_never_exceed_the_instance() -> None:
    """A second gateway gets slots only when the first has confirmed that it gave them up."""
    bench = Bench(model("a", slots=1))
    bench.hello("g")
    bench.hello("h")
    bench.want("a", 1, "g")
    bench.come_in("a", slots=1)
    assert bench.opened("a", "g").slots == 1
    assert bench.opened("a", "h").slots == 0
    bench.admit(1, "a", "g")
    bench.want("a", 1, "h")
    assert bench.opened("a", "g").slots == 0
    assert bench.opened("a", "h").slots == 0
    bench.usage("a", 1, "g")
    assert bench.opened("a", "h").slots == 0
    bench.usage("a", 0, "g")
    assert bench.opened("a", "h").slots == 1


def test_an_old_confirmation_frees_nothing() -> None:
    """A report that answers an earlier grant doesn't count as giving up a later one."""
    bench = Bench(model("a", slots=2))
    bench.hello("g")
    bench.hello("h")
    bench.want("a", 1, "g")
    bench.come_in("a", slots=2)
    old = bench.opened("a", "g")
    bench.admit(1, "a", "g")
    bench.want("a", 2, "g")
    bench.want("a", 1, "h")
    bench.want("a", 2, "h")
    granted = bench.opened("a", "h").slots
    bench.say(Usage(model="a", epoch=old.epoch, revision=old.revision - 1, in_flight=0), "g")
    assert bench.opened("a", "h").slots == granted


def test_lost_gateway_leaks_no_slot() -> None:
    """The slots and tickets of a gateway whose connection closed are free at once."""
    bench = Bench(model("a", slots=1), model("b"))
    bench.hello("g")
    bench.hello("h")
    bench.want("a", 1, "g")
    bench.come_in("a", slots=1)
    bench.admit(1, "a", "g")
    bench.want("a", 1, "h")
    bench.handle(events.GatewayLost(at=bench.now, gateway="g"))
    assert bench.opened("a", "h").slots == 1


def test_silent_gateway_is_broken_and_holds_up_nothing() -> None:
    """A gateway that says nothing for a term is disconnected, and a drain goes on without it."""
    bench = Bench(term=10.0)
    bench.hello("g")
    bench.hello("h")
    bench.reside("a")
    bench.handle(events.Ensure(at=bench.now, request=1, model="b"))
    bench.drained("a", "g")
    bench.silence(5)
    bench.say(Heartbeat(), "g")
    out = bench.silence(5)
    assert [d.gateway for d in of(out, effects.Disconnect)] == ["h"]
    assert [e.model for e in of(out, effects.PutOut)] == ["a"]


def test_broken_gateway_is_ignored_until_hello() -> None:
    """What a broken gateway says changes nothing before it has said hello again."""
    bench = Bench(term=10.0)
    bench.hello("g")
    bench.silence(10)
    bench.want("a", 1, "g")
    assert bench.state("a") == "absent"
    bench.hello("g")
    bench.want("a", 1, "g")
    assert bench.state("a") == "starting"


def test_heartbeat_is_answered() -> None:
    """A heartbeat comes back, so that a gateway notices a dead connection."""
    bench = Bench()
    bench.hello()
    assert said(bench.say(Heartbeat(n=3)), Heartbeat) == [Heartbeat(n=3)]


def test_returning_gateway_keeps_its_lease() -> None:
    """A gateway that reconnects with the current lease keeps it, with what runs under it."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    held = HeldLease(model="a", epoch=bench.epoch("a"), slots=4, in_flight=3)
    out = bench.hello("g", held)
    assert not said(out, Close)
    assert bench.scheduler.snapshot(bench.now).instances[0].in_flight == 3


def test_lease_on_nothing_is_closed() -> None:
    """A gateway that comes back with a lease on an instance that is gone is told to close it."""
    bench = Bench()
    out = bench.hello("g", HeldLease(model="a", epoch=Epoch(0, 9), slots=4, in_flight=1))
    assert [c.epoch for c in said(out, Close)] == [Epoch(0, 9)]


def test_fault_is_probed_once_and_healthy_engine_is_used_again() -> None:
    """A gateway's fault has the engine looked at; a healthy one is confirmed to the gateway."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    epoch = bench.epoch("a")
    [probe] = of(bench.say(Fault(model="a", epoch=epoch, reason="reset", n=1)), effects.Probe)
    assert not of(bench.say(Fault(model="a", epoch=epoch, reason="reset", n=2)), effects.Probe)
    out = bench.handle(events.Probed(at=bench.now, instance=probe.instance, healthy=True))
    assert [o.faults for o in said(out, Open)] == [2]


def test_fault_of_a_dead_engine_ends_it() -> None:
    """An engine that is found dead after a fault is cleared away like one whose end was seen."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    [probe] = of(bench.say(Fault(model="a", epoch=bench.epoch("a"), reason="reset")), effects.Probe)
    out = bench.handle(events.Probed(at=bench.now, instance=probe.instance, healthy=False, message="refused"))
    assert of(out, effects.PutOut)[0].kill
    assert said(out, Close)


def test_old_epochs_change_nothing() -> None:
    """Messages about an epoch that isn't known are ignored."""
    bench = Bench()
    bench.hello()
    bench.reside("a")
    before = bench.scheduler.snapshot(bench.now)
    bench.say(Usage(model="a", epoch=Epoch(0, 1), revision=0, in_flight=9))
    bench.say(Fault(model="a", epoch=Epoch(0, 1), reason="x"))
    bench.say(Usage(model="b", epoch=Epoch(0, 1), revision=0, in_flight=9))
    assert bench.scheduler.snapshot(bench.now) == before
