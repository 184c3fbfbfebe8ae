"""The gateway's half of the lease protocol."""

from __future__ import annotations

from typing import TypeVar

import pytest

from modelswap.core.admission import Admission
from modelswap.core.held import Lease
from modelswap.core.outgoing import Abort, Admit, CloseIdle, Outgoing, Reconnect, Reject, Reroute, Say, Told
from modelswap.protocol.messages import (
    Admitted,
    Catalog,
    CatalogModel,
    Close,
    Contended,
    Drained,
    Epoch,
    Fault,
    Forget,
    GatewayMessage,
    Heartbeat,
    Hello,
    Limits,
    Open,
    Progress,
    Refuse,
    Usage,
    Want,
)

T = TypeVar("T", bound=Outgoing)
G = TypeVar("G", bound=GatewayMessage)

E1, E2 = Epoch(1, 1), Epoch(1, 2)


def catalog(*names: str, requests: int = 10, timeout: float = 100.0) -> Catalog:
    """A catalog of models, the first with an alias and an adapter."""
    models = tuple(
        CatalogModel(name=name, aliases=(f"{name}-alias",), adapters=(f"{name}-lora",)) for name in names or ("a", "b")
    )
    limits = Limits(queue_timeout_ms=int(timeout * 1000), queue_requests=requests, queue_bytes=1000)
    return Catalog(generation=1, term_ms=10_000, limits=limits, models=models)


def gateway(*, told: bool = True, **limits: float) -> Admission:
    """A connected gateway that has said hello and knows its catalog."""
    admission = Admission("g")
    admission.tick(0.0)
    admission.connect(0.0)
    if told:
        admission.receive(catalog(**limits), 0.0)  # type: ignore[arg-type]
    admission.take()
    return admission


def opened(model: str = "a", epoch: Epoch = E1, slots: int = 2, revision: int = 0, faults: int = 0) -> Open:
    """A lease."""
    return Open(model=model, epoch=epoch, host="127.0.0.1", port=9000, slots=slots, revision=revision, faults=faults)


def wait(admission: Admission, name: str = "a", *, at: float = 0.0, size: int = 0, first: bool = False) -> int:
    """Queue a request; it must get a ticket."""
    ticket = admission.wait(name, at, at, size, first=first)
    assert isinstance(ticket, int)
    return ticket


def enter(admission: Admission, at: float = 0.0) -> Lease:
    """Let a request through; it must get a slot."""
    lease = admission.enter("a", at)
    assert lease is not None
    return lease


def of(out: list[Outgoing], kind: type[T]) -> list[T]:
    """What is to be done of one kind."""
    return [o for o in out if isinstance(o, kind)]


def said(out: list[Outgoing], kind: type[G]) -> list[G]:
    """What is said of one kind."""
    return [o.message for o in of(out, Say) if isinstance(o.message, kind)]


def test_names_route_to_models() -> None:
    """A model's name, aliases and adapters route to it, and nothing else does."""
    admission = gateway()
    for name in ("a", "a-alias", "a-lora"):
        found = admission.model_for(name)
        assert found is not None
        assert found.name == "a"
    assert admission.model_for("c") is None


def test_resident_model_costs_no_message() -> None:
    """While slots are free, entering and leaving says nothing."""
    admission = gateway()
    admission.receive(opened(), 0.0)
    admission.take()
    for _ in range(5):
        admission.leave(enter(admission), 0.0)
    assert not admission.pending


def test_excess_waits_and_is_admitted_in_order() -> None:
    """Beyond the slots requests wait; each that ends lets the first one in."""
    admission = gateway()
    admission.receive(opened(slots=1), 0.0)
    lease = enter(admission)
    assert admission.enter("a", 0.0) is None
    tickets = [wait(admission), wait(admission)]
    assert [w.ticket for w in said(admission.take(), Want)] == tickets
    admission.leave(lease, 1.0)
    out = admission.take()
    assert [a.ticket for a in of(out, Admit)] == tickets[:1]
    assert [a.ticket for a in said(out, Admitted)] == tickets[:1]


def test_newcomers_do_not_overtake() -> None:
    """A request doesn't take a slot that others wait for."""
    admission = gateway()
    wait(admission)
    admission.receive(opened(slots=0), 0.0)
    admission.take()
    assert admission.enter("a", 0.0) is None


def test_open_admits_who_waits_up_to_its_slots() -> None:
    """A new lease lets in as many as it has slots."""
    admission = gateway()
    tickets = [wait(admission) for _ in range(3)]
    admission.receive(opened(slots=2), 0.0)
    assert [a.ticket for a in of(admission.take(), Admit)] == tickets[:2]


