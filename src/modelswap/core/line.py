"""Waiting requests: who waits for which model, in which order. Every operation is O(log n) in waiting tickets."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

ADMIN: Final = ""
"""Stands in a ticket's key where a gateway's id would be, for tickets of the admin API."""

TicketKey = tuple[str, int]
"""Gateway and the ticket's number there."""


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """One waiting request. ``rank`` orders tickets: when it arrived, earlier for a higher priority, in seconds."""

    key: TicketKey
    model: str
    arrived: float
    rank: float
    bytes: int = 0
    floor_of: str | None = None
    """The instance that must serve this ticket before it may be put out (the gate floor)."""

    @property
    def gateway(self) -> str:
        """The gateway that holds the request, or `ADMIN`."""
        return self.key[0]

    @property
    def urgent(self) -> bool:
        """Whether an operator asked, who waits for no policy."""
        return self.key[0] == ADMIN


@dataclass(slots=True)
class _Heap:
    """A heap of one gateway's tickets for one model; tickets that have left are dropped when they surface."""

    entries: list[tuple[float, int, Ticket]] = field(default_factory=list)
    live: int = 0


class Line:
    """The tickets that wait for one model."""

    __slots__ = ("_heaps", "bytes", "count")

    def __init__(self) -> None:
        self._heaps: dict[str, _Heap] = {}
        self.count = 0
        self.bytes = 0

    def gateways(self) -> Iterator[str]:
        """Yield every gateway that has tickets here."""
        return (gateway for gateway, heap in self._heaps.items() if heap.live)

    def waiting_at(self, gateway: str) -> int:
        """Return how many of ``gateway``'s tickets wait here."""
        heap = self._heaps.get(gateway)
        return heap.live if heap is not None else 0


class WaitingRoom:
    """All lines."""

    def __init__(self) -> None:
        self._tickets: dict[TicketKey, Ticket] = {}
        self._lines: dict[str, Line] = {}
        self._by_gateway: dict[str, dict[TicketKey, Ticket]] = {}
        self._sequence = 0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets.values())

    def __contains__(self, key: TicketKey) -> bool:
        return key in self._tickets

    def get(self, key: TicketKey) -> Ticket | None:
        """Return the ticket, if it still waits."""
        return self._tickets.get(key)

    def line(self, model: str) -> Line:
        """Return the line for ``model``, which may be empty."""
        line = self._lines.get(model)
        if line is None:
            line = self._lines[model] = Line()
        return line

    def models(self) -> Iterator[str]:
        """Yield every model that somebody waits for."""
        return (model for model, line in self._lines.items() if line.count)

    def add(self, ticket: Ticket) -> None:
        """Let ``ticket`` wait; its key must be new."""
        self._tickets[ticket.key] = ticket
        self._by_gateway.setdefault(ticket.gateway, {})[ticket.key] = ticket
        line = self.line(ticket.model)
        heap = line._heaps.setdefault(ticket.gateway, _Heap())
        self._sequence += 1
        heapq.heappush(heap.entries, (ticket.rank, self._sequence, ticket))
        heap.live += 1
        line.count += 1
        line.bytes += ticket.bytes
        self.bytes += ticket.bytes

    def remove(self, key: TicketKey) -> Ticket | None:
        """Take a ticket out and return it; None if it doesn't wait."""
        ticket = self._tickets.pop(key, None)
        if ticket is None:
            return None
        del self._by_gateway[ticket.gateway][key]
        line = self._lines[ticket.model]
        line._heaps[ticket.gateway].live -= 1
        line.count -= 1
        line.bytes -= ticket.bytes
        self.bytes -= ticket.bytes
        return ticket

    def of_gateway(self, gateway: str) -> list[Ticket]:
        """Return all of a gateway's tickets."""
        return list(self._by_gateway.get(gateway, {}).values())

    def of_model(self, model: str) -> list[Ticket]:
        """Return all tickets for ``model``."""
        return [ticket for ticket in self._tickets.values() if ticket.model == model]

    def head(self, model: str, gateway: str | None = None) -> Ticket | None:
        """Return the first ticket for ``model`` (of one ``gateway``, if given)."""
        line = self._lines.get(model)
        if line is None or not line.count:
            return None
        if gateway is not None:
            return self._head(line, gateway)
        heads = [head for name in list(line._heaps) if (head := self._head(line, name)) is not None]
        return min(heads, key=lambda ticket: ticket.rank, default=None)

    def oldest(self, model: str) -> float | None:
        """Return when the first ticket in rank for ``model`` arrived; for views, where that is near enough."""
        head = self.head(model)
        return head.arrived if head is not None else None

    def _head(self, line: Line, gateway: str) -> Ticket | None:
        heap = line._heaps.get(gateway)
        if heap is None:
            return None
        if not heap.live:
            del line._heaps[gateway]
            return None
        entries = heap.entries
        while self._tickets.get(entries[0][2].key) is not entries[0][2]:
            heapq.heappop(entries)
        return entries[0][2]
