"""The orchestrator's half of a lease, and how an instance's slots are shared between gateways. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from modelswap.protocol.messages import Epoch


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """One gateway's lease on one instance.

    ``granted`` is what it was last told; ``upper`` is the most it may be using, which is more for as long as it hasn't
    confirmed that it gave slots up. The sum of ``upper`` never exceeds the instance's slots.
    """

    gateway: str
    epoch: Epoch
    granted: int = 0
    revision: int = 0
    upper: int = 0
    in_flight: int = 0
    idle_since: float = 0.0
    served: int = 0
    closing: bool = False
    ended: bool = False
    """The gateway has been told that it is closed; only then does what it reports bound what it may use."""
    stale: bool = False
    """Its counts are from before it was told that others wait; a new report is on its way."""
    faults: int = 0
    """How many faults the gateway has told of."""
    faults_seen: int = 0
    """How many of them were looked into."""
    told: list[tuple[int, int]] = field(default_factory=list)
    """Revisions and slots that the gateway was told and may still go by, oldest first."""

    def grant(self, slots: int) -> None:
        """Note that the gateway is being told ``slots``."""
        if not self.told:
            self.told.append((self.revision, self.granted))
        self.granted = slots
        self.revision += 1
        self.told.append((self.revision, slots))
        self.upper = max(self.upper, slots)

    def end(self) -> None:
        """Note that the gateway is being told that the lease is closed, which both sides count as a word."""
        self.closing = True
        if not self.ended:
            self.ended = True
            self.grant(0)

    def report(self, revision: int, in_flight: int, idle_since: float) -> None:
        """Take in a usage report."""
        self.in_flight = in_flight
        self.idle_since = idle_since
        self.stale = False
        self.told = [told for told in self.told if told[0] >= revision]
        self.upper = max(self.granted, in_flight, *(slots for _, slots in self.told))


@dataclass(slots=True, kw_only=True)
class Claim:
    """What one gateway could use of an instance: running and waiting requests, and its first waiter's rank."""

    gateway: str
    running: int
    waiting: int
    rank: float

    @property
    def need(self) -> int:
        """Slots it could fill now."""
        return self.running + self.waiting


def shares(slots: int, claims: Sequence[Claim]) -> dict[str, int]:
    """Divide ``slots`` between gateways.

    Each gets what it needs as far as equal shares allow; what can't be divided goes to the oldest waiters, and what
    nobody needs is spread evenly, so that later requests find a free slot without a message.
    """
    result = {claim.gateway: 0 for claim in claims}
    left = slots
    hungry = [claim for claim in claims if claim.need]
    while left and hungry:
        each = left // len(hungry)
        if each == 0:
            # Fewer slots than gateways that want one: the oldest waiters go first, then who runs something.
            hungry.sort(key=lambda claim: (claim.waiting == 0, claim.rank))
            for claim in hungry[:left]:
                result[claim.gateway] += 1
            return result
        for claim in hungry:
            given = min(each, claim.need - result[claim.gateway])
            result[claim.gateway] += given
            left -= given
        hungry = [claim for claim in hungry if result[claim.gateway] < claim.need]
    if left and claims:
        each, rest = divmod(left, len(claims))
        for index, claim in enumerate(claims):
            result[claim.gateway] += each + (index < rest)
    return result
