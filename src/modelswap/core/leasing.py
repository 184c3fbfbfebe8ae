"""The orchestrator's half of the lease protocol: who holds which lease, with how many slots."""

from __future__ import annotations

import msgspec

from modelswap.core import effects, waiting
from modelswap.core.leases import Claim, Lease, shares
from modelswap.core.states import InstanceState, Preparedness
from modelswap.core.world import GatewayRecord, Instance, World
from modelswap.protocol.messages import (
    Admitted,
    Catalog,
    Close,
    Contended,
    Drained,
    Epoch,
    Fault,
    HeldLease,
    Hello,
    Limits,
    Open,
    Progress,
    Usage,
)

_COMING = frozenset({InstanceState.STARTING, InstanceState.WAKING})


def hello(world: World, gateway: str, message: Hello) -> None:
    """Replace all that was known of this gateway by what it says, and tell it what holds."""
    for instance in world.instances.values():
        instance.strays.discard(gateway)
    _drop(world, gateway)  # its slots are given to nobody before it has said what runs in them
    world.gateways[gateway] = GatewayRecord(heard=world.now)
    world.expected.discard(gateway)
    world.doubtful.pop(gateway, None)
    world.say(gateway, catalog(world))
    for held in message.leases:
        _resume(world, gateway, held)
    for ticket in message.tickets:
        waiting.want(world, gateway, ticket)
    if world.begun:
        for instance in world.instances.values():
            if instance.resident:
                _offer(world, instance, gateway)
                share(world, instance)
                if instance.contended:
                    world.say(gateway, Contended(model=instance.model, contended=True))


def _resume(world: World, gateway: str, held: HeldLease) -> None:
    instance = world.instance_of(held.model)
    if instance is not None and (instance.asleep or instance.falling):
        instance.strays.add(gateway)
    if instance is None or instance.gone or instance.asleep or instance.falling or instance.state in _COMING:
        world.say(gateway, Close(model=held.model, epoch=held.epoch))
        world.fences.add((gateway, held.epoch))
        return
    lease = Lease(
        gateway=gateway,
        epoch=held.epoch,
        granted=held.slots,
        revision=-1,
        upper=max(held.slots, held.in_flight),
        in_flight=held.in_flight,
        idle_since=world.now,
        closing=held.closing or held.epoch != instance.epoch or not instance.resident,
    )
    instance.leases[gateway, held.epoch] = lease
    if lease.closing:
        if held.closing:
            lease.ended = True
            lease.granted, lease.upper = 0, held.in_flight
        elif instance.state is not InstanceState.READY:
            lease.end()
            world.say(gateway, Close(model=held.model, epoch=held.epoch))
        # Else it may go on: an adopted instance's next opening is on its way and ends the lease that is held.


def lost(world: World, gateway: str) -> None:
    """Note that a gateway's connection was closed: it is dead, or goes on sending until it has said hello again."""
    held = (key for instance in world.instances.values() for key in instance.leases)
    if any(key[0] == gateway for key in (*held, *world.fences)):
        world.doubtful[gateway] = world.now + world.settings.term
    forget_gateway(world, gateway)


def overslept(world: World) -> None:
    """Give every gateway a new term: what they said while our own process stood still hasn't been read yet."""
    until = world.now + world.settings.term
    for gateway in world.gateways.values():
        gateway.heard = world.now
    world.doubtful = dict.fromkeys(world.doubtful, until)
    if world.begin_deadline is not None:
        world.begin_deadline = until


def forget_gateway(world: World, gateway: str) -> None:
    """Take back everything a gateway had: its connection is closed, or it has been silent for a term."""
    if gateway in world.gateways:
        for instance in world.instances.values():
            if any(key[0] == gateway for key in instance.leases):
                instance.strays.add(gateway)
        _drop(world, gateway)
        for instance in world.instances.values():
            if instance.resident:
                share(world, instance)


def _drop(world: World, gateway: str) -> None:
    world.gateways.pop(gateway, None)
    world.fences = {key for key in world.fences if key[0] != gateway}
    waiting.forget_gateway(world, gateway)
    for instance in world.instances.values():
        for key in [key for key in instance.leases if key[0] == gateway]:
            del instance.leases[key]


