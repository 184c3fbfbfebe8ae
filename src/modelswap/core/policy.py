"""When to leave the resident model, and for whom. Pure decisions; policies can be swapped and compared."""

from __future__ import annotations

from typing import Protocol

import msgspec

from modelswap.core.facts import Settings


class Residency(msgspec.Struct, frozen=True, kw_only=True):
    """The resident model, as a policy sees it. Times are on the scheduler's clock, in seconds.

    ``floor`` counts requests that waited when it came in and wait still. ``idle_since`` is None while it runs or has
    waiting anything; a model that has served nothing yet is idle since it came in. ``swap_time`` is the measured time
    of bringing it in, None if unknown.
    """

    since: float
    floor: int
    idle_since: float | None
    swap_time: float | None


class Contender(msgspec.Struct, frozen=True, kw_only=True):
    """The model that would be next, by its first waiter, who ``arrived`` then; ``rank`` is earlier for priority."""

    model: str
    rank: float
    arrived: float
    urgent: bool


class Verdict(msgspec.Struct, frozen=True):
    """``leave`` now, or stay and ask again at ``again_at`` (None: only when something happens)."""

    leave: bool
    again_at: float | None = None


class Policy(Protocol):
    """Decides when to leave."""

    def consider(self, resident: Residency, contender: Contender, settings: Settings, now: float) -> Verdict:
        """Return whether to leave ``resident`` for ``contender``."""
        ...


LEAVE = Verdict(leave=True)


class GateFloor:
    """The design's rules: gate floor, then age of the oldest foreign waiter or idleness, bounded by residency."""

    def consider(self, resident: Residency, contender: Contender, settings: Settings, now: float) -> Verdict:
        """See `Policy.consider`."""
        if resident.floor:
            return Verdict(leave=False)
        if contender.urgent:
            return LEAVE
        swap_time = resident.swap_time or 0.0
        floor = settings.min_residency
        if floor is None:
            floor = settings.residency_factor * swap_time
        settled_at = resident.since + floor
        overdue_at = max(contender.rank + settings.max_wait, settled_at)
        if now >= overdue_at:
            return LEAVE
        if resident.idle_since is None:
            return Verdict(leave=False, again_at=overdue_at)
        idle_enough_at = min(resident.idle_since + settings.linger, settled_at)
        # Having just come in for nobody counts as activity: the one it came for may be about to ask.
        idle_enough_at = max(idle_enough_at, min(resident.since + settings.linger, overdue_at))
        if now >= idle_enough_at:
            return LEAVE
        return Verdict(leave=False, again_at=min(idle_enough_at, overdue_at))
