"""What a simulated world is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from modelswap.core.facts import ModelFacts, Settings
from modelswap.core.policy import Policy
from modelswap.core.states import InstanceState
from modelswap.protocol.messages import CatalogModel

DEVICE = "gpu0"


def model(
    name: str,
    *,
    slots: int = 1,
    device: str | None = DEVICE,
    prepare: bool = False,
    ttl: float | None = None,
    preload: bool = False,
) -> ModelFacts:
    """Return a model's facts."""
    return ModelFacts(
        name=name,
        definition="v1",
        device=device,
        slots=slots,
        listing=CatalogModel(name=name),
        prepare=prepare,
        ttl=ttl,
        preload=preload,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a world is made of. ``wire``: messages go through JSON. ``policy`` None: the scheduler's own.

    ``sleeping`` are the models that are put out by sleep.
    """

    models: tuple[ModelFacts, ...]
    gateways: tuple[str, ...] = ("g0",)
    settings: Settings = field(default_factory=Settings)
    capacity: int = 1
    policy: Policy | None = None
    sleeping: tuple[str, ...] = ()
    wire: bool = False
    checked: bool = True
    """Whether everything is asserted after every step; comparisons of policies run faster without."""
    terse: bool = False
    """Messages that change no decision aren't carried: progress, and catalogs after a gateway's first."""


@dataclass(slots=True, eq=False)
class Start:
    """What the journal and the process table would tell the next orchestrator of an instance."""

    model: str
    definition: str
    state: InstanceState
