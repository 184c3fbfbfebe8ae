"""Drives a `System` one chosen action at a time: every order of deliveries, every fault, at any point.

What takes time may take any time, except for what the protocol relies on: while both sides run, a message arrives,
a closed connection is noticed and a new one made within `DELAY`, and timers go off when they are due.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from modelswap.core import events
from modelswap.core.admission import TICK
from modelswap.simulator.links import Link
from modelswap.simulator.setup import Setup
from modelswap.simulator.system import System
from modelswap.simulator.tasks import Kind
from modelswap.simulator.traffic import claim

DELAY: Final = 1.0

Action = tuple[str | int, ...]
"""What is done, and to whom."""


@dataclass(slots=True, kw_only=True)
class Budget:
    """How often each thing that isn't owed to anybody may still happen."""

    asks: int = 3
    leaves: int = 0
    first_bytes: int = 0
    drops: int = 0
    engine_deaths: int = 0
    failures: int = 0
    stops: int = 0
    gateway_deaths: int = 0
    restarts: int = 0
    commands: int = 0
    stalls: int = 0
    appearances: int = 0
    spoilings: int = 0
    sleeper_drops: int = 0
    pins: int = 0

    @property
    def disturbances(self) -> int:
        """How much may still go wrong at a gateway or under it."""
        losses = self.leaves + self.drops + self.stops + self.gateway_deaths
        return losses + self.engine_deaths + self.failures + self.restarts + self.stalls


