"""Makes `Snapshot` from the world."""

from __future__ import annotations

from modelswap.core.snapshot import (
    DeviceView,
    GatewayView,
    InstanceView,
    ModelView,
    Snapshot,
    SwapView,
)
from modelswap.core.states import Preparedness
from modelswap.core.world import DeviceRecord, Instance, ModelRecord, World


def snapshot(world: World, now: float) -> Snapshot:
    """Return the whole state as plain data; ages are counted up to ``now``."""
    return Snapshot(
        begun=world.begun,
        generation=world.generation,
        models=tuple(_model(world, model, now) for model in world.models.values()),
        instances=tuple(_instance(world, instance, now) for instance in world.instances.values()),
        devices=tuple(_device(world, device) for device in world.devices.values() if not device.private),
        swaps=tuple(
            SwapView(
                device=device.name,
                source=device.swap.source,
                target=device.swap.target,
                phase=device.swap.phase,
                seconds=now - device.swap.began,
                phases={
                    **device.swap.phases,
                    device.swap.phase: device.swap.phases.get(device.swap.phase, 0.0) + now - device.swap.phase_began,
                },
            )
            for device in world.devices.values()
            if device.swap is not None
        ),
        gateways=tuple(
            GatewayView(
                gateway=name,
                silent_for=max(now - gateway.heard, 0.0),
                waiting=len(world.waiting.of_gateway(name)),
                leases=sum(key[0] == name for i in world.instances.values() for key in i.leases),
            )
            for name, gateway in world.gateways.items()
        ),
    )


def _model(world: World, model: ModelRecord, now: float) -> ModelView:
    name = model.facts.name
    instance = world.instance_of(name)
    line = world.waiting.line(name)
    oldest = world.waiting.oldest(name)
    return ModelView(
        name=name,
        device=model.facts.device,
        state=world.state_of(name),
        resident=instance is not None and instance.resident,
        waiting=line.count,
        waiting_bytes=line.bytes,
        oldest_wait=max(now - oldest, 0.0) if oldest is not None else 0.0,
        in_flight=instance.in_flight if instance is not None else 0,
        swap_seconds=model.swap_time.value,
        backoff_seconds=max(model.backoff.until - now, 0.0) if model.backoff is not None else 0.0,
        problem=model.backoff.message if model.backoff is not None else "",
        preparation=Preparedness.DONE if model.prepared else model.preparation.state,
        prepare_stage=model.preparation.stage,
        prepare_fraction=model.preparation.fraction,
        sleep_level=model.way,
        pinned=model.pinned,
    )


def _instance(world: World, instance: Instance, now: float) -> InstanceView:
    return InstanceView(
        instance=instance.id,
        model=instance.model,
        device=None if world.devices[instance.device].private else instance.device,
        state=instance.state,
        resident=instance.resident,
        epoch=str(instance.epoch) if instance.epoch is not None else None,
        host=instance.host,
        port=instance.port,
        slots=instance.slots,
        in_flight=instance.in_flight,
        state_age=max(now - instance.since, 0.0),
        stage=instance.stage,
        fraction=instance.fraction,
        asleep=instance.asleep,
    )


def _device(world: World, device: DeviceRecord) -> DeviceView:
    here = list(world.on_device(device.name))
    return DeviceView(
        name=device.name,
        capacity=device.facts.capacity,
        used=sum(instance.demand for instance in here),
        unverified=device.dirty,
        resident=next((instance.model for instance in here if instance.resident), None),
        problem=device.stuck or device.blocked,
        asleep=tuple(sleeper.model for sleeper in world.sleepers(device.name)),
    )
