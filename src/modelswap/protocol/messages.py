"""The lease protocol: what gateways and the orchestrator say to each other.

Frozen msgspec structs, tagged by their name in snake case, one JSON text frame each. A receiver ignores unknown
fields. Times are durations in milliseconds (``*_ms``), because the two sides share no clock.
"""

from __future__ import annotations

from typing import Final

import msgspec

PROTOCOL_VERSION: Final = 1


def _tag(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=_tag, tag_field="type"):
    """Base of everything said on the wire."""


class Epoch(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Names one opening of one instance; ordered, and never used again.

    ``generation`` grows at every start of an orchestrator, also of one that lost its database; ``n`` grows at
    every opening. A message about an old epoch changes nothing.
    """

    generation: int
    n: int

    def __str__(self) -> str:
        return f"{self.generation}.{self.n}"


# ── gateway → orchestrator ────────────────────────────────────────────────────────────────────────────────


class Want(Message, frozen=True):
    """A request waits at the gateway for ``model``.

    ``ticket`` is unique within the gateway's life; ``age_ms`` is how long the client has waited already;
    ``body_bytes`` is what holding it costs.
    """

    ticket: int
    model: str
    priority: int = 0
    age_ms: int = 0
    body_bytes: int = 0


class HeldLease(msgspec.Struct, frozen=True, kw_only=True):
    """A lease that the gateway still holds when it says hello, with the requests running under it."""

    model: str
    epoch: Epoch
    slots: int
    in_flight: int
    closing: bool = False


class Hello(Message, frozen=True):
    """First message on every connection; replaces all that was known of this gateway."""

    gateway: str
    version: int = PROTOCOL_VERSION
    leases: tuple[HeldLease, ...] = ()
    tickets: tuple[Want, ...] = ()


class Forget(Message, frozen=True):
    """The client behind ``ticket`` has gone, or the gateway itself has answered it."""

    ticket: int


class Admitted(Message, frozen=True):
    """``ticket`` went to its instance under the lease ``epoch``."""

    ticket: int
    model: str
    epoch: Epoch


class Drained(Message, frozen=True):
    """Nothing runs under a closed lease any more, and its idle connections are closed."""

    model: str
    epoch: Epoch


class Usage(Message, frozen=True):
    """What runs under a lease.

    Said at most once a second while something changes; at once on `Contended` and on falling idle while it holds, in
    answer to an `Open` that takes slots away, and on every finished request while more run than there are slots.
    ``revision`` is that of the last `Open` received for this lease on this connection (-1 before the first), and one
    more once it is closed. ``idle_ms`` is how long nothing has run (0 while something does). ``served`` counts requests
    ended under this lease.
    """

    model: str
    epoch: Epoch
    revision: int
    in_flight: int
    served: int = 0
    idle_ms: int = 0


class Fault(Message, frozen=True):
    """A fresh connection under this lease failed before its response's first byte.

    The gateway admits no more under it until an `Open` says that the orchestrator has seen all ``n`` faults.
    """

    model: str
    epoch: Epoch
    reason: str
    n: int = 1


class Heartbeat(Message, frozen=True):
    """Said every third of the term by the gateway, and answered with the same."""

    n: int = 0


GatewayMessage = Hello | Want | Forget | Admitted | Drained | Usage | Fault | Heartbeat


# ── orchestrator → gateway ────────────────────────────────────────────────────────────────────────────────


class CatalogModel(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway must know of a configured model.

    ``upstream_name`` is what the engine calls the model; None if it knows our name and all aliases, so that requests go
    out unchanged. ``adapters`` are names that route here and are never rewritten. ``beside``: it needs no device, and
    is never the current model. ``state`` is the instance's state.
    """

    name: str
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    upstream_name: str | None = None
    priority: int = 0
    engine: str = ""
    beside: bool = False
    state: str = "absent"
    resident: bool = False


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds that a gateway keeps by itself."""

    queue_timeout_ms: int
    queue_requests: int
    queue_bytes: int


class Catalog(Message, frozen=True):
    """Answers `Hello`, and comes again whenever something in it changes.

    ``term_ms`` is how long a gateway may be silent before its leases are broken; one that was paused for longer
    admits nothing before it has said hello again and got this.
    """

    generation: int
    term_ms: int
    limits: Limits
    models: tuple[CatalogModel, ...]


class Open(Message, frozen=True):
    """A lease: send ``model``'s requests to this address, ``slots`` of them at once.

    Sent again with a higher ``revision`` when the share changes. Fewer slots than before must be answered with
    `Usage`, because only then may another gateway get them. An `Open` with a newer epoch ends the lease before it, as
    `Close` would. ``faults`` counts the `Fault` messages about this lease that were looked into.
    """

    model: str
    epoch: Epoch
    host: str
    port: int
    slots: int
    revision: int = 0
    faults: int = 0
    api_key: str | None = None


class Close(Message, frozen=True):
    """Ends a lease: admit no more, close idle connections, say `Drained` when nothing runs.

    ``abort`` (sent later, when draining took too long) ends what still runs with a retryable error.
    """

    model: str
    epoch: Epoch
    abort: bool = False


class Refuse(Message, frozen=True):
    """``ticket`` will not be served; ``code`` is a `modelswap.protocol.errors.Code`."""

    ticket: int
    status: int
    code: str
    message: str
    retry_after_ms: int | None = None
    should_retry: bool | None = None


class Progress(Message, frozen=True):
    """How far ``model`` is from serving this gateway's waiting requests.

    ``ahead`` counts requests of other gateways and models served before this gateway's first one. ``fraction``
    of ``stage`` is in 0..1, or None where it can't be known.
    """

    model: str
    stage: str
    ahead: int = 0
    fraction: float | None = None
    eta_ms: int | None = None


class Contended(Message, frozen=True):
    """Whether requests for another model wait for this one's device (see `Usage`)."""

    model: str
    contended: bool


OrchestratorMessage = Catalog | Open | Close | Refuse | Progress | Contended | Heartbeat
