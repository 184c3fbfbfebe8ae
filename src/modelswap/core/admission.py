"""The gateway's half of the lease protocol, pure: who is let through, who waits, what is said.

The gateway's shell calls `Admission.enter` for each request and `Admission.leave` when it has ended; for a resident
model nothing else happens. Everything that is to be done meanwhile is in `Admission.take`, in order, and must be
done in that order. Time is the shell's monotonic clock in seconds; it must go on while the process is stopped.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from modelswap.core.held import Lease, LeaseState, Ticket
from modelswap.core.outgoing import Abort, Admit, CloseIdle, Outgoing, Reconnect, Reject, Reroute, Say, Told
from modelswap.protocol.errors import OUTCOMES, Code
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
    HeldLease,
    Hello,
    Open,
    OrchestratorMessage,
    Progress,
    Refuse,
    Usage,
    Want,
)

TICK: Final = 1.0
"""How often the shell must call `Admission.tick`, in seconds (more often if a third of the term is shorter)."""
_SOONEST_MS: Final = 1_000
_LATEST_MS: Final = 120_000


class Admission:
    """Leases, waiting requests and counts of one gateway worker."""

    def __init__(self, gateway: str) -> None:
        self.gateway = gateway
        self.catalog: Catalog | None = None
        self.connected = False
        self._names: dict[str, CatalogModel] = {}
        self._leases: dict[str, Lease] = {}
        self._closing: dict[tuple[str, Epoch], Lease] = {}
        self._tickets: dict[int, Ticket] = {}
        self._lines: dict[str | None, OrderedDict[int, Ticket]] = {}
        self._contended: set[str] = set()
        self._progress: dict[str, Progress] = {}
        self._waiting_bytes = 0
        self._next_ticket = 1
        self._alive_at: float | None = None
        self._beat_at = 0.0
        self._reconnecting = False
        self._term = float("inf")
        self._out: list[Outgoing] = []

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────

    def model_for(self, name: str) -> CatalogModel | None:
        """Return the model that ``name`` (its name, an alias or an adapter) routes to; None if there is none."""
        return self._names.get(name)

    def enter(self, model: str, now: float) -> Lease | None:
        """Take a slot, if one is free and nobody waits for it; else the request must `wait`."""
        self._notice_pause(now)
        lease = self._leases.get(model)
        if lease is None or lease.state is not LeaseState.OPEN or lease.in_flight >= lease.slots:
            return None
        if self._lines.get(model):
            return None
        lease.in_flight += 1
        lease.dirty = True
        return lease

    def leave(self, lease: Lease, now: float) -> None:
        """Give back a slot: a request under ``lease`` has ended, however."""
        self._notice_pause(now)
        lease.in_flight -= 1
        lease.served += 1
        lease.dirty = True
        self._after_leaving(lease, now)

    def wait(self, name: str, since: float, now: float, size: int, *, first: bool = False) -> int | Refuse:
        """Queue a request for ``name``; returns its ticket, or the refusal to answer with.

        ``since`` is when the client's request came; ``size`` its body's bytes. ``first`` puts it before the others
        (it had been admitted once, and its engine died).
        """
        self._notice_pause(now)
        found = self._names.get(name)
        model = found.name if found is not None else None
        id_ = self._next_ticket
        if self.catalog is not None:
            if found is None:
                return _refusal(id_, Code.MODEL_NOT_FOUND, self.unknown(name))
            limits = self.catalog.limits
            full = len(self._tickets) >= limits.queue_requests or self._waiting_bytes + size > limits.queue_bytes
            if full and not first:
                told = self._progress.get(found.name)
                message = f"{len(self._tickets)} requests wait already; come back later"
                return _refusal(id_, Code.QUEUE_FULL, message, None if told is None else told.eta_ms)
        self._next_ticket += 1
        ticket = Ticket(id_, name, model, since, size)
        self._tickets[id_] = ticket
        line = self._lines.setdefault(model, OrderedDict())
        line[id_] = ticket
        if first:
            # Several may come back at once, last one first: they keep the order in which they came.
            self._lines[model] = OrderedDict(sorted(line.items(), key=lambda item: (item[1].since, item[0] != id_)))
        self._waiting_bytes += size
        if model is not None:
            self._say(self._want(ticket, now))
            lease = self._leases.get(model)
            if lease is not None:  # a slot may have been freed since `enter`, or it queued behind others
                self._admit_waiting(lease, now)
        return id_

    def forget(self, ticket: int, now: float) -> None:
        """Take a waiting request away: its client has gone, or the shell has answered it."""
        if self._remove(ticket) is not None:
            self._say(Forget(ticket=ticket))

    def fault(self, lease: Lease, reason: str, now: float) -> None:
        """Give back a slot: a fresh connection failed before its first response byte. The lease is suspended."""
        self._notice_pause(now)
        lease.in_flight -= 1
        lease.dirty = True
        if lease.state is not LeaseState.CLOSING:
            lease.state = LeaseState.SUSPENDED
            lease.faults += 1
            self._say(Fault(model=lease.model, epoch=lease.epoch, reason=reason, n=lease.faults))
        self._after_leaving(lease, now)

    def progress(self, ticket: int) -> tuple[int, Progress | None]:
        """Return a waiting request's position (1 is next) and what was last said of its model."""
        waiting = self._tickets.get(ticket)
        if waiting is None:
            return 0, None
        told = self._progress.get(waiting.model) if waiting.model is not None else None
        position = 1
        for other in self._lines[waiting.model]:
            if other == ticket:
                break
            position += 1
        return position + (told.ahead if told is not None else 0), told

    def unknown(self, name: str) -> str:
        """Return the message for a model that isn't configured, with the names there are."""
        models = ", ".join(sorted(m.name for m in self.catalog.models)) if self.catalog else ""
        return f"The model '{name}' does not exist; there are: {models or 'none'}"

    # ── the connection ───────────────────────────────────────────────────────────────────────────────────

    def connect(self, now: float) -> None:
        """Say hello, with all that is still held: a connection to the orchestrator is open."""
        self.connected = True
        self._reconnecting = False
        for key in [key for key, lease in self._closing.items() if lease.in_flight == 0]:
            del self._closing[key]
        leases = [*self._closing.values(), *self._leases.values()]
        for lease in leases:
            lease.revision = -1  # the other side counts its words anew from this hello on
        held = tuple(
            HeldLease(
                model=lease.model,
                epoch=lease.epoch,
                slots=lease.slots,
                in_flight=lease.in_flight,
                closing=lease.state is LeaseState.CLOSING,
            )
            for lease in leases
        )
        tickets = tuple(self._want(ticket, now) for ticket in self._tickets.values() if ticket.model is not None)
        self._say(Hello(gateway=self.gateway, leases=held, tickets=tickets))
        for lease in leases:
            if lease.faults and lease.state is LeaseState.SUSPENDED:
                self._say(Fault(model=lease.model, epoch=lease.epoch, reason="before reconnecting", n=lease.faults))

    def disconnect(self) -> None:
        """Go on with what is held and keep the rest waiting: the connection is gone."""
        self.connected = False
        self._contended.clear()

    def receive(self, message: OrchestratorMessage, now: float) -> None:
        """Take in what the orchestrator said."""
        self._notice_pause(now)
        if self._reconnecting:
            return  # said before it could know of the pause; the next hello has everything said anew
        match message:
            case Open():
                self._open(message, now)
            case Close():
                self._close(message, now)
            case Refuse():
                if self._remove(message.ticket) is not None:
                    self._out.append(Reject(message.ticket, message))
            case Progress():
                self._progress[message.model] = message
                self._out.append(Told(message.model))
            case Contended():
                self._set_contended(message, now)
            case Catalog():
                self._set_catalog(message)
            case Heartbeat():
                pass

    def tick(self, now: float) -> None:
        """Notice a pause, report usage, show that we live, answer who has waited too long."""
        self._notice_pause(now)
        self._alive_at = now
        for lease in [*self._leases.values(), *self._closing.values()]:
            if lease.dirty:
                self._say(self._usage(lease, now))
        if now - self._beat_at >= self._term / 3 - TICK / 2:
            # Whatever else was said: only a heartbeat is answered, and so shows that the orchestrator lives.
            self._beat_at = now
            self._say(Heartbeat())
        self._expire(now)

    def take(self) -> list[Outgoing]:
        """Return what is to be done since the last call, in order."""
        out = self._out
        if out:
            self._out = []
        return out

    @property
    def pending(self) -> bool:
        """Whether `take` would return anything."""
        return bool(self._out)

    # ── views ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._tickets)

    @property
    def leases(self) -> list[Lease]:
        """Every lease that is open or still has something running."""
        return [*self._leases.values(), *self._closing.values()]

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────

    def _say(self, message: GatewayMessage) -> None:
        # While disconnected nothing is said: the next hello tells everything.
        if self.connected and not self._reconnecting:
            self._out.append(Say(message))

    def _want(self, ticket: Ticket, now: float) -> Want:
        assert ticket.model is not None  # noqa: S101 - for the type checker: only such tickets are told
        found = self._names.get(ticket.name)
        return Want(
            ticket=ticket.id,
            model=ticket.model,
            priority=found.priority if found is not None else 0,
            age_ms=max(0, int((now - ticket.since) * 1000)),
            body_bytes=ticket.bytes,
        )

    def _usage(self, lease: Lease, now: float) -> Usage:
        lease.dirty = lease.in_flight > 0  # while something runs, say so again at the next tick
        return Usage(
            model=lease.model,
            epoch=lease.epoch,
            revision=lease.revision,
            in_flight=lease.in_flight,
            served=lease.served,
            idle_ms=0 if lease.in_flight else max(0, int((now - lease.idle_since) * 1000)),
        )

    def _after_leaving(self, lease: Lease, now: float) -> None:
        if lease.in_flight == 0:
            lease.idle_since = now
        if lease.state is LeaseState.CLOSING:
            if lease.in_flight == 0:
                self._drained(lease, now)
            return
        over = lease.in_flight >= lease.slots
        if self._lines.get(lease.model):
            self._admit_waiting(lease, now)
        if over or (lease.in_flight == 0 and lease.model in self._contended):
            self._say(self._usage(lease, now))

    def _admit_waiting(self, lease: Lease, now: float) -> None:
        line = self._lines.get(lease.model)
        while line and lease.state is LeaseState.OPEN and lease.in_flight < lease.slots:
            id_ = next(iter(line))
            self._remove(id_)
            lease.in_flight += 1
            lease.dirty = True
            self._say(Admitted(ticket=id_, model=lease.model, epoch=lease.epoch))
            self._out.append(Admit(id_, lease))

    def _remove(self, id_: int) -> Ticket | None:
        ticket = self._tickets.pop(id_, None)
        if ticket is not None:
            del self._lines[ticket.model][id_]
            self._waiting_bytes -= ticket.bytes
        return ticket

    def _drained(self, lease: Lease, now: float) -> None:
        self._closing.pop((lease.model, lease.epoch), None)
        self._out.append(CloseIdle(lease))
        self._say(Drained(model=lease.model, epoch=lease.epoch))

    def _start_closing(self, lease: Lease, now: float) -> None:
        del self._leases[lease.model]
        lease.state = LeaseState.CLOSING
        lease.revision += 1  # a close is a word, too: usage then tells whether it was said before or after
        self._closing[lease.model, lease.epoch] = lease
        if lease.in_flight == 0:
            self._drained(lease, now)
        else:
            self._out.append(CloseIdle(lease))
            self._say(self._usage(lease, now))

    def _open(self, opened: Open, now: float) -> None:
        lease = self._leases.get(opened.model)
        if lease is not None and opened.epoch < lease.epoch:
            return
        if lease is None or opened.epoch > lease.epoch:
            if (opened.model, opened.epoch) in self._closing:
                return
            if lease is not None:
                self._start_closing(lease, now)
            lease = self._leases[opened.model] = Lease(opened, now)
            self._contended.discard(opened.model)
        else:
            fewer = opened.slots < lease.slots
            lease.slots = opened.slots
            lease.revision = opened.revision
            if lease.state is LeaseState.SUSPENDED and opened.faults >= lease.faults:
                lease.state = LeaseState.OPEN
            if fewer:
                self._say(self._usage(lease, now))
        self._admit_waiting(lease, now)

    def _close(self, close: Close, now: float) -> None:
        lease = self._leases.get(close.model)
        if lease is not None and lease.epoch == close.epoch:
            self._start_closing(lease, now)
        closing = self._closing.get((close.model, close.epoch))
        if closing is None:
            if lease is None or lease.epoch != close.epoch:
                # Told of a lease that isn't held (any more): nothing runs under it.
                self._say(Drained(model=close.model, epoch=close.epoch))
        elif close.abort:
            self._out.append(Abort(closing))

    def _set_contended(self, message: Contended, now: float) -> None:
        if not message.contended:
            self._contended.discard(message.model)
            return
        self._contended.add(message.model)
        lease = self._leases.get(message.model)
        if lease is not None:
            self._say(self._usage(lease, now))

    def _set_catalog(self, catalog: Catalog) -> None:
        first = self.catalog is None
        self.catalog = catalog
        self._term = catalog.term_ms / 1000
        names: dict[str, CatalogModel] = {}
        for model in catalog.models:
            for name in (model.name, *model.aliases, *model.adapters):
                names[name] = model
        self._names = names
        if first:
            for id_ in list(self._lines.get(None, ())):
                self._remove(id_)
                self._out.append(Reroute(id_))
        for ticket in [t for t in self._tickets.values() if t.model is not None and t.name not in names]:
            self._remove(ticket.id)
            # The orchestrator has dropped a removed model's tickets by itself.
            self._out.append(Reject(ticket.id, _refusal(ticket.id, Code.MODEL_NOT_FOUND, self.unknown(ticket.name))))

    def _notice_pause(self, now: float) -> None:
        # Half a term after the last tick, because that may have been a third of the term after we last said something.
        if self._alive_at is None or now - self._alive_at <= self._term / 2:
            return
        # Our leases may have been broken meanwhile, so nothing is admitted until each has been confirmed.
        self._alive_at = now
        self._reconnecting = True
        for lease in self._leases.values():
            lease.state = LeaseState.SUSPENDED
        self._out.append(Reconnect())

    def _expire(self, now: float) -> None:
        if self.catalog is None:
            return
        bound = self.catalog.limits.queue_timeout_ms / 1000
        for ticket in [t for t in self._tickets.values() if now - t.since >= bound]:
            self._remove(ticket.id)
            self._say(Forget(ticket=ticket.id))
            message = f"No turn for '{ticket.name}' within {bound:.0f} s (scheduling.queue_timeout)"
            self._out.append(Reject(ticket.id, _refusal(ticket.id, Code.QUEUE_TIMEOUT, message)))


def _refusal(ticket: int, code: Code, message: str, eta_ms: int | None = None) -> Refuse:
    """Return a refusal of our own; ``eta_ms`` is when there may be room, where that is known."""
    outcome = OUTCOMES[code]
    return Refuse(
        ticket=ticket,
        status=outcome.status,
        code=code,
        message=message,
        retry_after_ms=outcome.retry_after_ms if eta_ms is None else min(max(eta_ms, _SOONEST_MS), _LATEST_MS),
        should_retry=outcome.should_retry,
    )
