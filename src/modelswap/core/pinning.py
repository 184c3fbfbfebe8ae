"""Pinned models: while one is resident, it isn't left for others, unless an operator asks."""

from __future__ import annotations

from modelswap.core.world import DeviceRecord, Instance, ModelRecord, World


def pin(world: World, name: str | None, pinned: bool) -> None:
    """Pin or release a model at run time (None: pin all resident ones, or release every one)."""
    for model in world.models.values():
        instance = world.instance_of(model.facts.name)
        resident = instance is not None and instance.resident
        if model.facts.name == name or (name is None and (resident or not pinned)):
            model.pin = pinned


def pinned(world: World, instance: Instance) -> bool:
    """Return whether an instance is resident and stays so."""
    model = world.models.get(instance.model)
    return model is not None and model.pinned and instance.resident


def shut_out(world: World, model: ModelRecord) -> str:
    """Return why a model can't come in as long as others are pinned, for clients; empty if it can."""
    instance = world.instance_of(model.facts.name)
    if instance is not None and instance.resident:
        return ""
    device = world.devices[model.device]
    holders = [i for i in world.on_device(device.name) if pinned(world, i)]
    if not holders or sum(i.demand for i in holders) + model.facts.demand <= device.facts.capacity:
        return ""
    name, others = model.facts.name, " and ".join(f"'{holder.model}'" for holder in holders)
    pinned_are = "is pinned" if len(holders) == 1 else "are pinned"
    return (
        f"The model '{name}' can't come in, because {others} {pinned_are} on {device.name}. "
        f"Release the pin, or have an operator ask for '{name}' (POST /ensure_model)"
    )


def victims(world: World, device: DeviceRecord, here: list[Instance], demand: int) -> list[Instance]:
    """Return who is to leave: who isn't pinned if that is enough, else (an operator asks) everybody."""
    loose = [instance for instance in here if not pinned(world, instance)]
    room = world.room(device) + device.dirty + sum(instance.demand for instance in loose)
    return loose if room >= demand else here