def open_instance(world: World, instance: Instance) -> None:
    """Give every gateway a lease on a ready instance, under a new epoch; what waits becomes its gate floor."""
    instance.epoch = world.next_epoch()
    instance.ready_at = world.now
    instance.contended = False
    for lease in instance.leases.values():
        lease.end()  # of an earlier opening; the gateway ends it when it hears of the new one
    instance.floor = 0
    for ticket in world.waiting.of_model(instance.model):
        ticket.floor_of = instance.id
        instance.floor += 1
    for gateway in world.gateways:
        _offer(world, instance, gateway)
    share(world, instance, opening=True)
    world.catalog_changed = True


def _offer(world: World, instance: Instance, gateway: str) -> None:
    assert instance.epoch is not None  # noqa: S101 - for the type checker: resident instances have one
    key = (gateway, instance.epoch)
    if key not in instance.leases:
        instance.leases[key] = Lease(
            gateway=gateway, epoch=instance.epoch, idle_since=world.now, revision=-1, stale=instance.contended
        )


def close_instance(world: World, instance: Instance, *, abort: bool = False) -> None:
    """Close all its leases (``abort``: end what runs under them)."""
    instance.epoch = None
    for lease in instance.leases.values():
        lease.end()
        world.say(lease.gateway, Close(model=instance.model, epoch=lease.epoch, abort=abort))
    for ticket in world.waiting.of_model(instance.model):
        ticket.floor_of = None
    instance.floor = 0
    world.catalog_changed = True


def share(world: World, instance: Instance, *, opening: bool = False) -> None:
    """Divide an instance's slots anew, if somebody lacks one that another could give."""
    leases = instance.open_leases()
    line = world.waiting.line(instance.model)
    fresh = opening or any(lease.revision < 0 for lease in leases)
    hungry = any(line.waiting_at(lease.gateway) for lease in leases)
    excess = sum(lease.granted for lease in leases) > instance.slots
    if not leases or not (fresh or hungry or excess or _pool(instance) > 0):
        return
    claims = []
    for lease in leases:
        count = line.waiting_at(lease.gateway)
        head = world.waiting.head(instance.model, lease.gateway)
        claims.append(
            Claim(
                gateway=lease.gateway,
                # Who has waiters uses all that it was given, whatever its last report says.
                running=max(lease.granted, lease.in_flight) if count else lease.in_flight,
                waiting=count,
                rank=head.rank if head is not None else float("inf"),
            )
        )
    closing = sum(lease.upper for lease in instance.leases.values() if lease.closing)
    wanted = shares(max(instance.slots - closing, 0), claims)
    claims.sort(key=lambda claim: claim.rank)
    ordered = [instance.leases[claim.gateway, leases[0].epoch] for claim in claims]
    for lease in ordered:
        if wanted[lease.gateway] < lease.granted and (hungry or excess):
            _tell(world, instance, lease, wanted[lease.gateway])
    for lease in ordered:
        # What others haven't confirmed to have given back can't be given out yet.
        more = min(wanted[lease.gateway], lease.upper + _pool(instance))
        if more > lease.granted or lease.revision < 0:
            _tell(world, instance, lease, max(more, lease.granted))


def _pool(instance: Instance) -> int:
    return instance.slots - sum(lease.upper for lease in instance.leases.values())


def _tell(world: World, instance: Instance, lease: Lease, slots: int) -> None:
    lease.grant(slots)
    world.say(
        lease.gateway,
        Open(
            model=instance.model,
            epoch=lease.epoch,
            host=instance.host,
            port=instance.port,
            slots=slots,
            revision=lease.revision,
            faults=lease.faults_seen,
        ),
    )


def admitted(world: World, gateway: str, message: Admitted) -> None:
    """Note that a waiting request went to its instance."""
    waiting.grant(world, (gateway, message.ticket))
    found = _lease(world, gateway, message.model, message.epoch)
    if found is not None:
        instance, lease = found
        # Some may have ended since the last report, but it never runs more than it may.
        lease.in_flight = min(lease.in_flight + 1, lease.upper)
        if instance.resident:
            share(world, instance)


def usage(world: World, gateway: str, message: Usage) -> None:
    """Take in what runs under a lease."""
    found = _lease(world, gateway, message.model, message.epoch)
    if found is None:
        return
    instance, lease = found
    idle_since = world.now - message.idle_ms / 1000 if message.in_flight == 0 else world.now
    if message.served == 0 and message.in_flight == 0:
        idle_since = max(idle_since, instance.ready_at)
    lease.served = message.served
    lease.report(message.revision, message.in_flight, idle_since)
    if instance.resident:
        share(world, instance)


