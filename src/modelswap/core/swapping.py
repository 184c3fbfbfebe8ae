"""The swap transaction as decisions: fence, drain, put out, verify the memory, bring in, open.

One swap at a time per device. `decide` begins one, `advance` carries it on after every event.
"""

from __future__ import annotations

from modelswap.core import effects, idling, leasing, pinning, sleeping, waiting
from modelswap.core.policy import Policy, Residency
from modelswap.core.states import InstanceState
from modelswap.core.swap import Phase, Swap, SwapOutcome
from modelswap.core.world import Backoff, DeviceRecord, Instance, ModelRecord, Preparation, World
from modelswap.protocol.errors import Code

_READY = InstanceState.READY


def decide(world: World, device: DeviceRecord, policy: Policy) -> None:
    """Begin a swap on an idle device, if one is due."""
    device.reconsider_at = None
    if not world.begun or device.swap is not None:
        return
    here = list(world.on_device(device.name))
    if any(instance.state is not _READY for instance in here):
        return  # one that died is being cleared away
    outdated = [i for i in here if sleeping.unwanted(world, i)]
    if outdated:
        _begin(world, device, None, outdated, queue=0.0)
        return
    idling.settle_line(world, device)
    contender = waiting.contender(world, device)
    for instance in here:
        leasing.set_contended(world, instance, contended=contender is not None)
    if contender is None:
        _retire(world, device, here)
    if contender is None or device.stuck or device.blocked:
        return
    model = world.models[contender.model]
    queue = max(world.now - contender.arrived, 0.0)
    if world.room(device) + device.dirty >= model.facts.demand:
        _begin(world, device, contender.model, [], queue)
        return
    leaving = pinning.victims(world, device, here, model.facts.demand)
    for instance in leaving:
        residency = Residency(
            since=instance.ready_at,
            floor=instance.floor,
            idle_since=leasing.idle_since(world, instance),
            swap_time=world.models[instance.model].swap_time.value,
        )
        verdict = policy.consider(residency, contender, world.settings, world.now)
        if not verdict.leave:
            device.reconsider_at = verdict.again_at
            return
    _begin(world, device, contender.model, leaving, queue)


def advance(world: World, device: DeviceRecord) -> None:
    """Carry the swap under way on this device as far as it goes now."""
    swap = device.swap
    if swap is None:
        return
    if swap.phase is Phase.DRAIN:
        _drain(world, device, swap)
    waits = device.swap is swap and swap.phase is not Phase.IN
    if waits and swap.target is not None and not waiting.startable(world, device, swap.target):
        swap.target = None  # the config has changed: who comes in is chosen anew when the device is free
    if device.swap is swap and swap.phase is Phase.OUT:
        _after_out(world, device, swap)
    if device.swap is swap and swap.phase is Phase.RELEASE and not device.dirty and not _addressed(world):
        _bring_in(world, device, swap)


def next_deadline(world: World, device: DeviceRecord) -> float | None:
    """Return when this device must be looked at again, if nothing happens before."""
    swap = device.swap
    if swap is None:
        return device.reconsider_at
    if swap.phase is Phase.DRAIN and not swap.aborted and world.settings.abort_on_drain_timeout:
        return swap.phase_began + world.settings.drain_timeout
    return None


def adopt_start(world: World, instance: Instance) -> None:
    """Take up the start of an instance that an earlier orchestrator, or somebody else, began."""
    instance.adopted = True
    device = world.devices[instance.device]
    swap = _new_swap(world, device, instance.model, [], queue=0.0)
    swap.enter(Phase.IN, world.now)
    swap.instance = instance.id
    _emit_bring_in(world, instance, adopted=True)


def brought_in(world: World, instance: Instance, mechanism: str) -> None:
    """Open an instance that has proved healthy, and end its swap. ``mechanism``: how it was started, if it was."""
    device = world.devices[instance.device]
    swap = device.swap
    model = world.models.get(instance.model)
    woken = instance.state is InstanceState.WAKING
    if swap is not None:
        swap.mechanism = "wake" if woken else mechanism
    world.transition(instance, _READY, "woken" if woken else "brought in")
    instance.stage, instance.fraction = "", None
    if model is not None:
        model.mishaps = model.unprepared_starts = 0
        model.failed_wakes = 0 if woken else model.failed_wakes
        model.failures = max(model.early_deaths - world.settings.crashes_forgiven, 0)
    if model is not None and swap is not None and not instance.adopted:
        (model.wake_time if woken else model.load_time).add(world.now - swap.phase_began)
        model.swap_time.add(world.now - swap.began - swap.phases.get(Phase.DRAIN, 0.0))
    leasing.open_instance(world, instance)
    if swap is not None:
        _end(world, device, SwapOutcome.OK)
    world.emit(effects.Watch(instance=instance.id, model=instance.model))
    waiting.answer_ensures(world, instance, "wake" if woken else mechanism, swap.source if swap is not None else None)


