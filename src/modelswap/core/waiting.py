"""Tickets and admin requests: taken in, granted, refused, forgotten; each exactly once."""

from __future__ import annotations

from modelswap.core import effects, pinning, sleeping
from modelswap.core.line import ADMIN, Ticket, TicketKey
from modelswap.core.policy import Contender
from modelswap.core.world import DeviceRecord, Instance, ModelRecord, Request, World
from modelswap.protocol.errors import OUTCOMES, Code
from modelswap.protocol.messages import Refuse, Want

URGENT = float("-inf")
"""The rank of an operator's request."""


def want(world: World, gateway: str, message: Want) -> None:
    """Let a gateway's request wait, or refuse it at once."""
    key = (gateway, message.ticket)
    if key in world.waiting:
        return
    arrived = world.now - message.age_ms / 1000
    ticket = Ticket(
        key=key,
        model=message.model,
        arrived=arrived,
        rank=arrived - message.priority * world.settings.priority_boost,
        bytes=message.body_bytes,
    )
    refusal = _objection(world, message.model) or _pinned_out(world, message.model) or _no_room(world, ticket)
    if refusal is not None:
        code, text, retry_after = refusal
        _say_refused(world, ticket, code, text, retry_after)
        return
    world.waiting.add(ticket)


def grant(world: World, key: TicketKey) -> None:
    """Note that a ticket was admitted."""
    ticket = _end(world, key, "granted")
    if ticket is not None and ticket.gateway != ADMIN:
        model = world.models.get(ticket.model)
        if model is not None:
            model.pace.admitted(world.now, world.waiting.line(ticket.model).count)


def forget(world: World, key: TicketKey) -> Ticket | None:
    """Note that a ticket's client has gone; returns the ticket, if it still waited."""
    return _end(world, key, "forgotten")


def forget_gateway(world: World, gateway: str) -> None:
    """Forget all tickets of a gateway."""
    for ticket in world.waiting.of_gateway(gateway):
        _end(world, ticket.key, "forgotten")


def refuse(world: World, ticket: Ticket, code: Code, message: str, retry_after: float | None = None) -> None:
    """Refuse a waiting ticket; ``retry_after`` in seconds overrides the table's."""
    if _end(world, ticket.key, "refused", silent=True) is not None:
        _say_refused(world, ticket, code, message, retry_after)


def refuse_model(world: World, model: str, code: Code, message: str, retry_after: float | None = None) -> None:
    """Refuse everything that waits for a model."""
    for ticket in world.waiting.of_model(model):
        refuse(world, ticket, code, message, retry_after)


def ensure(world: World, request: Request) -> None:
    """Take in an admin request to make a model resident."""
    model = request.model or ""
    objection = _objection(world, model)
    if objection is not None:
        code, text, retry_after = objection
        _answer(world, request, code, text, retry_after)
        return
    instance = world.instance_of(model)
    if instance is not None and instance.resident:
        _answer_ready(world, request, instance, mechanism="resident")
        return
    world.ensures[request.id] = request
    world.waiting.add(Ticket(key=(ADMIN, request.id), model=model, arrived=world.now, rank=URGENT))


def preload(world: World, model: ModelRecord) -> None:
    """Ask for a model as an operator would, for nobody."""
    request = Request(id=-len(world.ensures) - 1, model=model.facts.name, began=world.now, preload=True)
    ensure(world, request)


def cancel_preload(world: World, name: str) -> None:
    """Forget that a model was to be preloaded."""
    for request in [r for r in world.ensures.values() if r.preload and r.model == name]:
        withdraw(world, request.id)


def ensured(world: World, name: str) -> bool:
    """Return whether an operator waits for a model."""
    return any(request.model == name for request in world.ensures.values())


def withdraw(world: World, request: int) -> None:
    """Forget an admin request."""
    world.ensures.pop(request, None)
    world.unloads.pop(request, None)
    _end(world, (ADMIN, request), "forgotten")


def answer_ensures(world: World, instance: Instance, mechanism: str, previous: str | None) -> None:
    """Answer every admin request that waited for this instance, which is open now."""
    for request in [r for r in world.ensures.values() if r.model == instance.model]:
        grant(world, (ADMIN, request.id))
        request.previous = previous
        _answer_ready(world, request, instance, mechanism)


def answer_unload(world: World, request: Request) -> None:
    """Answer an `Unload` whose instances are gone."""
    world.unloads.pop(request.id, None)
    world.emit(
        effects.Answer(
            request=request.id,
            model=request.model,
            previous=request.previous,
            mechanism="stop" if request.previous is not None else "absent",
            seconds=world.now - request.began,
        )
    )


def contender(world: World, device: DeviceRecord) -> Contender | None:
    """Return the model whose turn is next: of those that could come in on this device, the one that waits longest."""
    best: Ticket | None = None
    for name in world.waiting.models():
        head = world.waiting.head(name) if eligible(world, device, name) else None
        if head is not None and (best is None or head.rank < best.rank):
            best = head
    if best is None:
        return None
    return Contender(model=best.model, rank=best.rank, arrived=best.arrived, urgent=best.urgent)


