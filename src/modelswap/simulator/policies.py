"""What others do about leaving the resident model, to compare with `modelswap.core.policy.GateFloor`."""

from __future__ import annotations

from modelswap.core.facts import Settings
from modelswap.core.policy import LEAVE, Contender, Residency, Verdict


class Bypass:
    """The resident model serves its own requests without bound, and is left at its first idle moment.

    So do llama-swap, Ollama and llama.cpp's router.
    """

    def consider(self, resident: Residency, contender: Contender, settings: Settings, now: float) -> Verdict:
        """See `modelswap.core.policy.Policy.consider`."""
        return Verdict(leave=resident.idle_since is not None)


class FloorOnly:
    """Serves what waited when the model came in, and then leaves for whoever waits."""

    def consider(self, resident: Residency, contender: Contender, settings: Settings, now: float) -> Verdict:
        """See `modelswap.core.policy.Policy.consider`."""
        return Verdict(leave=not resident.floor)


class AgeBound:
    """Leaves as soon as somebody has waited ``max_wait`` for another model, whether anything was served or not."""

    def consider(self, resident: Residency, contender: Contender, settings: Settings, now: float) -> Verdict:
        """See `modelswap.core.policy.Policy.consider`."""
        overdue_at = contender.rank + settings.max_wait
        if resident.idle_since is not None or now >= overdue_at:
            return LEAVE
        return Verdict(leave=False, again_at=overdue_at)