def bring_in_failed(
    world: World, instance: Instance, code: Code, message: str, *, permanent: bool, blameless: bool, unprepared: bool
) -> None:
    """Refuse whoever waits for a model that would not start, and leave it alone for a while.

    One that is ``blameless`` is tried again for the same waiters, at most ``mishaps_forgiven`` times. One
    that found itself ``unprepared`` is prepared once more first, at most ``unprepared_forgiven`` times.
    """
    device = world.devices[instance.device]
    _unstick(device, instance)
    world.transition(instance, InstanceState.FAILED, message.partition("\n")[0])
    world.soil(instance)
    model = world.models.get(instance.model)
    if model is None or model.facts.definition != instance.definition:
        world.clear_failed(instance)  # which says nothing about the definition that holds now
    elif blameless and model.mishaps < world.settings.mishaps_forgiven:
        model.mishaps += 1
    elif not _mended(world, model, unprepared=unprepared):
        back_off(world, instance.model, code, message, permanent=permanent)
    else:
        world.clear_failed(instance)
    _end(world, device, SwapOutcome.FAILED, message)


def wake_failed(world: World, instance: Instance, message: str) -> None:
    """Keep the waiters of a model whose sleeper couldn't be woken: the next try is a start.

    After more than ``wakes_forgiven`` in a row it doesn't sleep any more.
    """
    device = world.devices[instance.device]
    _unstick(device, instance)
    world.transition(instance, InstanceState.FAILED, message.partition("\n")[0])
    world.soil(instance)
    world.clear_failed(instance)
    model = world.models.get(instance.model)
    if model is not None:
        model.failed_wakes += 1
        if model.failed_wakes > world.settings.wakes_forgiven:
            model.way = model.failed_wakes = 0
    _end(world, device, SwapOutcome.FAILED, message)


def back_off(world: World, name: str, code: Code, message: str, *, permanent: bool) -> None:
    """Don't start a model for a while, longer each time; refuse whoever waits for it."""
    model = world.models.get(name)
    if model is None:
        return
    settings = world.settings
    model.failures += 1
    pause = min(settings.backoff_first * 2.0 ** (model.failures - 1), settings.backoff_longest)
    model.backoff = Backoff(
        until=world.now + pause, failures=model.failures, code=code, message=message, permanent=permanent
    )
    waiting.refuse_model(world, name, code, message, pause)


def died(world: World, instance: Instance, message: str) -> None:
    """Clear away an instance that ended by itself or hangs. Its waiters go on waiting for the next one."""
    early = world.now - instance.ready_at < world.settings.crash_window
    awake = not instance.asleep
    world.transition(instance, InstanceState.STOPPING, message.partition("\n")[0] or "died")
    leasing.close_instance(world, instance)
    world.emit(effects.PutOut(instance=instance.id, model=instance.model, kill=True))
    model = world.models.get(instance.model)
    if model is None or not awake:
        return
    # A few times are bad luck and cost nothing; a model that keeps dying must not evict the others again and again.
    model.early_deaths = model.early_deaths + 1 if early else 0
    if model.early_deaths > world.settings.crashes_forgiven:
        back_off(world, instance.model, Code.MODEL_START_FAILED, message, permanent=False)


def put_out(world: World, instance: Instance) -> None:
    """Note that nothing of an instance runs any more; it is forgotten once its leases have drained too."""
    instance.gone = True
    _unstick(world.devices[instance.device], instance)
    settle(world, instance)


def settle(world: World, instance: Instance) -> None:
    """Forget an instance whose processes and leases are gone."""
    if not instance.gone or instance.leases:
        return
    asleep = instance.asleep
    world.transition(instance, InstanceState.ABSENT, "put out")
    world.remove(instance)
    if asleep:
        visited(world, world.devices[instance.device], instance.model, instance.demand)
    else:
        world.soil(instance)


def put_out_failed(world: World, instance: Instance, message: str) -> None:
    """Mark the device stuck and answer everybody who waits for it: a process can't be killed."""
    device = world.devices[instance.device]
    device.stuck, device.stuck_by = message, instance.id
    _refuse_device(world, device, Code.DEVICE_STUCK, message)


def released(world: World, device: DeviceRecord) -> None:
    """Note that the device's memory is free again."""
    device.dirty = 0
    device.blocked = ""


