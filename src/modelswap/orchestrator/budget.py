"""Which sleepers are least worth their memory: greedy-dual by size and frequency. Pure decisions.

The rule (Cherkasova, "Improving WWW proxies performance with greedy-dual-size-frequency caching policy", HP Labs 1998):
a sleeper's credit is ``clock + uses x seconds saved / bytes``, and the clock rises to the credit of each one that is
dropped. So what was worth much, but long ago, is overtaken by what is used now.

One thing is different here: a cache takes in whatever was missed, while a model that comes back is put to sleep only
if that pushes nobody out who is worth more. Where all who sleep are, nobody would ever be dropped, and the clock would
stand still. So each use moves it on, too, by a small part of what was used.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

GIB: Final = 1 << 30
LEAST_BYTES: Final = 1 << 26
"""No sleeper counts as smaller than this (64 MiB), whatever was measured of it."""
AGING: Final = 1 / 64
"""The part of a use's worth by which all others age."""
MOST_USES: Final = 16.0
"""Uses beyond this are halved with all others', so that a model's past fades."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sleeper:
    """An instance that sleeps, and the bytes that dropping it would free."""

    instance: str
    model: str
    host: int
    residue: int


@dataclass(slots=True)
class Ranking:
    """What each model's sleeping is worth, by its name."""

    clock: float = 0.0
    _credits: dict[str, float] = field(default_factory=dict)
    _uses: dict[str, float] = field(default_factory=dict)

    def used(self, model: str, saved: float, size: int) -> None:
        """Note that a model was asked for, whose sleep saves ``saved`` seconds and takes ``size`` bytes of host."""
        self._uses[model] = self._uses.get(model, 0.0) + 1.0
        if self._uses[model] > MOST_USES:
            self._uses = {name: uses / 2 for name, uses in self._uses.items()}
        worth = self._uses[model] * max(saved, 0.0) * GIB / max(size, LEAST_BYTES)
        self.clock += worth * AGING
        self._credits[model] = self.clock + worth

    def credit(self, model: str) -> float:
        """Return what a model's sleeping is worth; the clock's for one that nobody has asked for yet."""
        return self._credits.get(model, self.clock)

    def dropped(self, model: str) -> None:
        """Note that a model's sleeper was stopped for its memory: from now on, all are measured against its worth."""
        self.clock = max(self.clock, self._credits.pop(model, self.clock))

    def victims(
        self, sleepers: Collection[Sleeper], need_host: int = 0, need_device: int = 0, *, partly: bool = False
    ) -> list[Sleeper]:
        """Return the sleepers to drop so that as many bytes become free, the least worth first.

        Empty if nothing is needed, or if dropping all of them would not do; with ``partly``, all that help then.
        """
        chosen: list[Sleeper] = []
        for sleeper in sorted(sleepers, key=lambda s: (self.credit(s.model), -s.host, s.instance)):
            host, device = _left(chosen, need_host, need_device)
            if host <= 0 and device <= 0:
                break
            if (host > 0 and sleeper.host > 0) or (device > 0 and sleeper.residue > 0):
                chosen.append(sleeper)
        host, device = _left(chosen, need_host, need_device)
        if (host > 0 or device > 0) and not partly:
            return []
        # One that was taken early may not be needed any more beside a larger one.
        for sleeper in sorted(chosen, key=lambda s: -self.credit(s.model)):
            rest = [other for other in chosen if other is not sleeper]
            host_left, device_left = _left(rest, need_host, need_device)
            if host_left <= max(host, 0) and device_left <= max(device, 0):
                chosen = rest
        return chosen


def _left(chosen: Collection[Sleeper], need_host: int, need_device: int) -> tuple[int, int]:
    return need_host - sum(s.host for s in chosen), need_device - sum(s.residue for s in chosen)
