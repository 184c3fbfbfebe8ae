"""The scheduler: a pure state machine. Events in, effects out; time comes in on events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modelswap.core import (
    appearing,
    effects,
    events,
    foreseeing,
    idling,
    invariants,
    leasing,
    pinning,
    preparing,
    sleeping,
    swapping,
    views,
    waiting,
)
from modelswap.core.estimates import Average
from modelswap.core.facts import DeviceFacts
from modelswap.core.policy import GateFloor, Policy
from modelswap.core.snapshot import Snapshot
from modelswap.core.states import InstanceState, Preparedness
from modelswap.core.world import DeviceRecord, Instance, ModelRecord, Preparation, Request, World
from modelswap.protocol.errors import Code
from modelswap.protocol.messages import Admitted, Drained, Fault, Forget, Heartbeat, Hello, Usage, Want


class Scheduler:
    """Decides which model is resident on each device, and tells gateways.

    ``generation`` must be greater than that of every scheduler before. `handle` takes one event and returns what is to
    be done, in order. A `ForbiddenTransitionError` from it is a bug in this package.
    """

    def __init__(self, generation: int, policy: Policy | None = None) -> None:
        self._world = World(generation=generation)
        self._handled_at = float("inf")
        self._policy = policy if policy is not None else GateFloor()
        self._handlers: dict[type[events.Event], Callable[[Any], None]] = {
            events.Configure: self._configure,
            events.Adopted: self._adopted,
            events.Begin: self._begin,
            events.GatewaySaid: self._gateway_said,
            events.GatewayLost: self._gateway_lost,
            events.BringInStage: self._bring_in_stage,
            events.BroughtIn: self._brought_in,
            events.BringInFailed: self._bring_in_failed,
            events.Ways: self._ways,
            events.Slept: self._slept,
            events.SleepFailed: self._sleep_failed,
            events.WakeFailed: self._wake_failed,
            events.DropSleeper: self._drop_sleeper,
            events.PrepareStage: self._prepare_stage,
            events.Prepared: self._prepared,
            events.PrepareFailed: self._prepare_failed,
            events.Appeared: self._appeared,
            events.Died: self._died,
            events.PutOut: self._put_out,
            events.PutOutFailed: self._put_out_failed,
            events.Released: self._released,
            events.ReleaseFailed: self._release_failed,
            events.Probed: self._probed,
            events.Ensure: self._ensure,
            events.Unload: self._unload,
            events.Pin: self._pin,
            events.Withdraw: self._withdraw,
            events.Tick: self._tick,
            events.Shutdown: self._shutdown,
        }

    # ── the three calls ──────────────────────────────────────────────────────────────────────────────────

    def handle(self, event: events.Event) -> list[effects.Effect]:
        """Take one event in; return what is to be done now, in order."""
        world = self._world
        world.now = max(world.now, event.at)  # a clock that stepped back must not undo waiting
        if world.now - self._handled_at > world.settings.term / 3:
            leasing.overslept(world)
        self._handled_at = world.now
        self._handlers[type(event)](event)
        self._follow_up()
        out, world.out = world.out, []
        return out

    def next_deadline(self) -> float | None:
        """Return when a `Tick` is due if nothing else happens; None if never."""
        world = self._world
        times = [at for device in world.devices.values() if (at := swapping.next_deadline(world, device)) is not None]
        if world.begin_deadline is not None:
            times.append(world.begin_deadline)
        times.extend(world.doubtful.values())
        if world.gateways or times:
            # Half of the gap from which `handle` tells that our own process was stopped or starved.
            times.append(self._handled_at + world.settings.term / 6)
        times.extend(gateway.heard + world.settings.term for gateway in world.gateways.values())
        times.extend(model.backoff.until for model in world.models.values() if model.backoff is not None)
        if len(world.waiting):
            times.append(world.progress_at)
        return min(times, default=None)

    def snapshot(self, now: float) -> Snapshot:
        """Return the whole state as plain data."""
        return views.snapshot(self._world, now)

    def check(self) -> None:
        """Assert every invariant; raises `AssertionError` that says which one is broken."""
        invariants.check(self._world)

    @property
    def world(self) -> World:
        """All that it knows, for tests and the simulator to look at."""
        return self._world

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────

    def _configure(self, event: events.Configure) -> None:
        world = self._world
        world.settings = event.settings
        before, world.models = world.models, {}
        devices = {facts.name: facts for facts in event.devices}
        for facts in event.models:
            private = facts.device is None
            name = f"beside:{facts.name}" if facts.device is None else facts.device
            if private:
                devices[name] = DeviceFacts(name, facts.demand)
            old = before.get(facts.name)
            slots_before = old.facts.slots if old is not None else 0
            model = ModelRecord(facts=facts, device=name, swap_time=Average(facts.swap_seconds))
            if old is not None and old.facts.pinned == facts.pinned:
                model.pin = old.pin
            if old is not None and old.facts.definition == facts.definition:
                old.pin = model.pin
                old.facts, old.device, model = facts, name, old
            world.models[facts.name] = model
            instance = world.instance_of(facts.name)
            if instance is not None and model is old and slots_before != facts.slots:
                instance.slots = facts.slots
            if instance is not None and self._being_started(instance, facts.definition):
                model.preparation = Preparation(state=Preparedness.DONE)  # else it wouldn't be
        for name, device_facts in devices.items():
            device = world.devices.get(name)
            if device is None:
                world.devices[name] = DeviceRecord(facts=device_facts, private=name.startswith("beside:"))
            else:
                device.facts = device_facts
        for instance in [i for i in world.instances.values() if i.state is InstanceState.FAILED]:
            record = world.models.get(instance.model)
            if record is None or record.backoff is None:
                world.clear_failed(instance)
        occupied = {instance.device for instance in world.instances.values()}
        for name in [name for name in world.devices if name not in devices and name not in occupied]:
            del world.devices[name]
        for model_name in [name for name in world.waiting.models() if name not in world.models]:
            message = waiting.unknown_model(world, model_name)
            waiting.refuse_model(world, model_name, Code.MODEL_NOT_FOUND, message)
        world.catalog_changed = True

    def _adopted(self, event: events.Adopted) -> None:
        world = self._world
        instance = world.add_instance(world.models[event.model], event.instance)
        instance.definition, instance.adopted = event.definition, True
        instance.host, instance.port, instance.slots = event.host, event.port, event.slots
        if event.asleep:
            instance.asleep = event.asleep
            world.transition(instance, InstanceState.ASLEEP, "adopted asleep")
        elif event.ready:
            world.transition(instance, InstanceState.READY, "adopted")
            instance.ready_at = world.now
        else:
            world.transition(instance, InstanceState.STARTING, "adopted while starting")

    def _begin(self, event: events.Begin) -> None:
        world = self._world
        world.expected = set(event.expected) - world.gateways.keys()
        world.begin_deadline = world.now + world.settings.term
        world.doubtful.update(dict.fromkeys(world.expected, world.begin_deadline))
        if not world.instances:
            world.expected.clear()  # nothing runs, so no lease can be held on anything
        for device in world.devices.values():
            if not device.private:
                device.dirty = max(world.room(device), 0)  # what an earlier orchestrator put out may still hold it

    def _gateway_said(self, event: events.GatewaySaid) -> None:
        world = self._world
        gateway, message = event.gateway, event.message
        if isinstance(message, Hello):
            leasing.hello(world, gateway, message)
            return
        record = world.gateways.get(gateway)
        if record is None:
            return  # broken, or never said hello; it is being disconnected
        record.heard = world.now
        match message:
            case Want():
                waiting.want(world, gateway, message)
                self._share(message.model)
            case Forget():
                ticket = waiting.forget(world, (gateway, message.ticket))
                if ticket is not None:
                    self._share(ticket.model)  # a slot may have been given for this very ticket
            case Admitted():
                leasing.admitted(world, gateway, message)
            case Usage():
                leasing.usage(world, gateway, message)
            case Drained():
                leasing.drained(world, gateway, message)
            case Fault():
                leasing.fault(world, gateway, message)
            case Heartbeat():
                world.say(gateway, Heartbeat(n=message.n))

    def _share(self, model: str) -> None:
        instance = self._world.instance_of(model)
        if instance is not None and instance.resident:
            leasing.share(self._world, instance)

    def _gateway_lost(self, event: events.GatewayLost) -> None:
        leasing.lost(self._world, event.gateway)

    def _bring_in_stage(self, event: events.BringInStage) -> None:
        instance = self._world.instances.get(event.instance)
        if instance is not None and instance.state in (InstanceState.STARTING, InstanceState.WAKING):
            instance.stage, instance.fraction = event.stage, event.fraction

    def _brought_in(self, event: events.BroughtIn) -> None:
        instance = self._in(event.instance, InstanceState.STARTING, InstanceState.WAKING)
        if instance is not None:
            instance.host, instance.port, instance.slots = event.host, event.port, event.slots
            swapping.brought_in(self._world, instance, event.mechanism)

    def _bring_in_failed(self, event: events.BringInFailed) -> None:
        instance = self._in(event.instance, InstanceState.STARTING, InstanceState.WAKING)
        if instance is not None and instance.state is InstanceState.WAKING:
            swapping.wake_failed(self._world, instance, event.message)
        elif instance is not None:
            swapping.bring_in_failed(
                self._world,
                instance,
                event.code,
                event.message,
                permanent=event.permanent,
                blameless=event.blameless,
                unprepared=event.unprepared,
            )

    def _ways(self, event: events.Ways) -> None:
        model = self._world.models.get(event.model)
        if model is not None and model.facts.definition == event.definition:
            model.way, model.failed_wakes = event.level, 0

    def _slept(self, event: events.Slept) -> None:
        instance = self._in(event.instance, InstanceState.DRAINING)
        if instance is not None and instance.falling:
            sleeping.slept(self._world, instance)

    def _sleep_failed(self, event: events.SleepFailed) -> None:
        instance = self._in(event.instance, InstanceState.DRAINING)
        if instance is not None and instance.falling:
            sleeping.failed(self._world, instance, event.message)

    def _wake_failed(self, event: events.WakeFailed) -> None:
        instance = self._in(event.instance, InstanceState.WAKING)
        if instance is not None:
            swapping.wake_failed(self._world, instance, event.message)

    def _drop_sleeper(self, event: events.DropSleeper) -> None:
        instance = self._in(event.instance, InstanceState.ASLEEP)
        if instance is not None:
            sleeping.drop(self._world, instance, event.reason)

    def _prepare_stage(self, event: events.PrepareStage) -> None:
        preparing.stage(self._world, event)

    def _prepared(self, event: events.Prepared) -> None:
        preparing.prepared(self._world, event)

    def _prepare_failed(self, event: events.PrepareFailed) -> None:
        preparing.failed(self._world, event)

    def _appeared(self, event: events.Appeared) -> None:
        """Remember it; `_follow_up` decides when that can be done."""
        self._world.appeared[event.instance] = event

    def _died(self, event: events.Died) -> None:
        instance = self._in(event.instance, InstanceState.READY, InstanceState.DRAINING, InstanceState.ASLEEP)
        if instance is not None:
            swapping.died(self._world, instance, event.message)

    def _put_out(self, event: events.PutOut) -> None:
        instance = self._in(event.instance, InstanceState.STOPPING)
        if instance is not None:
            swapping.put_out(self._world, instance)

    def _put_out_failed(self, event: events.PutOutFailed) -> None:
        instance = self._in(event.instance, InstanceState.STOPPING, InstanceState.STARTING, InstanceState.WAKING)
        if instance is not None:
            swapping.put_out_failed(self._world, instance, event.message)

    def _released(self, event: events.Released) -> None:
        device = self._world.devices.get(event.device)
        if device is not None:
            swapping.released(self._world, device)

    def _release_failed(self, event: events.ReleaseFailed) -> None:
        device = self._world.devices.get(event.device)
        if device is not None:
            swapping.release_failed(self._world, device, event.message)

    def _probed(self, event: events.Probed) -> None:
        instance = self._world.instances.get(event.instance)
        if instance is None:
            return
        instance.probing = False
        if instance.state is InstanceState.READY:
            if event.healthy:
                leasing.faults_settled(self._world, instance)
            else:
                swapping.died(self._world, instance, event.message)

    def _ensure(self, event: events.Ensure) -> None:
        waiting.ensure(self._world, Request(id=event.request, model=event.model, began=self._world.now))

    def _unload(self, event: events.Unload) -> None:
        world = self._world
        world.unloads[event.request] = Request(id=event.request, model=event.model, began=world.now)

    def _pin(self, event: events.Pin) -> None:
        pinning.pin(self._world, event.model, event.pinned)

    def _withdraw(self, event: events.Withdraw) -> None:
        waiting.withdraw(self._world, event.request)

    def _tick(self, event: events.Tick) -> None:
        """Time has passed; `_follow_up` sees to the rest."""

    def _shutdown(self, event: events.Shutdown) -> None:
        world = self._world
        world.shutting_down = True
        for ticket in list(world.waiting):
            waiting.refuse(world, ticket, Code.SHUTTING_DOWN, "modelswap is shutting down")
        for device in world.devices.values():
            if device.swap is not None:
                device.swap.target = None
        for instance in list(world.instances.values()):
            if instance.state in (InstanceState.STARTING, InstanceState.WAKING):
                swapping.cancel_start(world, instance)
            elif event.now:
                swapping.stop_at_once(world, instance)

    # ── after every event ────────────────────────────────────────────────────────────────────────────────

    def _follow_up(self) -> None:
        world = self._world
        self._break_silent_gateways()
        self._end_backoffs()
        world.doubtful = {name: until for name, until in world.doubtful.items() if world.now < until}
        if world.begin_deadline is not None and (not world.expected or world.now >= world.begin_deadline):
            self._open_adopted()
        for instance in [i for i in world.instances.values() if i.gone]:
            swapping.settle(world, instance)
        sleeping.drop_unwanted(world)
        appearing.decide(world)
        for device in list(world.devices.values()):
            swapping.advance(world, device)
            swapping.decide(world, device, self._policy)
        preparing.begin(world)
        foreseeing.foresee(world)
        self._answer_unloads()
        if world.catalog_changed:
            world.catalog_changed = False
            catalog = leasing.catalog(world)
            for gateway in world.gateways:
                world.say(gateway, catalog)
        if len(world.waiting) and world.now >= world.progress_at:
            world.progress_at = world.now + world.settings.progress_interval
            leasing.tell_progress(world)
        if world.shutting_down and not world.finished and not any(self._alive()):
            world.finished = True
            world.emit(effects.Finished())

    def _break_silent_gateways(self) -> None:
        world = self._world
        for name in [n for n, g in world.gateways.items() if world.now - g.heard >= world.settings.term]:
            # It may still be sending, so it must say hello again before it counts for anything.
            leasing.forget_gateway(world, name)
            world.emit(effects.Disconnect(gateway=name, reason=f"silent for {world.settings.term:g} s"))

    def _end_backoffs(self) -> None:
        world = self._world
        for name, model in world.models.items():
            if model.backoff is not None and world.now >= model.backoff.until:
                model.backoff = None
                instance = world.instance_of(name)
                if instance is not None and instance.state is InstanceState.FAILED:
                    world.clear_failed(instance)

    def _open_adopted(self) -> None:
        world = self._world
        world.begun = True
        world.begin_deadline = None
        for instance in list(world.instances.values()):
            if instance.state is InstanceState.READY:
                instance.strays |= world.expected
                leasing.open_instance(world, instance)
                world.emit(effects.Watch(instance=instance.id, model=instance.model))
                waiting.answer_ensures(world, instance, "resident", None)
            elif instance.state is InstanceState.STARTING:
                swapping.adopt_start(world, instance)
            elif instance.state is InstanceState.ASLEEP:
                sleeping.watch(world, instance)
        idling.preload(world)

    def _answer_unloads(self) -> None:
        world = self._world
        for request in list(world.unloads.values()):
            held = [
                instance
                for instance in world.instances.values()
                if request.model in (None, instance.model) and instance.state is not InstanceState.FAILED
            ]
            if held:
                request.previous = held[0].model
            else:
                waiting.answer_unload(world, request)

    def _being_started(self, instance: Instance, definition: str) -> bool:
        by_us = instance.state is InstanceState.STARTING and not instance.adopted
        return by_us and instance.definition == definition

    def _alive(self) -> list[Instance]:
        return [i for i in self._world.instances.values() if i.state is not InstanceState.FAILED]

    def _in(self, instance: str, *states: InstanceState) -> Instance | None:
        """Return an instance if it is in one of ``states``; a report about another state came too late."""
        found = self._world.instances.get(instance)
        return found if found is not None and found.state in states else None
