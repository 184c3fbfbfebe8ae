"""What must hold after every event. Asserted in tests and in the simulator, never in production."""

from __future__ import annotations

from modelswap.core import preparing, sleeping
from modelswap.core.line import ADMIN
from modelswap.core.states import InstanceState, Preparedness
from modelswap.core.swap import Phase
from modelswap.core.world import DeviceRecord, Instance, World

_COMING = frozenset({InstanceState.STARTING, InstanceState.WAKING})
_LOADS = frozenset({InstanceState.ABSENT, InstanceState.FAILED, InstanceState.STARTING})
_SLEEPING = frozenset({InstanceState.ASLEEP, InstanceState.STOPPING})


def check(world: World) -> None:
    """Assert every invariant of design and protocol."""
    for device in world.devices.values():
        _memory(world, device)
        _swap(world, device)
        _preparation(world, device)
        _one_mover(world, device)
    for instance in world.instances.values():
        _instance(world, instance)
        _sleep(instance)
        _slots(instance)
        _leases(world, instance)
    _tickets(world)
    _reading_ahead(world)


def _claim(held: bool, message: str) -> None:
    if not held:
        raise AssertionError(message)


def _memory(world: World, device: DeviceRecord) -> None:
    held = sum(i.demand for i in world.on_device(device.name) if i.holds)
    _claim(held <= device.facts.capacity, f"{device.name}: {held} held of {device.facts.capacity}")
    starting = [i for i in world.on_device(device.name) if i.state in _COMING]
    if starting and not device.private:
        _claim(held + device.dirty <= device.facts.capacity, f"{device.name}: a start before its memory was free")


def _swap(world: World, device: DeviceRecord) -> None:
    swap = device.swap
    if swap is None:
        moving = [i.id for i in world.on_device(device.name) if i.state is InstanceState.DRAINING]
        _claim(not moving, f"{device.name}: {moving} drain without a swap")
        return
    if swap.phase is Phase.IN:
        _claim(swap.instance in world.instances, f"{device.name}: nothing is being brought in")
    else:
        starting = [i.id for i in world.on_device(device.name) if i.state in _COMING]
        _claim(not starting, f"{device.name}: {starting} come in in phase {swap.phase}")


def _preparation(world: World, device: DeviceRecord) -> None:
    swap = device.swap
    if swap is not None and swap.target is not None and swap.phase is not Phase.IN:
        ready = world.models[swap.target].prepared or sleeping.wakeable(world, swap.target)
        _claim(ready, f"{device.name}: a swap to {swap.target}, which isn't prepared")
    for instance in world.on_device(device.name):
        model = world.models.get(instance.model)
        ours = instance.state is InstanceState.STARTING and not instance.adopted
        if ours and model is not None and model.facts.definition == instance.definition:
            _claim(model.prepared, f"{instance.id} starts, but isn't prepared")


def _one_mover(world: World, device: DeviceRecord) -> None:
    """See that nobody takes memory while an engine falls asleep, which goes by what it sees to be free."""
    falling = [i.id for i in world.on_device(device.name) if i.falling]
    coming = [i.id for i in world.on_device(device.name) if i.state in _COMING]
    _claim(not falling or not coming, f"{device.name}: {falling} fall asleep while {coming} come in")


def _sleep(instance: Instance) -> None:
    state = instance.state
    _claim(bool(instance.asleep) >= (state is InstanceState.ASLEEP), f"{instance.id} is asleep at no level")
    _claim(not instance.asleep or state in _SLEEPING, f"{instance.id} sleeps, but is {state}")
    _claim(not instance.falling or state is InstanceState.DRAINING, f"{instance.id} falls asleep while {state}")
    if instance.asleep or instance.falling:
        _claim(not instance.leases and instance.epoch is None, f"{instance.id} sleeps, or is about to, with leases")
        _claim(not instance.holds or bool(instance.falling), f"{instance.id} sleeps and holds its device")
    _claim(state is not InstanceState.WAKING or instance.holds, f"{instance.id} wakes without holding its device")


def _instance(world: World, instance: Instance) -> None:
    _claim(world.by_model.get(instance.model) == instance.id, f"{instance.id} isn't its model's one instance")
    if instance.epoch is not None:
        _claim(instance.state is InstanceState.READY, f"{instance.id} is {instance.state}, and open")
    floor = sum(ticket.floor_of == instance.id for ticket in world.waiting)
    _claim(floor == instance.floor, f"{instance.id}: floor {instance.floor}, but {floor} tickets stand on it")


def _slots(instance: Instance) -> None:
    running = sum(lease.in_flight for lease in instance.leases.values() if lease.in_flight > lease.upper)
    _claim(not running, f"{instance.id}: {running} run beyond what was granted")


def _leases(world: World, instance: Instance) -> None:
    for (gateway, epoch), lease in instance.leases.items():
        _claim(gateway in world.gateways, f"{instance.id}: a lease of {gateway}, which is gone")
        _claim((lease.gateway, lease.epoch) == (gateway, epoch), f"{instance.id}: a lease under a wrong key")
        if not lease.closing:
            _claim(epoch == instance.epoch, f"{instance.id}: an open lease of an old epoch")
            _claim(instance.state is InstanceState.READY, f"{instance.id}: an open lease while {instance.state}")


def _tickets(world: World) -> None:
    counts: dict[str, int] = {}
    for ticket in world.waiting:
        counts[ticket.model] = counts.get(ticket.model, 0) + 1
        if ticket.gateway == ADMIN:
            _claim(ticket.key[1] in world.ensures, f"ticket {ticket.key} without its request")
        else:
            _claim(ticket.gateway in world.gateways, f"ticket {ticket.key} of a gateway that is gone")
    for model, count in counts.items():
        _claim(world.waiting.line(model).count == count, f"{model}: the line's count is off")
        record = world.models.get(model)
        _claim(record is not None, f"{model}: waited for, but not configured")
        _claim(record is None or record.backoff is None, f"{model}: waited for while it backs off")
        if record is not None and not record.prepared and record.preparation.state is Preparedness.NEEDED:
            _claim(preparing.serves(world, record), f"{model}: waited for, but nobody prepares it")
    _claim(set(world.ensures) == {t.key[1] for t in world.waiting if t.gateway == ADMIN}, "requests without tickets")


def _reading_ahead(world: World) -> None:
    for device, (model, _) in world.ahead.items():
        _claim(not world.devices[device].private, f"{model} is read ahead, though it needs no device")
        _claim(world.waiting.line(model).count > 0, f"{model} is read ahead for nobody")
        instance = world.instance_of(model)
        emptied = instance is not None and instance.state is InstanceState.ASLEEP and instance.asleep > 1
        _claim(emptied or world.state_of(model) in _LOADS, f"{model} is read ahead while it is {world.state_of(model)}")