class Stepped:
    """A system, and what may happen to it next."""

    def __init__(self, setup: Setup, budget: Budget) -> None:
        self.system = System(setup)
        self.budget = budget
        self.story: list[Action] = []
        self.stalled = False
        """The orchestrator's process is stopped."""

    @property
    def now(self) -> float:
        """The world's time."""
        return self.system.now

    # ── what may happen ──────────────────────────────────────────────────────────────────────────────────

    def enabled(self) -> list[Action]:
        """Return everything that can happen now, in a fixed order; never empty."""
        return [*self.owed(), *self._by_chance(), *self._time()]

    def owed(self) -> list[Action]:
        """Return what happens for sure, if nothing else does: deliveries, completions, timers."""
        system = self.system
        actions: list[Action] = []
        for link in () if self.stalled else system.arriving:
            if link.up:
                actions.append(("up", link.id))
            elif link.lost_at is not None:
                actions.append(("lost", link.id))
        for name, gateway in system.gateways.items():
            if gateway.stopped:
                continue
            if gateway.link is not None and gateway.link.down:
                actions.append(("down", name))
            if gateway.wants_link and system.scheduler is not None and not self.stalled:
                actions.append(("connect", name))
            if system.now >= gateway.next_tick:
                actions.append(("tick", name))
        actions += [("done", task) for task in system.tasks if not self.stalled]
        for instance, engine in system.machine.engines.items():
            if engine.alive:
                actions += [("finish", instance, request) for request in engine.running]
        deadline = self._deadline()
        if deadline is not None and deadline <= system.now and not self.stalled:
            actions.append(("deadline",))
        return actions

    def _by_chance(self) -> list[Action]:
        system, budget = self.system, self.budget
        actions: list[Action] = []
        awake = [name for name, gateway in system.gateways.items() if not gateway.stopped]
        if budget.asks:
            actions += [("ask", name, facts.name) for name in awake for facts in system.setup.models]
        if budget.leaves:
            actions += [("leave", r.id) for r in system.unresolved() if not system.gateways[r.gateway].stopped]
        if budget.first_bytes:
            actions += [
                ("first byte", request.id)
                for engine in system.machine.engines.values()
                for request in engine.running.values()
                if not request.streaming
            ]
        if budget.drops:
            actions += [("drop", name) for name in system.gateways if system.gateways[name].link in system.arriving]
        if budget.engine_deaths:
            actions += [("kill engine", e.instance) for e in system.machine.engines.values() if e.alive]
        if budget.failures and not self.stalled:
            failing = (Kind.BRING_IN, Kind.PUT_OUT, Kind.VERIFY, Kind.PREPARE, Kind.SLEEP, Kind.WAKE)
            actions += [("fail", task.id) for task in system.tasks.values() if task.kind in failing]
        if budget.stops:
            actions += [("stop", name) for name in awake]
        actions += [("continue", name) for name, gateway in system.gateways.items() if gateway.stopped]
        if budget.gateway_deaths:
            actions += [("kill gateway", name) for name in system.gateways]
        if system.scheduler is None:
            actions.append(("start orchestrator",))
        elif budget.restarts:
            actions.append(("kill orchestrator",))
        if self.stalled:
            actions.append(("wake",))
        elif budget.stalls and system.scheduler is not None:
            actions.append(("stall",))
        if budget.commands and system.scheduler is not None and not self.stalled:
            actions += [("ensure", facts.name) for facts in system.setup.models]
            actions += [("unload", facts.name) for facts in system.setup.models]
        if budget.appearances and not self.stalled:
            running = {engine.model for engine in system.machine.engines.values() if engine.alive}
            actions += [("appear", facts.name) for facts in system.setup.models if facts.name not in running]
        if budget.sleeper_drops and system.scheduler is not None and not self.stalled:
            actions += [("drop sleeper", e.instance) for e in system.machine.engines.values() if not e.holding]
        if budget.pins and system.scheduler is not None and not self.stalled:
            actions += [("pin", facts.name, pinned) for facts in system.setup.models for pinned in (1, 0)]
        if budget.spoilings:
            actions += [("spoil", name) for name in sorted(system.machine.prepared)]
        return actions

    def _time(self) -> list[Action]:
        """Time may pass up to the next moment at which something must happen."""
        until = self._next_moment()
        return [] if until is None or until <= self.system.now else [("time",)]

    # ── doing it ─────────────────────────────────────────────────────────────────────────────────────────

    def do(self, action: Action) -> None:
        """Have it happen; raises `AssertionError` if something is then as it never may be."""
        self.story.append(action)
        system, budget = self.system, self.budget
        match action:
            case ("up", int(link)):
                system.deliver_up(self._link(link))
            case ("lost", int(link)):
                system.notice_loss(self._link(link))
            case ("down", str(name)):
                system.deliver_down(name)
            case ("connect", str(name)):
                system.connect(name)
            case ("tick", str(name)):
                system.gateways[name].tick(system.now)
                system.check()
            case ("done", int(task)):
                system.complete(system.tasks[task])
            case ("finish", _, int(request)):
                system.finish(system.requests[request])
            case ("deadline",):
                system.tick()
            case ("time",):
                until = self._next_moment()
                claim(until is not None, "time stands still")
                system.now = until if until is not None else system.now
            case ("ask", str(name), str(model)):
                budget.asks -= 1
                system.request(name, model)
            case ("leave", int(request)):
                budget.leaves -= 1
                system.leave(system.requests[request])
            case ("first byte", int(request)):
                budget.first_bytes -= 1
                system.requests[request].streaming = True
            case ("drop", str(name)):
                budget.drops -= 1
                system.drop(name)
            case ("kill engine", str(instance)):
                budget.engine_deaths -= 1
                system.kill_engine(instance)
            case ("fail", int(task)):
                budget.failures -= 1
                system.complete(system.tasks[task], well=False)
            case ("stop", str(name)):
                budget.stops -= 1
                system.gateways[name].stopped = True
            case ("continue", str(name)):
                self._continue(name)
            case ("kill gateway", str(name)):
                budget.gateway_deaths -= 1
                system.kill_gateway(name)
            case ("stall",):
                budget.stalls -= 1
                self.stalled = True
            case ("wake",):
                self._wake()
            case ("kill orchestrator",):
                budget.restarts -= 1
                self.stalled = False
                system.kill_orchestrator()
            case ("start orchestrator",):
                system.start_orchestrator()
            case ("ensure", str(model)):
                budget.commands -= 1
                system.handle(events.Ensure(at=system.now, request=len(self.story), model=model))
            case ("unload", str(model)):
                budget.commands -= 1
                system.handle(events.Unload(at=system.now, request=len(self.story), model=model))
            case ("appear", str(model)):
                budget.appearances -= 1
                system.appear(model)
            case ("drop sleeper", str(instance)):
                budget.sleeper_drops -= 1
                system.handle(events.DropSleeper(at=system.now, instance=instance, reason="host memory is short"))
            case ("pin", str(model), int(pinned)):
                budget.pins -= 1
                system.handle(events.Pin(at=system.now, model=model, pinned=bool(pinned)))
            case ("spoil", str(model)):
                budget.spoilings -= 1
                system.spoil(model)
            case _:
                raise ValueError(f"unknown action {action!r}")

    def settle(self, steps: int = 2000, patience: float = 900.0) -> None:
        """Let no more faults happen; all that is owed must then end every request, within ``patience`` seconds."""
        system = self.system
        for name, gateway in system.gateways.items():
            if gateway.stopped:
                self.do(("continue", name))
        if system.scheduler is None:
            self.do(("start orchestrator",))
        if self.stalled:
            self.do(("wake",))
        end = system.now + patience
        rest = None
        for _ in range(steps):
            owed = self.owed()
            if owed:
                self.do(owed[0])
            elif not system.unresolved() and self._quiet():
                # The last reports come with the gateways' next ticks.
                rest = system.now + 3 * TICK if rest is None else rest
                if system.now >= rest:
                    self._claim_clean()
                    return
                self.do(("time",))
            else:
                claim(system.now < end, f"{system.unresolved()} still wait after {patience:g} s")
                self.do(("time",))
        claim(False, f"still busy after {steps} steps: {self.story[-40:]}")

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────

    def _link(self, id_: int) -> Link:
        return next(link for link in self.system.arriving if link.id == id_)

    def _continue(self, name: str) -> None:
        gateway = self.system.gateways[name]
        # What arrived meanwhile counts as on its way from now on.
        if gateway.link is not None:
            for index, (_, message) in enumerate(gateway.link.down):
                gateway.link.down[index] = (self.system.now, message)
        gateway.alone_since = self.system.now
        gateway.go_on(self.system.now)
        self.system.check()

    def _wake(self) -> None:
        self.stalled = False
        self.system.since = self.system.now
        for link in self.system.arriving:
            for index, (_, message) in enumerate(link.up):
                link.up[index] = (self.system.now, message)
            if link.lost_at is not None:
                link.lost_at = self.system.now

    def _deadline(self) -> float | None:
        scheduler = self.system.scheduler
        return scheduler.next_deadline() if scheduler is not None else None

    def _next_moment(self) -> float | None:
        system = self.system
        moments: list[float] = []
        deadline = self._deadline()
        if deadline is not None and not self.stalled:
            moments.append(deadline)
        for link in () if self.stalled else system.arriving:
            moments += [sent + DELAY for sent, _ in link.up]
            if link.lost_at is not None:
                moments.append(link.lost_at + DELAY)
        for gateway in system.gateways.values():
            if gateway.stopped:
                continue
            moments.append(gateway.next_tick)
            if gateway.link is not None:
                moments += [sent + DELAY for sent, _ in gateway.link.down]
            if gateway.wants_link and system.scheduler is not None and not self.stalled:
                moments.append(max(gateway.alone_since, system.since) + DELAY)
        return min(moments, default=None)

    def _quiet(self) -> bool:
        scheduler = self.system.scheduler
        if scheduler is None or self.system.tasks:
            return False
        now = self.system.now
        shot = scheduler.snapshot(now)
        return not shot.swaps and all(not gateway.wants_link for gateway in self.system.gateways.values())

    def _claim_clean(self) -> None:
        """Nothing may be left over when nobody asks for anything any more."""
        scheduler = self.system.scheduler
        if scheduler is None:
            return
        world = scheduler.world
        strangers = self.system.machine.find(lambda engine: engine.instance not in world.instances)
        claim(not strangers, f"engines that nobody knows of: {[engine.instance for engine in strangers]}")
        claim(not world.appeared, f"never decided about: {list(world.appeared)}")
        claim(not len(world.waiting), f"tickets without requests: {list(world.waiting)}")
        for gateway in self.system.gateways.values():
            for lease in gateway.admission.leases:
                claim(lease.in_flight == 0, f"{gateway.name} has leaked a slot of {lease}")
        for instance in world.instances.values():
            for held in instance.leases.values():
                claim(not held.closing, f"{instance.id}: {held.gateway} never drained {held.epoch}")
                claim(held.upper <= held.granted, f"{instance.id}: {held.gateway} never gave back {held}")
