"""A swap: the transaction that makes one model resident, and the record that is kept of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec


class Phase(StrEnum):
    """The steps of a swap, in order."""

    DRAIN = "drain"
    OUT = "out"
    RELEASE = "release"
    IN = "in"


class SwapOutcome(StrEnum):
    """How a swap ended."""

    OK = "ok"
    FAILED = "failed"
    CANCELLED = "cancelled"
    """Nobody waited for it any more, before it held the device."""


class SwapRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a swap. Durations in seconds; ``queue`` is how long the oldest waiter had waited before it.

    ``mechanism`` is how the target came in (``cold``, ``standby``, ``wake``; without a target the same as ``out``),
    ``out`` how the source was put out (``stop``, ``sleep``; empty if nothing was).
    """

    device: str
    source: str | None
    target: str | None
    mechanism: str
    outcome: SwapOutcome
    seconds: float
    queue: float
    phases: dict[str, float]
    message: str = ""
    out: str = ""


@dataclass(slots=True, kw_only=True)
class Swap:
    """A swap under way on one device. ``target`` None: only put out (unload)."""

    device: str
    target: str | None
    source: str | None
    victims: list[str]
    began: float
    queue: float
    phase: Phase
    phase_began: float
    phases: dict[str, float] = field(default_factory=dict)
    instance: str | None = None
    """The instance being brought in, once there is one."""
    aborted: bool = False
    """Running requests have been told to end, because draining took too long."""
    idle: bool = False
    """Nobody waits: the source had nothing to do for its time to live."""
    mechanism: str = "cold"
    """How the target comes in."""
    out: str = ""
    """How the source was put out, once it is."""

    def enter(self, phase: Phase, now: float) -> None:
        """Go on to ``phase``, noting how long the one before took."""
        self.phases[self.phase] = self.phases.get(self.phase, 0.0) + now - self.phase_began
        self.phase = phase
        self.phase_began = now

    def record(self, now: float, outcome: SwapOutcome, message: str = "") -> SwapRecord:
        """Return what is to be kept of it, ended now."""
        self.enter(self.phase, now)
        return SwapRecord(
            device=self.device,
            source=self.source,
            target=self.target,
            mechanism=self.mechanism if self.target is not None else self.out or "stop",
            outcome=outcome,
            seconds=now - self.began,
            queue=self.queue,
            phases=dict(self.phases),
            message=message,
            out=self.out,
        )
