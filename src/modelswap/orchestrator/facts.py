"""From the config file to what the scheduler is told."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from modelswap.core.events import Configure
from modelswap.core.facts import DeviceFacts, ModelFacts, Settings
from modelswap.engines.base import Engine
from modelswap.protocol.messages import CatalogModel
from modelswap.runtimes.base import Known
from modelswap.spec.config import Config, EngineName, Model
from modelswap.spec.digest import definition

DEVICE: Final = "gpu0"
"""What the one device is called."""
AT_ONCE: Final = 0.05
"""How long a restless model may have nothing to do, in seconds."""


@dataclass(frozen=True, slots=True)
class Configured:
    """A loaded config with what follows from it. ``definitions`` by model, ``names`` from every name to its model."""

    config: Config
    engines: dict[str, Engine]
    definitions: dict[str, str]
    names: dict[str, str]

    @classmethod
    def of(cls, config: Config, engine_for: Callable[[EngineName], Engine]) -> Configured:
        """Work it out."""
        names: dict[str, str] = {}
        for name, model in config.models.items():
            for known in (*model.adapters, *model.aliases, name):
                names[known] = name
        return cls(
            config=config,
            engines={name: engine_for(model.engine) for name, model in config.models.items()},
            definitions={name: definition(name, model) for name, model in config.models.items()},
            names=names,
        )

    def known(self) -> dict[str, Known]:
        """Return the models as a runtime needs to know them."""
        return {name: Known(model, self.definitions[name]) for name, model in self.config.models.items()}

    def configure(
        self,
        at: float,
        measured: Callable[[str], float | None] = lambda _: None,
        prepare: Callable[[Model], bool] = lambda _: False,
        restless: Collection[str] = (),
    ) -> Configure:
        """Return the event that tells the scheduler.

        ``measured`` gives a model's swap time of earlier runs, ``prepare`` whether anything is to be made ready for it.
        ``restless`` models are put out as soon as they have nothing to do.
        """
        return Configure(
            at=at,
            models=tuple(
                self._model(name, model, measured(name), prepare=prepare(model), restless=name in restless)
                for name, model in self.config.models.items()
            ),
            devices=(DeviceFacts(DEVICE),),
            settings=_settings(self.config),
        )

    def _model(
        self, name: str, model: Model, swap_seconds: float | None, *, prepare: bool, restless: bool
    ) -> ModelFacts:
        engine = self.engines[name]
        return ModelFacts(
            name=name,
            definition=self.definitions[name],
            device=DEVICE if model.device == "gpu" else None,
            slots=model.concurrency or engine.slots(model),
            swap_seconds=swap_seconds,
            priority=model.priority,
            prepare=prepare,
            ttl=AT_ONCE if restless else model.ttl,
            idle="sleep" if restless else model.idle,
            pinned=model.pin and not restless,
            preload=model.preload,
            listing=CatalogModel(
                name=name,
                aliases=tuple(model.aliases),
                adapters=tuple(model.adapters),
                upstream_name=engine.upstream_name(name, model),
                priority=model.priority,
                engine=model.engine,
                beside=model.device == "none",
            ),
        )


def _settings(config: Config) -> Settings:
    given = config.scheduling
    return Settings(
        max_wait=given.max_wait,
        min_residency=given.min_residency,
        linger=given.linger,
        drain_timeout=given.drain_timeout,
        abort_on_drain_timeout=given.on_drain_timeout == "abort",
        queue_requests=given.queue_requests,
        queue_bytes=int(given.queue_bytes),
        queue_timeout=given.queue_timeout,
        priority_boost=given.priority_boost,
        term=config.orchestrator.term,
    )
