"""Who asks: agents that wait for each answer, and clients that come by chance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from modelswap.simulator.timed import Timed
from modelswap.simulator.traffic import Outcome, Request


@dataclass(slots=True, eq=False)
class Agent:
    """Asks one model, thinks for ``thought`` seconds about each answer, and asks again."""

    world: Timed
    id: int
    gateway: str
    model: str
    thought: float
    answers: int = 0
    waits: list[float] = field(default_factory=list)
    """Seconds from asking to the answer's start."""

    def begin(self) -> None:
        """Ask for the first time, now."""
        self.world.on_end(self._ended)
        self.world.after(0.0, self._ask)

    def _ask(self) -> None:
        self.world.system.request(self.gateway, self.model, self.id)

    def _ended(self, request: Request) -> None:
        if request.agent == self.id:
            if request.outcome is Outcome.ANSWERED and request.sent is not None:
                self.answers += 1
                self.waits.append(request.sent - request.came)
            self.world.after(self.thought, self._ask)


@dataclass(slots=True, eq=False)
class Poisson:
    """Clients that come independently, ``rate`` a second, and choose models by ``weights``."""

    world: Timed
    rng: random.Random
    rate: float
    models: Sequence[str]
    weights: Sequence[float]
    gateways: Sequence[str] = ("g0",)

    def begin(self) -> None:
        """Let them come from now on."""
        self.world.after(self.rng.expovariate(self.rate), self._come)

    def _come(self) -> None:
        self.begin()
        [model] = self.rng.choices(self.models, self.weights)
        self.world.system.request(self.rng.choice(self.gateways), model)
