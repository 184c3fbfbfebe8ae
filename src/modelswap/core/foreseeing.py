"""Says whose weights are to be read ahead: those of the model that comes in next, until it has come in.

What is said follows from the rest of the state after every event; `World.ahead` only remembers what was said last.
"""

from __future__ import annotations

from modelswap.core import effects, waiting
from modelswap.core.states import InstanceState
from modelswap.core.swap import Phase
from modelswap.core.world import DeviceRecord, ModelRecord, World

_GONE = frozenset({InstanceState.ABSENT, InstanceState.FAILED})


def foresee(world: World) -> None:
    """Say it of every device where it is another model than before, or none any more."""
    coming = {}
    for device in world.devices.values():
        model = _coming(world, device)
        if model is not None:
            coming[device.name] = (model.facts.name, model.facts.definition)
    for name in {**world.ahead, **coming}:
        if world.ahead.get(name) != coming.get(name):
            which, definition = coming.get(name, (None, ""))
            world.emit(effects.ReadAhead(device=name, model=which, definition=definition))
    world.ahead = coming


def _coming(world: World, device: DeviceRecord) -> ModelRecord | None:
    if device.private or not world.begun:
        return None
    name = _next(world, device)
    model = world.models.get(name) if name is not None else None
    if model is None or not world.waiting.line(model.facts.name).count:
        return None  # a load that nobody waits for any more goes on, but needn't be quick
    return model if _will_load(world, model) else None


def _next(world: World, device: DeviceRecord) -> str | None:
    """Return the model that `swapping` would bring in as things are, or is bringing in."""
    swap = device.swap
    if swap is not None and swap.phase is Phase.IN:
        return swap.target
    if swap is not None and swap.target is not None and waiting.eligible(world, device, swap.target):
        return swap.target
    contender = waiting.contender(world, device)
    return contender.model if contender is not None else None


def _will_load(world: World, model: ModelRecord) -> bool:
    """Return whether its coming in reads its weights: what runs has read them, and a sleeper keeps them at level 1."""
    instance = world.instance_of(model.facts.name)
    if instance is None or instance.state in _GONE:
        return True
    if instance.state is InstanceState.ASLEEP:
        return instance.asleep > 1
    ours = instance.state is InstanceState.STARTING and not instance.adopted
    return ours and instance.definition == model.facts.definition