def drained(world: World, gateway: str, message: Drained) -> None:
    """Note that nothing runs under a closed lease any more."""
    world.fences.discard((gateway, message.epoch))
    found = _lease(world, gateway, message.model, message.epoch)
    if found is None:
        return
    instance, lease = found
    if lease.closing:
        del instance.leases[gateway, message.epoch]
        if instance.resident:
            share(world, instance)


def fault(world: World, gateway: str, message: Fault) -> None:
    """Look into a gateway's trouble with an instance."""
    found = _lease(world, gateway, message.model, message.epoch)
    if found is None:
        return
    instance, lease = found
    lease.faults = max(lease.faults, message.n)
    if not lease.closing and not instance.probing:
        instance.probing = True
        world.emit(effects.Probe(instance=instance.id, model=instance.model))


def faults_settled(world: World, instance: Instance) -> None:
    """Let gateways use an instance again that was found healthy after their faults."""
    for lease in instance.open_leases():
        if lease.faults_seen < lease.faults:
            lease.faults_seen = lease.faults
            _tell(world, instance, lease, lease.granted)


def set_contended(world: World, instance: Instance, contended: bool) -> None:
    """Tell gateways whether somebody waits for another model, so that they report idleness at once."""
    if instance.contended == contended:
        return
    instance.contended = contended
    for lease in instance.open_leases():
        lease.stale = contended
        world.say(lease.gateway, Contended(model=instance.model, contended=contended))


def idle_since(world: World, instance: Instance) -> float | None:
    """Return since when an instance has had nothing to do; None if it has, or may have."""
    if world.waiting.line(instance.model).count:
        return None
    latest = instance.ready_at
    for lease in instance.leases.values():
        if lease.in_flight or lease.stale:
            return None
        latest = max(latest, lease.idle_since)
    return latest


def catalog(world: World) -> Catalog:
    """Return what gateways are told of models and limits."""
    settings = world.settings
    models = []
    for name, model in world.models.items():
        instance = world.instance_of(name)
        models.append(
            msgspec.structs.replace(
                model.facts.listing,
                state=str(instance.state) if instance is not None else str(InstanceState.ABSENT),
                resident=instance is not None and instance.resident,
            )
        )
    return Catalog(
        generation=world.generation,
        term_ms=round(settings.term * 1000),
        limits=Limits(
            queue_timeout_ms=round(settings.queue_timeout * 1000),
            queue_requests=settings.queue_requests,
            queue_bytes=settings.queue_bytes,
        ),
        models=tuple(models),
    )


def tell_progress(world: World) -> None:
    """Tell gateways how far the models are that their requests wait for."""
    for name in list(world.waiting.models()):
        model = world.models[name]
        stage, fraction, eta = _stage(world, name)
        line = world.waiting.line(name)
        for gateway in list(line.gateways()):
            head = world.waiting.head(name, gateway)
            if gateway not in world.gateways or head is None:
                continue
            ahead = sum(1 for other in line.gateways() if other != gateway and _before(world, name, other, head.rank))
            eta_ms = None if eta is None else round(eta * 1000 + (model.pace.average.value or 0.0) * 1000 * ahead)
            world.say(gateway, Progress(model=name, stage=stage, ahead=ahead, fraction=fraction, eta_ms=eta_ms))


def _before(world: World, model: str, gateway: str, rank: float) -> bool:
    head = world.waiting.head(model, gateway)
    return head is not None and head.rank < rank


def _stage(world: World, name: str) -> tuple[str, float | None, float | None]:
    """Return a waiting model's stage, its fraction, and the seconds until it serves, where they can be told."""
    model = world.models[name]
    instance = world.instance_of(name)
    if instance is not None and instance.resident:
        return "running", None, None
    swap = world.devices[model.device].swap
    if swap is None or swap.target != name:
        if not model.prepared and model.preparation.state is Preparedness.UNDER_WAY:
            return model.preparation.stage or "preparing", model.preparation.fraction, None
        return "queued", None, None
    expected = model.swap_time.value
    if instance is not None and instance.state in _COMING:
        wakes = instance.state is InstanceState.WAKING
        load = (model.wake_time if wakes else model.load_time).value
        eta = None if load is None else max(load - (world.now - instance.since), 0.0)
        return instance.stage or ("waking" if wakes else "loading"), instance.fraction, eta
    return str(swap.phase), None, expected


def _lease(world: World, gateway: str, model: str, epoch: Epoch) -> tuple[Instance, Lease] | None:
    instance = world.instance_of(model)
    if instance is None:
        return None
    lease = instance.leases.get((gateway, epoch))
    return (instance, lease) if lease is not None else None