def test_close_drains() -> None:
    """A closed lease admits nothing, closes idle connections at once, and is drained when the last request ends."""
    admission = gateway()
    admission.receive(opened(), 0.0)
    lease = enter(admission)
    admission.receive(Close(model="a", epoch=E1), 1.0)
    out = admission.take()
    assert of(out, CloseIdle)
    assert not said(out, Drained)
    assert admission.enter("a", 1.0) is None
    admission.leave(lease, 2.0)
    out = admission.take()
    assert [type(o) for o in out] == [CloseIdle, Say]
    assert said(out, Drained) == [Drained(model="a", epoch=E1)]


def test_close_of_an_unknown_lease_is_drained() -> None:
    """A lease that isn't held has nothing running under it."""
    admission = gateway()
    admission.receive(Close(model="a", epoch=E2), 0.0)
    assert said(admission.take(), Drained) == [Drained(model="a", epoch=E2)]


def test_newer_epoch_ends_the_older_lease() -> None:
    """An opening under a newer epoch takes over; what runs under the old one finishes there."""
    admission = gateway()
    admission.receive(opened(), 0.0)
    old = enter(admission)
    admission.receive(opened(epoch=E2), 1.0)
    assert enter(admission, 1.0).epoch == E2
    admission.take()
    admission.leave(old, 2.0)
    assert [d.epoch for d in said(admission.take(), Drained)] == [E1]
    admission.receive(opened(epoch=E1), 3.0)
    assert enter(admission, 3.0).epoch == E2


def test_abort_ends_what_runs() -> None:
    """A close with abort asks the shell to end the lease's requests."""
    admission = gateway()
    admission.receive(opened(), 0.0)
    lease = enter(admission)
    admission.receive(Close(model="a", epoch=E1), 0.0)
    admission.receive(Close(model="a", epoch=E1, abort=True), 5.0)
    assert [a.lease for a in of(admission.take(), Abort)] == [lease]


def test_fewer_slots_are_confirmed() -> None:
    """Slots that are taken away are confirmed at once, and again as what runs beyond them ends."""
    admission = gateway()
    admission.receive(opened(slots=2), 0.0)
    leases = [enter(admission), enter(admission)]
    admission.receive(opened(slots=0, revision=1), 0.0)
    assert [(u.revision, u.in_flight) for u in said(admission.take(), Usage)] == [(1, 2)]
    admission.leave(leases[0], 1.0)
    assert [u.in_flight for u in said(admission.take(), Usage)] == [1]


def test_fault_suspends_until_it_was_looked_into() -> None:
    """After a fault nothing is admitted until an open says that this very fault was seen."""
    admission = gateway()
    admission.receive(opened(), 0.0)
    admission.fault(enter(admission), "reset", 0.0)
    assert [f.n for f in said(admission.take(), Fault)] == [1]
    assert admission.enter("a", 0.0) is None
    admission.receive(opened(revision=1), 0.0)  # was on its way before the fault was heard
    assert admission.enter("a", 0.0) is None
    admission.receive(opened(revision=2, faults=1), 0.0)
    assert admission.enter("a", 0.0) is not None


def test_requeued_request_is_first() -> None:
    """A request whose engine died waits before the others."""
    admission = gateway()
    later = wait(admission)
    again = wait(admission, first=True)
    admission.receive(opened(slots=2), 0.0)
    assert [a.ticket for a in of(admission.take(), Admit)] == [again, later]


def test_usage_is_said_on_ticks_and_at_once_when_contended_and_idle() -> None:
    """Reports come once a tick; falling idle is told at once while others wait."""
    admission = gateway()
    admission.receive(opened(), 0.0)
    lease = enter(admission)
    admission.tick(1.0)
    assert [u.in_flight for u in said(admission.take(), Usage)] == [1]
    admission.leave(lease, 1.5)
    assert not said(admission.take(), Usage)
    admission.receive(Contended(model="a", contended=True), 2.0)
    assert [u.in_flight for u in said(admission.take(), Usage)] == [0]
    lease = enter(admission, 3.0)
    admission.leave(lease, 4.0)
    assert [u.in_flight for u in said(admission.take(), Usage)] == [0]
    admission.receive(Contended(model="a", contended=False), 5.0)
    admission.leave(enter(admission, 5.0), 5.5)
    assert not said(admission.take(), Usage)


def test_heartbeats_go_on_while_usage_is_said() -> None:
    """A busy gateway says heartbeats, too: only they are answered."""
    admission = gateway()
    admission.receive(opened(), 0.0)
    enter(admission)
    beats = 0
    for second in range(1, 11):
        admission.tick(float(second))
        beats += len(said(admission.take(), Heartbeat))
    assert beats >= 3


def test_pause_longer_than_the_term_suspends_everything() -> None:
    """A process that was stopped for a term admits nothing before it was confirmed anew."""
    admission = gateway()
    admission.receive(opened(), 0.0)
    admission.take()
    assert admission.enter("a", 11.0) is None
    assert of(admission.take(), Reconnect)
    admission.disconnect()
    admission.connect(11.1)
    assert [lease.epoch for lease in said(admission.take(), Hello)[0].leases] == [E1]
    admission.receive(catalog(), 11.2)
    assert admission.enter("a", 11.2) is None
    admission.receive(opened(revision=1), 11.3)
    assert admission.enter("a", 11.3) is not None


