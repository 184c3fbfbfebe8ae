"""What a gateway's shell is to do, as `modelswap.core.admission.Admission.take` returns it."""

from __future__ import annotations

import msgspec

from modelswap.core.held import Lease
from modelswap.protocol.messages import GatewayMessage, Refuse


class Say(msgspec.Struct, frozen=True):
    """Send a message to the orchestrator."""

    message: GatewayMessage


class Admit(msgspec.Struct, frozen=True):
    """Send this waiting request upstream; it already counts as running under ``lease``."""

    ticket: int
    lease: Lease


class Reject(msgspec.Struct, frozen=True):
    """Answer this waiting request with an error."""

    ticket: int
    refusal: Refuse


class Reroute(msgspec.Struct, frozen=True):
    """The first catalog is here: look this request's model up again; its ticket is void."""

    ticket: int


class CloseIdle(msgspec.Struct, frozen=True):
    """Close the idle upstream connections of this lease, and pool no more of them."""

    lease: Lease


class Abort(msgspec.Struct, frozen=True):
    """End what still runs under this lease with `Code.DRAIN_ABORTED`; each then calls `Admission.leave`."""

    lease: Lease


class Reconnect(msgspec.Struct, frozen=True):
    """Close the connection to the orchestrator and make a new one: our process was paused too long."""


class Told(msgspec.Struct, frozen=True):
    """The waiting requests of ``model`` have moved on; see `Admission.progress`."""

    model: str


Outgoing = Say | Admit | Reject | Reroute | CloseIdle | Abort | Reconnect | Told