def release_failed(world: World, device: DeviceRecord, message: str) -> None:
    """Answer everybody who waits for a device whose memory doesn't come back; its swap goes on when it does."""
    device.blocked = message
    _refuse_device(world, device, Code.MEMORY_NOT_RELEASED, message)


def visited(world: World, device: DeviceRecord, guest: str, demand: int) -> None:
    """Note that what held no capacity (somebody else's engine, a sleeper) may have left memory there.

    It must be seen to be back before the next start.
    """
    if device.private:
        return
    before = device.dirty
    device.dirty += max(min(demand, world.room(device)), 0)
    swap = device.swap
    if device.dirty and not before and swap is not None and swap.phase is Phase.RELEASE:
        _verify(world, device, swap.target or guest)


def cancel_start(world: World, instance: Instance) -> None:
    """Stop an instance that is being started or woken."""
    world.transition(instance, InstanceState.STOPPING, "no longer wanted")
    world.emit(effects.PutOut(instance=instance.id, model=instance.model))
    _end(world, world.devices[instance.device], SwapOutcome.CANCELLED)


def stop_at_once(world: World, instance: Instance) -> None:
    """Stop a ready, draining or sleeping instance without waiting for what runs on it."""
    if instance.state is InstanceState.ASLEEP:
        sleeping.drop(world, instance, "stopped at once", kill=True)
    if instance.state in (_READY, InstanceState.DRAINING):
        world.transition(instance, InstanceState.STOPPING, "stopped at once")
        leasing.close_instance(world, instance, abort=True)
        world.emit(effects.PutOut(instance=instance.id, model=instance.model, kill=True))


# ── inside ───────────────────────────────────────────────────────────────────────────────────────────────


def _unstick(device: DeviceRecord, gone: Instance) -> None:
    """Note that a process has gone, which may be the one that couldn't be killed."""
    if device.stuck_by == gone.id:
        device.stuck = device.stuck_by = ""


def _addressed(world: World) -> bool:
    """Return whether a gateway may still use an address that a new engine could get."""
    return bool(world.doubtful or world.fences) or any(instance.gone for instance in world.instances.values())


def _mended(world: World, model: ModelRecord, *, unprepared: bool) -> bool:
    """Have a model that was found ``unprepared`` prepared again; return whether its waiters are kept for that."""
    if not unprepared or not model.facts.prepare:
        return False
    if model.prepared:
        model.preparation = Preparation()
    model.unprepared_starts += 1
    return model.unprepared_starts <= world.settings.unprepared_forgiven


def _new_swap(world: World, device: DeviceRecord, target: str | None, victims: list[Instance], queue: float) -> Swap:
    device.swap = Swap(
        device=device.name,
        target=target,
        source=victims[0].model if victims else None,
        victims=[victim.id for victim in victims],
        began=world.now,
        queue=queue,
        phase=Phase.DRAIN,
        phase_began=world.now,
    )
    device.reconsider_at = None
    world.progress_at = world.now  # waiting clients hear of it at once
    return device.swap


def _retire(world: World, device: DeviceRecord, here: list[Instance]) -> None:
    """Put out the first instance that has been idle for its time to live, or note when one will have been."""
    for instance in here:
        due = idling.due(world, instance)
        if due is not None and world.now >= due:
            _begin(world, device, None, [instance], queue=0.0, idle=True)
            return
        if due is not None:
            device.reconsider_at = min(due, device.reconsider_at or due)


def _begin(
    world: World,
    device: DeviceRecord,
    target: str | None,
    victims: list[Instance],
    queue: float,
    *,
    idle: bool = False,
) -> None:
    _new_swap(world, device, target, victims, queue).idle = idle
    for victim in victims:
        cause = "idle" if idle else "unload"
        world.transition(victim, InstanceState.DRAINING, f"swap to {target}" if target else cause)
        leasing.close_instance(world, victim)
    advance(world, device)


def _drain(world: World, device: DeviceRecord, swap: Swap) -> None:
    draining = [world.instances[v] for v in swap.victims if v in world.instances]
    if swap.target is not None and draining and not waiting.eligible(world, device, swap.target):
        following = waiting.contender(world, device)
        if following is not None and all(victim.model != following.model for victim in draining):
            swap.target = following.model
        elif all(_untouched(victim) for victim in draining):
            _open_again(world, device, draining)
            return
        # Else something has been stopped already: the target is chosen anew when the device is free.
    called_off = (swap.idle and all(_wanted(world, i) for i in draining)) or idling.pinned_meanwhile(
        world, swap, draining
    )
    if draining and called_off and all(_untouched(victim) for victim in draining):
        _open_again(world, device, draining)
        return
    settings = world.settings
    overdue = world.now >= swap.phase_began + settings.drain_timeout
    if settings.abort_on_drain_timeout and overdue and not swap.aborted:
        swap.aborted = True
        for victim in draining:
            leasing.close_instance(world, victim, abort=True)
    for victim in draining:
        if not _untouched(victim) or victim.leases:
            continue
        depth = sleeping.level(world, swap, victim)
        if depth:
            sleeping.begin(world, swap, victim, depth)
        else:
            world.transition(victim, InstanceState.STOPPING, "drained")
            world.emit(effects.PutOut(instance=victim.id, model=victim.model))
    if not any(_untouched(victim) for victim in draining):
        swap.enter(Phase.OUT, world.now)


