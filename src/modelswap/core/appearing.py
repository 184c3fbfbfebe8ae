"""What somebody else starts: on a free device it is taken up, else it is to go."""

from __future__ import annotations

from modelswap.core import effects, events, swapping
from modelswap.core.states import InstanceState
from modelswap.core.world import ModelRecord, World


def decide(world: World) -> None:
    """Take up or turn away what has appeared, as far as that can be told now."""
    for event in list(world.appeared.values()):
        if _later(world, event):
            continue
        del world.appeared[event.instance]
        if event.instance not in world.instances:
            _decide(world, event)


def _later(world: World, event: events.Appeared) -> bool:
    """Return whether the device may turn out to be free: what runs isn't known, or it was started again by hand.

    The latter is a `docker restart`: all that is in the way is the model's own instance, which has died.
    """
    if world.shutting_down:
        return False
    if not world.begun:
        return True
    model = world.models.get(event.model)
    before = world.instance_of(event.model)
    if model is None or before is None or before.state is not InstanceState.STOPPING:
        return False
    device = world.devices[model.device]
    return before.device == model.device and device.swap is None and not device.stuck


def _decide(world: World, event: events.Appeared) -> None:
    model = world.models.get(event.model)
    reason = _objection(world, model, event)
    if reason or model is None:
        world.emit(effects.TurnAway(instance=event.instance, model=event.model, reason=reason))
        if model is not None:
            swapping.visited(world, world.devices[model.device], model.facts.name, model.facts.demand)
        return
    device = world.devices[model.device]
    model.backoff = None
    instance = world.add_instance(model, event.instance)
    instance.host, instance.port, instance.slots = event.host, event.port, event.slots
    world.transition(instance, InstanceState.STARTING, "started by somebody else")
    device.dirty += min(world.room(device), 0)  # what nobody has seen free is its own now, as far as it needs it
    swapping.adopt_start(world, instance)


def _objection(world: World, model: ModelRecord | None, event: events.Appeared) -> str:
    """Return why it can't stay; empty if it can."""
    if world.shutting_down:
        return "modelswap is shutting down"
    if model is None:
        return f"the model {event.model} is not in the config"
    if model.facts.definition != event.definition:
        return f"it was made from another definition of {event.model} than the config has now"
    device = world.devices[model.device]
    where = "" if device.private else f" on {device.name}"
    if device.swap is not None:
        swap = f"a swap to {device.swap.target}" if device.swap.target is not None else "an unload"
        return f"{swap} is under way{where}"
    instance = world.instance_of(event.model)
    if instance is not None and instance.state is not InstanceState.FAILED:
        return f"another instance of {event.model} is {instance.state}"
    if world.room(device) + device.dirty < model.facts.demand:
        holders = sorted({i.model for i in world.on_device(device.name) if i.holds})
        return f"{device.name} is held by {', '.join(holders)}" if holders else f"{device.name} has too little room"
    return ""
