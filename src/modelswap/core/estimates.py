"""Moving averages of what was measured: swap times and the pace at which requests are admitted. Seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

WEIGHT: Final = 0.3
"""Of the newest measurement in the average: three or four swaps are enough to follow a change."""


@dataclass(slots=True)
class Average:
    """An exponentially weighted moving average; None until something was measured."""

    value: float | None = None

    def add(self, measured: float) -> None:
        """Take a measurement in."""
        self.value = measured if self.value is None else self.value + WEIGHT * (measured - self.value)


@dataclass(slots=True)
class Pace:
    """How long, on average, between two requests being admitted while some wait."""

    average: Average
    last: float | None = None

    def admitted(self, now: float, waiting: int) -> None:
        """Note an admission after which ``waiting`` requests are left."""
        if self.last is not None:
            self.average.add(now - self.last)
        self.last = now if waiting else None
