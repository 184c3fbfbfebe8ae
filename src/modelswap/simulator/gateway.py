"""A gateway worker as the simulator sees it: the real `Admission`, and a shell that sends requests to engines."""

from __future__ import annotations

from dataclasses import dataclass, field

from modelswap.core.admission import TICK, Admission
from modelswap.core.held import Lease
from modelswap.core.outgoing import Abort, Admit, Outgoing, Reconnect, Reject, Reroute, Say
from modelswap.protocol.errors import Code
from modelswap.protocol.messages import OrchestratorMessage, Refuse
from modelswap.simulator.links import Link, Observer
from modelswap.simulator.machine import Machine
from modelswap.simulator.traffic import Outcome, Request, claim

BODY = 100


@dataclass(slots=True, eq=False)
class Gateway:
    """One worker process. Its clock is ``offset`` ahead of the world's: the two sides share none."""

    name: str
    offset: float
    machine: Machine
    observer: Observer
    admission: Admission
    link: Link | None = None
    wants_link: bool = True
    """Its connection is closed, and it must make another."""
    alone_since: float = 0.0
    stopped: bool = False
    woken_at: float = float("-inf")
    """When it last went on after being stopped."""
    next_tick: float = 0.0
    waiting: dict[int, Request] = field(default_factory=dict)
    running: dict[int, tuple[Request, Lease]] = field(default_factory=dict)
    backlog: list[tuple[Request | None, bool]] = field(default_factory=list)
    """What happened while it was stopped: a request ended (well or not), or (None) its connection was closed."""

    # ── what happens to it ───────────────────────────────────────────────────────────────────────────────

    def connect(self, link: Link, now: float) -> None:
        """Say hello: a connection to the orchestrator is open."""
        self.link, self.wants_link = link, False
        self.admission.connect(now + self.offset)
        self._work(now)

    def closed(self, now: float) -> None:
        """See the connection go."""
        if self.stopped:
            self.backlog.append((None, False))
            return
        if self.link is not None:
            self.link, self.wants_link, self.alone_since = None, True, now
            self.admission.disconnect()
            self._work(now)

    def receive(self, message: OrchestratorMessage, now: float) -> None:
        """Take in a message."""
        self.admission.receive(message, now + self.offset)
        self._work(now)

    def tick(self, now: float) -> None:
        """Its timer has gone off."""
        catalog = self.admission.catalog
        self.next_tick = now + (TICK if catalog is None else min(TICK, catalog.term_ms / 3000))
        self.admission.tick(now + self.offset)
        self._work(now)

    def arrive(self, request: Request, now: float) -> None:
        """Take in a client's request."""
        self._route(request, now, first=False)
        self._work(now)

    def leave(self, request: Request, now: float) -> None:
        """See a client go."""
        for ticket, waiting in self.waiting.items():
            if waiting is request:
                del self.waiting[ticket]
                self._end(request, Outcome.GONE, now)
                self.admission.forget(ticket, now + self.offset)
                self._work(now)
                return
        _, lease = self.running.pop(request.id)
        engine = self.machine.at(lease.address)
        if engine is not None:
            engine.running.pop(request.id, None)
        self._end(request, Outcome.GONE, now)
        self.admission.leave(lease, now + self.offset)
        self._work(now)

    def finished(self, request: Request, now: float, *, well: bool) -> None:
        """See a response complete, or its engine die (not ``well``)."""
        if self.stopped:
            self.backlog.append((request, well))
            return
        if request.id not in self.running:
            return
        _, lease = self.running.pop(request.id)
        if well or request.streaming:
            self._end(request, Outcome.ANSWERED if well else Outcome.CUT, now)
            self.admission.leave(lease, now + self.offset)
        else:
            self._failed(request, lease, now)
        self._work(now)

    def go_on(self, now: float) -> None:
        """Run again after being stopped; what happened meanwhile is seen first."""
        self.stopped = False
        self.woken_at = now
        backlog, self.backlog = self.backlog, []
        for request, well in backlog:
            if request is None:
                self.closed(now)
            else:
                self.finished(request, now, well=well)

    def die(self, now: float) -> None:
        """Be killed: clients see closed connections, engines are freed."""
        for request, lease in self.running.values():
            engine = self.machine.at(lease.address)
            if engine is not None:
                engine.running.pop(request.id, None)
            self._end(request, Outcome.LOST, now)
        for request in self.waiting.values():
            self._end(request, Outcome.LOST, now)
        self.running.clear()
        self.waiting.clear()

    # ── its shell ────────────────────────────────────────────────────────────────────────────────────────

    def _route(self, request: Request, now: float, *, first: bool) -> None:
        clock = now + self.offset
        found = self.admission.model_for(request.model)
        if found is not None and not first:
            lease = self.admission.enter(found.name, clock)
            if lease is not None:
                self._send(request, lease, now)
                return
        ticket = self.admission.wait(request.model, request.came + self.offset, clock, BODY, first=first)
        if isinstance(ticket, Refuse):
            self._end(request, Outcome.REFUSED, now, ticket.code)
        else:
            self.waiting[ticket] = request

    def _send(self, request: Request, lease: Lease, now: float) -> None:
        engine = self.machine.at(lease.address)
        if engine is None:
            self._failed(request, lease, now)
            return
        to = f"request {request.id} for {request.model} went from {self.name} under {lease} to {engine.instance}"
        claim(engine.model == request.model, to)
        claim(engine.ready, f"{to}, which isn't ready")
        claim(
            len(engine.running) < engine.slots or engine.disturbed,
            f"{to}, which runs {len(engine.running)} already and has {engine.slots} slots",
        )
        engine.running[request.id] = request
        self.running[request.id] = (request, lease)
        request.sent = now
        self.observer.sent(request)

    def _failed(self, request: Request, lease: Lease, now: float) -> None:
        """Its engine died, or couldn't be reached, before the response's first byte."""
        self.admission.fault(lease, "connection refused", now + self.offset)
        if request.requeued:
            self._end(request, Outcome.REFUSED, now, Code.ENGINE_DIED)
            return
        request.requeued = True
        self._route(request, now, first=True)

    def _work(self, now: float) -> None:
        """Do what `Admission` wants done, in order."""
        while self.admission.pending:
            for item in self.admission.take():
                self._do(item, now)

    def _do(self, item: Outgoing, now: float) -> None:
        match item:
            case Say():
                if self.link is not None:
                    self.link.up.append((now, item.message))
                    self.observer.said(self.link, up=True)
            case Admit():
                self._send(self.waiting.pop(item.ticket), item.lease, now)
            case Reject():
                self._end(self.waiting.pop(item.ticket), Outcome.REFUSED, now, item.refusal.code)
            case Reroute():
                self._route(self.waiting.pop(item.ticket), now, first=False)
            case Abort():
                for request, lease in list(self.running.values()):
                    if lease is item.lease:
                        del self.running[request.id]
                        engine = self.machine.at(lease.address)
                        if engine is not None:
                            engine.running.pop(request.id, None)
                        self._end(request, Outcome.REFUSED, now, Code.DRAIN_ABORTED)
                        self.admission.leave(lease, now + self.offset)
            case Reconnect():
                if self.link is not None:
                    link, self.link = self.link, None
                    link.up.clear()
                    link.down.clear()
                    link.lost_at = now
                    self.wants_link, self.alone_since = True, now
                    self.admission.disconnect()
            case _:
                pass  # pooled connections and progress comments make no difference here

    def _end(self, request: Request, outcome: Outcome, now: float, code: str = "") -> None:
        request.end(outcome, now, code)
        self.observer.ended(request)
