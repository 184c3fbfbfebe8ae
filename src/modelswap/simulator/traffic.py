"""Requests and how they end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Violation(AssertionError):
    """Something happened that never may."""


def claim(held: bool, message: str) -> None:
    """Raise `Violation` unless ``held``."""
    if not held:
        raise Violation(message)


class Outcome(StrEnum):
    """How a request ended."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """With an error that says what to do; `Request.code` has it."""
    CUT = "cut"
    """Its engine died, or was stopped at once, after the response's first byte."""
    GONE = "gone"
    """Its client left."""
    LOST = "lost"
    """Its gateway process died: the client sees a closed connection."""


@dataclass(slots=True, eq=False)
class Request:
    """One request of one client. ``agent`` is who waits for its end, if anybody does."""

    id: int
    gateway: str
    model: str
    came: float
    agent: int | None = None
    sent: float | None = None
    """When it (last) went to an engine."""
    streaming: bool = False
    """Its response has begun, so it can't be sent anywhere else any more."""
    requeued: bool = False
    outcome: Outcome | None = None
    code: str = ""
    ended: float = 0.0

    def end(self, outcome: Outcome, now: float, code: str = "") -> None:
        """Note its one outcome."""
        claim(self.outcome is None, f"request {self.id} ended twice: {self.outcome}, then {outcome}")
        self.outcome, self.ended, self.code = outcome, now, code
