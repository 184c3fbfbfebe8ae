"""What happens when nobody asks: idle models are put out, devices that have nothing get their first model."""

from __future__ import annotations

from modelswap.core import leasing, pinning, sleeping, waiting
from modelswap.core.swap import Swap
from modelswap.core.world import DeviceRecord, Instance, World
from modelswap.protocol.errors import Code


def due(world: World, instance: Instance) -> float | None:
    """Return when a resident instance is to be put out if nobody asks for it before; None: never, as things are."""
    model = world.models.get(instance.model)
    if model is None or model.facts.ttl is None or model.facts.idle == "keep" or pinning.pinned(world, instance):
        return None
    idle_since = leasing.idle_since(world, instance) if instance.resident else None
    return None if idle_since is None else idle_since + model.facts.ttl


def pinned_meanwhile(world: World, swap: Swap, draining: list[Instance]) -> bool:
    """Return whether one that drains has been pinned, so that it isn't left; an operator's wish goes first."""
    wished = waiting.ensured(world, swap.target) if swap.target is not None else not swap.idle
    models = [world.models.get(instance.model) for instance in draining if not sleeping.unwanted(world, instance)]
    return not wished and any(model is not None and model.pinned for model in models)


def preload(world: World) -> None:
    """Ask for the first model to be preloaded of each device that has nothing, unless somebody else waits there."""
    for device in world.devices.values():
        here = [model for model in world.models.values() if model.device == device.name]
        first = next((model for model in here if model.facts.preload), None)
        taken = any(world.on_device(device.name)) or any(world.waiting.line(model.facts.name).count for model in here)
        if first is not None and not taken:
            waiting.preload(world, first)


def settle_line(world: World, device: DeviceRecord) -> None:
    """Refuse whoever waits for a model that pinned ones keep out; preloading, too, is for nobody once one is in.

    What an operator waits for isn't refused, nor are those who wait for the same model.
    """
    for name in list(world.waiting.models()):
        model = world.models[name]
        instance = world.instance_of(name)
        if model.device != device.name or (instance is not None and instance.resident):
            continue
        if any(world.on_device(device.name)):
            waiting.cancel_preload(world, name)
        message = "" if waiting.ensured(world, name) else pinning.shut_out(world, model)
        if message:
            waiting.refuse_model(world, name, Code.MODEL_PINNED, message)
