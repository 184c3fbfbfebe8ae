"""What a gateway holds: leases, and requests that wait. Mutable; owned by `modelswap.core.admission.Admission`."""

from __future__ import annotations

from enum import StrEnum

from modelswap.protocol.messages import Open


class LeaseState(StrEnum):
    """Where a lease is in its life at the gateway."""

    OPEN = "open"
    SUSPENDED = "suspended"
    """Admits nothing until an `Open` confirms it: after a fault, or after this process was paused too long."""
    CLOSING = "closing"


class Lease:
    """Permission to send a model's requests to one address, ``slots`` at once. Mutable; owned by `Admission`."""

    __slots__ = (
        "address",
        "api_key",
        "dirty",
        "epoch",
        "faults",
        "idle_since",
        "in_flight",
        "model",
        "revision",
        "served",
        "slots",
        "state",
    )

    def __init__(self, opened: Open, now: float) -> None:
        self.model = opened.model
        self.epoch = opened.epoch
        self.address = (opened.host, opened.port)
        self.api_key = opened.api_key
        self.slots = opened.slots
        self.revision = opened.revision
        self.faults = 0
        self.in_flight = 0
        self.served = 0
        self.idle_since = now
        self.dirty = False
        self.state = LeaseState.OPEN

    def __repr__(self) -> str:
        return f"<Lease {self.model} {self.epoch} {self.state} {self.in_flight}/{self.slots}>"


class Ticket:
    """One waiting request. ``model`` is None until there is a catalog to look its ``name`` up in."""

    __slots__ = ("bytes", "id", "model", "name", "since")

    def __init__(self, id_: int, name: str, model: str | None, since: float, size: int) -> None:
        self.id = id_
        self.name = name
        self.model = model
        self.since = since
        self.bytes = size