def eligible(world: World, device: DeviceRecord, name: str) -> bool:
    """Return whether somebody waits for a model that could come in on this device now."""
    model = world.models.get(name)
    if model is None or model.backoff is not None or not startable(world, device, name):
        return False
    instance = world.instance_of(name)
    return world.waiting.line(name).count > 0 and not (instance is not None and instance.resident)


def startable(world: World, device: DeviceRecord, name: str) -> bool:
    """Return whether a model is configured for this device, and prepared (or only to be woken)."""
    model = world.models.get(name)
    here = model is not None and model.device == device.name
    return here and model is not None and (model.prepared or sleeping.wakeable(world, name))


def estimate(world: World, model: ModelRecord) -> float:
    """Return roughly how many seconds a new request for ``model`` would wait, from what was measured."""
    line = world.waiting.line(model.facts.name).count
    pace = model.pace.average.value or 0.0
    instance = world.instance_of(model.facts.name)
    swap = 0.0 if instance is not None and instance.resident else model.swap_time.value or 5.0
    return min(max(swap + line * pace, 1.0), 120.0)


def unknown_model(world: World, model: str) -> str:
    """Return the message for a model that isn't configured."""
    return f"The model '{model}' does not exist; there are: {', '.join(sorted(world.models)) or 'none'}"


def _objection(world: World, model: str) -> tuple[Code, str, float | None] | None:
    """Return why a request for ``model`` can't wait at all: code, message, seconds to come back after."""
    record = world.models.get(model)
    if record is None:
        return Code.MODEL_NOT_FOUND, unknown_model(world, model), None
    if world.shutting_down:
        return Code.SHUTTING_DOWN, "modelswap is shutting down", None
    backoff = record.backoff
    if backoff is not None:
        return backoff.code, backoff.message, max(backoff.until - world.now, 0.001)
    device = world.devices[record.device]
    instance = world.instance_of(model)
    if instance is not None and instance.resident:
        return None
    if device.stuck:
        return Code.DEVICE_STUCK, device.stuck, None
    if device.blocked:
        return Code.MEMORY_NOT_RELEASED, device.blocked, None
    return None


def _pinned_out(world: World, name: str) -> tuple[Code, str, float | None] | None:
    """Return the refusal of a request whose model pinned ones keep out, unless an operator waits for it, too."""
    message = "" if ensured(world, name) else pinning.shut_out(world, world.models[name])
    return (Code.MODEL_PINNED, message, None) if message else None


def _no_room(world: World, ticket: Ticket) -> tuple[Code, str, float | None] | None:
    settings = world.settings
    waiting = len(world.waiting)
    if waiting < settings.queue_requests and world.waiting.bytes + ticket.bytes <= settings.queue_bytes:
        return None
    message = f"The queue is full: {waiting} requests ({world.waiting.bytes} bytes) wait already; come back later"
    return Code.QUEUE_FULL, message, estimate(world, world.models[ticket.model])


def _end(world: World, key: TicketKey, outcome: str, *, silent: bool = False) -> Ticket | None:
    ticket = world.waiting.remove(key)
    if ticket is None:
        return None
    if ticket.floor_of is not None:
        instance = world.instances.get(ticket.floor_of)
        if instance is not None:
            instance.floor -= 1
    if not silent and ticket.gateway != ADMIN:
        world.emit(effects.TicketEnded(model=ticket.model, outcome=outcome, waited=world.now - ticket.arrived))
    return ticket


def _say_refused(world: World, ticket: Ticket, code: Code, message: str, retry_after: float | None) -> None:
    if ticket.gateway == ADMIN:
        request = world.ensures.pop(ticket.key[1])
        _answer(world, request, code, message, retry_after)
        return
    outcome = OUTCOMES[code]
    world.emit(effects.TicketEnded(model=ticket.model, outcome="refused", waited=world.now - ticket.arrived))
    world.say(
        ticket.gateway,
        Refuse(
            ticket=ticket.key[1],
            status=outcome.status,
            code=code,
            message=message,
            retry_after_ms=_milliseconds(retry_after, outcome.retry_after_ms),
            should_retry=outcome.should_retry,
        ),
    )


def _answer(world: World, request: Request, code: Code, message: str, retry_after: float | None) -> None:
    if request.preload:
        return
    world.emit(
        effects.Answer(
            request=request.id,
            model=request.model,
            code=code,
            message=message,
            retry_after_ms=_milliseconds(retry_after, OUTCOMES[code].retry_after_ms),
            seconds=world.now - request.began,
        )
    )


def _answer_ready(world: World, request: Request, instance: Instance, mechanism: str) -> None:
    world.ensures.pop(request.id, None)
    if request.preload:
        return
    world.emit(
        effects.Answer(
            request=request.id,
            model=instance.model,
            previous=request.previous,
            mechanism=mechanism,
            seconds=world.now - request.began,
            host=instance.host,
            port=instance.port,
        )
    )


def _milliseconds(seconds: float | None, default: int | None) -> int | None:
    return default if seconds is None else max(1, round(seconds * 1000))