def _wanted(world: World, instance: Instance) -> bool:
    """Return whether somebody waits for an instance that may go on serving."""
    return world.waiting.line(instance.model).count > 0 and not sleeping.unwanted(world, instance)


def _untouched(victim: Instance) -> bool:
    """Return whether an instance only drains so far: it could be opened again."""
    return victim.state is InstanceState.DRAINING and not victim.falling


def _open_again(world: World, device: DeviceRecord, draining: list[Instance]) -> None:
    """Undo a swap that nobody waits for any more, before anything was stopped."""
    for victim in draining:
        world.transition(victim, _READY, "nobody waits for another any more")
        if victim.model in world.models:
            world.models[victim.model].backoff = None  # it couldn't be prepared meanwhile, but needn't be
        leasing.open_instance(world, victim)
        waiting.answer_ensures(world, victim, "resident", None)
    _end(world, device, SwapOutcome.CANCELLED)


def _after_out(world: World, device: DeviceRecord, swap: Swap) -> None:
    if any(victim in world.instances and not world.instances[victim].asleep for victim in swap.victims):
        return
    if swap.victims:
        swap.out = "sleep" if swap.victims[0] in world.instances else "stop"
    if swap.target is None:
        _end(world, device, SwapOutcome.OK)
        return
    swap.enter(Phase.RELEASE, world.now)
    if device.dirty:
        _verify(world, device, swap.target)


def _bring_in(world: World, device: DeviceRecord, swap: Swap) -> None:
    following = waiting.contender(world, device)
    if following is None:
        _end(world, device, SwapOutcome.CANCELLED)
        return
    if swap.target is None or not waiting.eligible(world, device, swap.target):
        swap.target = following.model
    before = world.instance_of(swap.target)
    if before is not None and before.state is InstanceState.ASLEEP:
        _wake(world, swap, before)
        return
    if before is not None and before.state is not InstanceState.FAILED:
        return  # it is still being stopped, in its sleep or on the device where the config had it before
    swap.enter(Phase.IN, world.now)
    world.starts += 1
    instance = world.add_instance(world.models[swap.target], f"{swap.target}.{world.generation}.{world.starts}")
    swap.instance = instance.id
    world.transition(instance, InstanceState.STARTING, f"swap from {swap.source}" if swap.source else "wanted")
    _emit_bring_in(world, instance, adopted=False)
    world.progress_at = world.now


def _wake(world: World, swap: Swap, sleeper: Instance) -> None:
    swap.enter(Phase.IN, world.now)
    swap.instance, swap.mechanism = sleeper.id, "wake"
    depth, sleeper.adopted = sleeper.asleep, False
    world.transition(sleeper, InstanceState.WAKING, f"swap from {swap.source}" if swap.source else "wanted")
    world.emit(effects.Wake(instance=sleeper.id, model=sleeper.model, level=depth, definition=sleeper.definition))
    world.progress_at = world.now


def _verify(world: World, device: DeviceRecord, model: str) -> None:
    holders = tuple(i.id for i in (*world.on_device(device.name), *world.sleepers(device.name)))
    world.emit(effects.VerifyReleased(device=device.name, model=model, holders=holders))


def _emit_bring_in(world: World, instance: Instance, *, adopted: bool) -> None:
    world.emit(
        effects.BringIn(instance=instance.id, model=instance.model, definition=instance.definition, adopted=adopted)
    )


def _refuse_device(world: World, device: DeviceRecord, code: Code, message: str) -> None:
    for name in list(world.waiting.models()):
        model = world.models.get(name)
        instance = world.instance_of(name)
        if model is not None and model.device == device.name and not (instance is not None and instance.resident):
            waiting.refuse_model(world, name, code, message)


def _end(world: World, device: DeviceRecord, outcome: SwapOutcome, message: str = "") -> None:
    swap = device.swap
    if swap is not None:
        device.swap = None
        world.emit(effects.SwapEnded(record=swap.record(world.now, outcome, message)))
        world.progress_at = world.now
