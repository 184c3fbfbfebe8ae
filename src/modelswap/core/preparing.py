"""Preparing models ahead of their swaps: what a start needs and needs no device for, while others are served.

Until a model is prepared it is no contender for its device (`waiting.eligible`). Its waiters wait; their age counts.
"""

from __future__ import annotations

from modelswap.core import effects, events, swapping
from modelswap.core.states import InstanceState, Preparedness
from modelswap.core.world import ModelRecord, Preparation, World

_SERVES = frozenset({InstanceState.STARTING, InstanceState.READY, InstanceState.ASLEEP, InstanceState.WAKING})


def begin(world: World) -> None:
    """Have every model prepared that somebody waits for, and that isn't."""
    for name in world.waiting.models():
        model = world.models[name]
        if model.prepared or model.preparation.state is not Preparedness.NEEDED or serves(world, model):
            continue
        model.preparation.state = Preparedness.UNDER_WAY
        world.progress_at = world.now  # waiting clients hear of it at once
        world.emit(effects.Prepare(model=name, definition=model.facts.definition))


def serves(world: World, model: ModelRecord) -> bool:
    """Return whether an instance of this very model (adopted, started by hand, asleep) runs or comes in unprepared."""
    instance = world.instance_of(model.facts.name)
    return instance is not None and instance.state in _SERVES and instance.definition == model.facts.definition


def stage(world: World, event: events.PrepareStage) -> None:
    """Note how far it is."""
    model = _meant(world, event)
    if model is None or model.preparation.state is not Preparedness.UNDER_WAY:
        return
    if model.preparation.stage != event.stage:
        world.progress_at = world.now
    model.preparation.stage, model.preparation.fraction = event.stage, event.fraction


def prepared(world: World, event: events.Prepared) -> None:
    """Let a model take part in swaps."""
    model = _meant(world, event)
    if model is not None:
        model.preparation = Preparation(state=Preparedness.DONE)


def failed(world: World, event: events.PrepareFailed) -> None:
    """Refuse whoever waits for a model that can't be prepared, and leave it alone for a while."""
    model = _meant(world, event)
    if model is None or model.preparation.state is not Preparedness.UNDER_WAY:
        return
    model.preparation = Preparation()
    if not serves(world, model):
        swapping.back_off(world, event.model, event.code, event.message, permanent=event.permanent)


def _meant(world: World, event: events.PrepareStage | events.Prepared | events.PrepareFailed) -> ModelRecord | None:
    """Return the model that a report is about; none if it is about an earlier definition."""
    model = world.models.get(event.model)
    return model if model is not None and model.facts.definition == event.definition else None