def test_serves_while_disconnected_and_tells_all_in_hello() -> None:
    """Without the orchestrator, what is resident is served, the rest waits, and the next hello tells it."""
    admission = gateway()
    admission.receive(opened(slots=1), 0.0)
    admission.take()
    admission.disconnect()
    enter(admission, 1.0)
    ticket = wait(admission, "b", at=1.0, size=7)
    assert not admission.pending
    admission.connect(3.0)
    [hello] = said(admission.take(), Hello)
    assert [(h.epoch, h.in_flight, h.slots) for h in hello.leases] == [(E1, 1, 1)]
    assert [(w.ticket, w.model, w.age_ms, w.body_bytes) for w in hello.tickets] == [(ticket, "b", 2000, 7)]


def test_unknown_models_and_full_queues_are_refused_locally() -> None:
    """What can't wait is answered without asking."""
    admission = gateway(requests=1)
    refusal = admission.wait("nope", 0.0, 0.0, 0)
    assert isinstance(refusal, Refuse)
    assert (refusal.status, refusal.code) == (404, "model_not_found")
    assert "a, b" in refusal.message
    wait(admission)
    refusal = admission.wait("a", 0.0, 0.0, 0)
    assert isinstance(refusal, Refuse)
    assert (refusal.code, refusal.retry_after_ms) == ("queue_full", 5_000)
    too_big = gateway().wait("a", 0.0, 0.0, 2000)
    assert isinstance(too_big, Refuse)


@pytest.mark.parametrize(("eta", "retry"), [(30_000, 30_000), (0, 1_000), (10**9, 120_000), (None, 5_000)])
def test_a_full_queue_says_when_to_come_back(eta: int | None, retry: int) -> None:
    """By what the orchestrator measured and told of the model, within reason."""
    admission = gateway(requests=1)
    wait(admission)
    admission.receive(Progress(model="a", stage="loading", eta_ms=eta), 0.0)
    refusal = admission.wait("a", 0.0, 0.0, 0)
    assert isinstance(refusal, Refuse)
    assert refusal.retry_after_ms == retry


def test_requests_before_the_first_catalog_are_routed_again() -> None:
    """Until it is known which models there are, requests wait; then each is routed anew."""
    admission = gateway(told=False)
    ticket = wait(admission, "a")
    admission.receive(catalog(), 0.0)
    assert [r.ticket for r in of(admission.take(), Reroute)] == [ticket]
    assert admission.waiting == 0


def test_removed_models_are_told() -> None:
    """Who waits for a model that was taken out of the config is told."""
    admission = gateway()
    ticket = wait(admission, "b")
    admission.receive(catalog("a"), 0.0)
    [rejected] = of(admission.take(), Reject)
    assert (rejected.ticket, rejected.refusal.status) == (ticket, 404)


def test_waiting_too_long_is_answered() -> None:
    """Who has waited for queue_timeout is told, and the orchestrator forgets the ticket."""
    admission = gateway(timeout=5.0)
    ticket = wait(admission)
    for second in range(1, 6):
        admission.tick(float(second))
    out = admission.take()
    assert [(r.ticket, r.refusal.status) for r in of(out, Reject)] == [(ticket, 504)]
    assert [f.ticket for f in said(out, Forget)] == [ticket]


def test_refusal_and_forgetting() -> None:
    """A refused ticket is answered once; one that was forgotten isn't answered at all."""
    admission = gateway()
    ticket = wait(admission)
    refusal = Refuse(ticket=ticket, status=503, code="queue_full", message="full")
    admission.receive(refusal, 0.0)
    admission.receive(refusal, 0.0)
    assert len(of(admission.take(), Reject)) == 1
    gone = wait(admission)
    admission.forget(gone, 0.0)
    admission.forget(gone, 0.0)
    assert [f.ticket for f in said(admission.take(), Forget)] == [gone]


def test_progress_and_positions() -> None:
    """A waiting request knows its position, others' requests included, and its model's stage."""
    admission = gateway()
    first, second = wait(admission), wait(admission)
    admission.receive(Progress(model="a", stage="loading", ahead=3), 0.0)
    assert of(admission.take(), Told) == [Told("a")]
    assert [admission.progress(t)[0] for t in (first, second)] == [4, 5]
    told = admission.progress(first)[1]
    assert told is not None
    assert told.stage == "loading"
    assert admission.progress(99) == (0, None)


def test_requeued_requests_keep_their_order() -> None:
    """Requests whose engine died come back in the order in which they came, whatever order their ends were seen in."""
    admission = gateway()
    late = wait(admission, at=3.0)
    second = wait(admission, at=2.0, first=True)
    oldest = wait(admission, at=1.0, first=True)
    admission.receive(opened(slots=3), 4.0)
    assert [a.ticket for a in of(admission.take(), Admit)] == [oldest, second, late]
