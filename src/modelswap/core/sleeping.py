"""Sleepers: instances that were drained and gave their device up, but not their process.

They hold no capacity of their device. `swapping` chooses who is put out and who is woken; here is who may sleep, and
what ends a sleep other than waking.
"""

from __future__ import annotations

from modelswap.core import effects
from modelswap.core.states import InstanceState
from modelswap.core.swap import Swap
from modelswap.core.world import Instance, World


def level(world: World, swap: Swap, drained: Instance) -> int:
    """Return the level at which a drained instance is to sleep, 0 if it is to be stopped.

    A gateway that was lost since may still send it requests, which a sleeping engine would let wait without a word.
    """
    model = world.models.get(drained.model)
    if model is None or unwanted(world, drained) or drained.strays or world.doubtful:
        return 0
    if swap.idle and model.facts.idle == "stop":
        return 0
    return model.way


def begin(world: World, swap: Swap, drained: Instance, depth: int) -> None:
    """Have a drained instance put to sleep; it is still draining, and holds its device, until that is done."""
    drained.falling = depth
    world.emit(effects.Sleep(instance=drained.id, model=drained.model, level=depth, target=swap.target or ""))


def slept(world: World, instance: Instance) -> None:
    """Note that an instance sleeps. Its memory counts as free only after it was verified."""
    world.transition(instance, InstanceState.ASLEEP, f"drained, asleep at level {instance.falling}")
    world.soil(instance)
    watch(world, instance)


def watch(world: World, sleeper: Instance) -> None:
    """Have it noticed when a sleeper ends."""
    world.emit(effects.Watch(instance=sleeper.id, model=sleeper.model, asleep=True))


def failed(world: World, instance: Instance, message: str) -> None:
    """Stop an instance that can't be made sleep; it is neither asleep nor awake for sure."""
    world.transition(instance, InstanceState.STOPPING, f"can't sleep: {message.partition(chr(10))[0]}")
    world.emit(effects.PutOut(instance=instance.id, model=instance.model, kill=True))


def drop(world: World, sleeper: Instance, reason: str, *, kill: bool = False) -> None:
    """Stop a sleeper. This needs no swap, because it holds no device."""
    world.transition(sleeper, InstanceState.STOPPING, reason)
    world.emit(effects.PutOut(instance=sleeper.id, model=sleeper.model, kill=kill))


def drop_unwanted(world: World) -> None:
    """Stop the sleepers that will never be woken."""
    for instance in [i for i in world.instances.values() if i.state is InstanceState.ASLEEP]:
        if instance.strays:
            drop(world, instance, "a gateway that was away still uses it", kill=True)
        elif unwanted(world, instance):
            drop(world, instance, "unload")


def wakeable(world: World, name: str) -> bool:
    """Return whether a model has a sleeper, which needs no preparing."""
    instance = world.instance_of(name)
    return instance is not None and instance.state is InstanceState.ASLEEP and not unwanted(world, instance)


def unwanted(world: World, instance: Instance) -> bool:
    """Return whether an instance is to be stopped, whoever waits: shutdown, changed config, unload."""
    model = world.models.get(instance.model)
    outdated = model is None or model.facts.definition != instance.definition or model.device != instance.device
    unload = any(request.model in (None, instance.model) for request in world.unloads.values())
    return world.shutting_down or outdated or unload
