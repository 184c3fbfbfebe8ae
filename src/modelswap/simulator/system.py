"""The world: one scheduler, its shell, gateways, engines. After every step it asserts what must hold."""

from __future__ import annotations

from typing import Final

from modelswap.core import effects, events
from modelswap.core.admission import Admission
from modelswap.core.facts import DeviceFacts
from modelswap.core.scheduler import Scheduler
from modelswap.core.states import InstanceState
from modelswap.core.swap import SwapRecord
from modelswap.protocol.codec import decode_from_gateway, decode_from_orchestrator, encode
from modelswap.protocol.messages import Catalog, Hello, OrchestratorMessage, Progress
from modelswap.simulator import completing
from modelswap.simulator.gateway import Gateway
from modelswap.simulator.links import Link, Nobody, Observer
from modelswap.simulator.machine import Engine, Machine
from modelswap.simulator.setup import DEVICE, Setup, Start
from modelswap.simulator.tasks import Kind, Task
from modelswap.simulator.traffic import Outcome, Request, Violation, claim

LEVEL: Final = 1
"""At which engines sleep."""
_OPENED = frozenset({InstanceState.READY, InstanceState.DRAINING})
_ADOPTED = _OPENED | {InstanceState.STARTING, InstanceState.ASLEEP}


class System:
    """All parts, and the steps that can happen to them. Time is whatever the driver sets ``now`` to, in seconds."""

    def __init__(self, setup: Setup, observer: Observer | None = None) -> None:
        self.setup = setup
        self.observer = observer if observer is not None else Nobody()
        self.now = 0.0
        self.generation = 0
        self.scheduler: Scheduler | None = None
        self.machine = Machine({DEVICE: setup.capacity})
        self.gateways: dict[str, Gateway] = {}
        self.links: dict[str, Link] = {}
        """The connection of each gateway whose hello the scheduler has seen last."""
        self.arriving: list[Link] = []
        """All connections that still have something to deliver to the orchestrator, oldest first."""
        self.tasks: dict[int, Task] = {}
        self.requests: dict[int, Request] = {}
        self.swaps: list[SwapRecord] = []
        self.answers: list[effects.Answer] = []
        self.finished = False
        self.since = 0.0
        """When the orchestrator was started."""
        self.journal: dict[str, Start] = {}
        self.known: dict[str, float] = {}
        """Gateways in the journal, and when each went (infinite: it hasn't)."""
        self.told_prepared: set[str] = set()
        """Models that this orchestrator has been told are prepared."""
        self._numbers = 0
        self.facts = {facts.name: facts for facts in setup.models}
        for name in setup.gateways:
            self.new_gateway(name)
        self.start_orchestrator()

    # ── gateways and their connections ───────────────────────────────────────────────────────────────────

    def new_gateway(self, name: str) -> None:
        """Start a worker process."""
        offset = 1000.0 * (1 + len(self.gateways))
        gateway = Gateway(name, offset, self.machine, self.observer, Admission(name), alone_since=self.now)
        gateway.next_tick = self.now
        self.gateways[name] = gateway

    def connect(self, name: str) -> None:
        """Have a gateway make its connection and say hello."""
        gateway = self.gateways[name]
        claim(self.scheduler is not None and gateway.wants_link and not gateway.stopped, f"{name} can't connect")
        link = Link(name, self._number())
        self.arriving.append(link)
        gateway.connect(link, self.now)

    def drop(self, name: str) -> None:
        """Break a gateway's connection; what is on its way in either direction is lost."""
        link = self.gateways[name].link
        claim(link is not None, f"{name} has no connection")
        if link is not None:
            self._close(link)
            self.gateways[name].closed(self.now)

    def kill_gateway(self, name: str) -> None:
        """Kill a worker process, and start a new one."""
        gateway = self.gateways[name]
        if gateway.link is not None and gateway.link.lost_at is None:
            self._close(gateway.link)
        gateway.die(self.now)
        self.new_gateway(name)

    def notice_loss(self, link: Link) -> None:
        """Let the orchestrator see that a connection is closed."""
        self.arriving.remove(link)
        if self.links.get(link.gateway) is link:
            del self.links[link.gateway]
            self.known[link.gateway] = self.now
            self.handle(events.GatewayLost(at=self.now, gateway=link.gateway))

    def deliver_up(self, link: Link) -> None:
        """Give the orchestrator the next message of a connection."""
        _, message = link.up.popleft()
        if self.setup.wire:
            message = decode_from_gateway(encode(message))
        if isinstance(message, Hello):
            before = self.links.get(link.gateway)
            self.links[link.gateway] = link
            self.known[link.gateway] = float("inf")
            if before is not None and before is not link:
                self._drop_old(before)
        if self.links.get(link.gateway) is link:
            self.handle(events.GatewaySaid(at=self.now, gateway=link.gateway, message=message))

    def deliver_down(self, name: str) -> None:
        """Give a gateway the next message of its connection."""
        gateway = self.gateways[name]
        claim(gateway.link is not None and not gateway.stopped, f"{name} can't read")
        if gateway.link is not None:
            _, message = gateway.link.down.popleft()
            gateway.receive(decode_from_orchestrator(encode(message)) if self.setup.wire else message, self.now)
            self.check()

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────

    def request(self, gateway: str, model: str, agent: int | None = None) -> Request:
        """Have a client ask."""
        request = Request(self._number(), gateway, model, self.now, agent)
        self.requests[request.id] = request
        self.gateways[gateway].arrive(request, self.now)
        self.check()
        return request

    def finish(self, request: Request) -> None:
        """Have an engine complete a response."""
        engine = self.running_on(request.id)
        claim(engine is not None, f"request {request.id} doesn't run")
        if engine is not None:
            del self.machine.engines[engine].running[request.id]
            self.gateways[request.gateway].finished(request, self.now, well=True)
            self.check()

    def leave(self, request: Request) -> None:
        """Have a client go away."""
        self.gateways[request.gateway].leave(request, self.now)
        self.check()

    def running_on(self, request: int) -> str | None:
        """Return the instance that a request runs on."""
        return next((e.instance for e in self.machine.engines.values() if request in e.running), None)

    # ── the orchestrator ─────────────────────────────────────────────────────────────────────────────────

    def start_orchestrator(self) -> None:
        """Start an orchestrator: it adopts what runs, kills strays, begins."""
        self.generation += 1
        self.since = self.now
        self.told_prepared.clear()
        self.scheduler = Scheduler(self.generation, self.setup.policy)
        self.handle(
            events.Configure(
                at=self.now,
                models=self.setup.models,
                devices=(DeviceFacts(DEVICE, self.setup.capacity),),
                settings=self.setup.settings,
            )
        )
        self._tell_ways()
        adopted: list[tuple[Start, Engine]] = []
        appeared: list[Engine] = []
        for instance in list(self.machine.engines):
            engine = self.machine.engines[instance]
            start = self.journal.get(instance)
            if engine.alive and engine.falling and not engine.running:
                self.machine.sleep(instance)  # it goes on falling asleep by itself
            if start is not None and engine.alive and not engine.falling and start.state in _ADOPTED:
                adopted.append((start, engine))
            elif start is None and engine.alive and engine.by_hand:
                appeared.append(engine)
            else:
                self.bury(instance)
        self.journal = {engine.instance: start for start, engine in adopted}
        for start, engine in adopted:
            self.handle(
                events.Adopted(
                    at=self.now,
                    instance=engine.instance,
                    model=engine.model,
                    definition=engine.definition,
                    host=engine.address[0],
                    port=engine.address[1],
                    slots=engine.slots,
                    ready=start.state in _OPENED,
                    asleep=0 if engine.holding else LEVEL,
                )
            )
        expected = frozenset(name for name, went in self.known.items() if self.now - went < self.setup.settings.term)
        self.handle(events.Begin(at=self.now, expected=expected))
        for engine in appeared:
            self._notice(engine)

    def kill_orchestrator(self) -> None:
        """Kill the orchestrator: connections close, its tasks end, engines go on."""
        self.scheduler = None
        self.tasks.clear()
        self.links.clear()
        self.arriving.clear()
        for gateway in self.gateways.values():
            if gateway.link is not None and gateway.link.lost_at is None:
                gateway.link.up.clear()
                gateway.link.down.clear()
                gateway.link.lost_at = self.now
                gateway.closed(self.now)
        self.check()

    def tick(self) -> None:
        """Tell the scheduler that time has passed."""
        self.handle(events.Tick(at=self.now))

    def handle(self, event: events.Event) -> None:
        """Give the scheduler an event and carry out what it wants."""
        if self.scheduler is None:
            return
        for effect in self.scheduler.handle(event):
            self._carry(effect)
        self._watch_strangers()
        self.check()

    def complete(self, task: Task, *, well: bool = True) -> None:
        """End a task of the shell (``well``: as hoped)."""
        del self.tasks[task.id]
        completing.complete(self, task, well=well)

    def appear(self, model: str) -> None:
        """Have somebody else start a model's engine."""
        facts = self.facts[model]
        engine = self.machine.start_by_hand(
            f"{model}.0.{self._number()}", model, facts.definition, facts.device, facts.demand, facts.slots
        )
        self._notice(engine)
        self.check()

    def spoil(self, model: str) -> None:
        """Have somebody remove what was prepared for a model."""
        self.machine.prepared.discard(model)

    def kill_engine(self, instance: str) -> None:
        """Have an engine die by itself."""
        engine = self.machine.engines[instance]
        watched = engine.ready or not engine.holding
        self._cut(self.machine.die(instance))
        if self.scheduler is not None and watched and not self._task_of(instance, Kind.PUT_OUT):
            self.begin(Kind.NOTICE_DEATH, instance, engine.model)
        self.check()

    # ── what must hold ───────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Assert it; raises `AssertionError`."""
        if not self.setup.checked:
            return
        if self.scheduler is not None:
            self.scheduler.check()
        for gateway in self.gateways.values():
            running: dict[int, int] = {}
            for _, lease in gateway.running.values():
                running[id(lease)] = running.get(id(lease), 0) + 1
            for lease in gateway.admission.leases:
                claim(lease.in_flight == running.pop(id(lease), 0), f"{gateway.name} miscounts under {lease}")
            claim(not running, f"{gateway.name} forgot a lease under which requests run")
            claim(gateway.admission.waiting == len(gateway.waiting), f"{gateway.name} lost a ticket")

    def unresolved(self) -> list[Request]:
        """Return the requests that have no outcome yet."""
        return [request for request in self.requests.values() if request.outcome is None]

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _close(self, link: Link) -> None:
        link.up.clear()
        link.down.clear()
        link.lost_at = self.now
        if link not in self.arriving:
            raise Violation("a connection that nobody knows")

    def _drop_old(self, link: Link) -> None:
        """Forget a connection whose gateway made a new one before its end was noticed."""
        self._close(link)
        self.arriving.remove(link)
        gateway = self.gateways[link.gateway]
        if gateway.link is link:
            gateway.closed(self.now)

    def begin(self, kind: Kind, subject: str, model: str, *, kill: bool = False) -> None:
        """Have the shell begin a task."""
        task = Task(self._number(), kind, subject, model, kill)
        self.tasks[task.id] = task
        self.observer.began(task)

    def _task_of(self, subject: str, *kinds: Kind) -> Task | None:
        return next((t for t in self.tasks.values() if t.subject == subject and t.kind in kinds), None)

    def _carry(self, effect: effects.Effect) -> None:
        match effect:
            case effects.Say():
                link = self.links.get(effect.gateway)
                if link is not None and link.lost_at is None and not self._idle_talk(link, effect.message):
                    link.down.append((self.now, effect.message))
                    self.observer.said(link, up=False)
            case effects.Disconnect():
                link = self.links.pop(effect.gateway, None)
                self.known[effect.gateway] = self.now
                if link is not None:
                    self.arriving.remove(link)
                    gateway = self.gateways[effect.gateway]
                    resting = gateway.stopped or self.now - gateway.woken_at < self.setup.settings.term
                    claim(resting or gateway.link is not link, f"{gateway.name} was taken for silent, but it wasn't")
                    if link.lost_at is None and gateway.link is link:
                        link.up.clear()
                        link.down.clear()
                        link.lost_at = self.now
                        gateway.closed(self.now)
            case effects.Transitioned():
                self._journalled(effect)
            case effects.BringIn():
                if not effect.adopted:
                    self._start(effect)
                self._claim_alone(effect.instance, Kind.SLEEP)
                self.begin(Kind.BRING_IN, effect.instance, effect.model)
            case effects.PutOut():
                self._put_out(effect)
            case effects.Sleep():
                self._claim_unused(effect.instance)
                self._claim_alone(effect.instance, Kind.BRING_IN, Kind.WAKE)
                self.machine.engines[effect.instance].falling = True
                self._cancel(effect.instance, Kind.NOTICE_DEATH)
                self.begin(Kind.SLEEP, effect.instance, effect.model)
            case effects.Wake():
                self._claim_alone(effect.instance, Kind.SLEEP)
                self._cancel(effect.instance, Kind.NOTICE_DEATH)
                self.machine.wake(effect.instance)
                self.begin(Kind.WAKE, effect.instance, effect.model)
            case effects.Prepare():
                claim(self._task_of(effect.model, Kind.PREPARE) is None, f"{effect.model} is prepared twice at once")
                claim(effect.model not in self.told_prepared, f"{effect.model} is prepared again for nothing")
                self.begin(Kind.PREPARE, effect.model, effect.model)
            case effects.TurnAway():
                self.begin(Kind.TURN_AWAY, effect.instance, effect.model)
            case effects.VerifyReleased():
                self.begin(Kind.VERIFY, effect.device, effect.model)
            case effects.Probe():
                self.begin(Kind.PROBE, effect.instance, effect.model)
            case effects.Watch():
                if not self.machine.engines[effect.instance].alive:
                    self.begin(Kind.NOTICE_DEATH, effect.instance, effect.model)
            case effects.SwapEnded():
                self.swaps.append(effect.record)
            case effects.Answer():
                self.answers.append(effect)
            case effects.Finished():
                self.finished = True
            case _:
                pass

    def _idle_talk(self, link: Link, message: OrchestratorMessage) -> bool:
        if not self.setup.terse:
            return False
        if isinstance(message, Catalog):
            has_one = self.gateways[link.gateway].admission.catalog is not None
            return has_one or any(isinstance(said, Catalog) for _, said in link.down)
        return isinstance(message, Progress)

    def _journalled(self, effect: effects.Transitioned) -> None:
        if effect.after is InstanceState.ABSENT:
            self.journal.pop(effect.instance, None)
        else:
            self.journal[effect.instance] = Start(effect.model, effect.definition, effect.after)

    def _put_out(self, effect: effects.PutOut) -> None:
        self._cancel(effect.instance, Kind.BRING_IN, Kind.SLEEP, Kind.WAKE, Kind.NOTICE_DEATH)
        if not effect.kill:
            self._claim_drained(effect.instance)
        self.begin(Kind.PUT_OUT, effect.instance, effect.model, kill=effect.kill)

    def _claim_unused(self, instance: str) -> None:
        """Assert that no gateway may send anything to an instance any more: it would wait there for ever."""
        address = self.machine.engines[instance].address
        for gateway in self.gateways.values():
            held = [lease for lease in gateway.admission.leases if lease.address == address]
            claim(not held, f"{instance} is put to sleep while {gateway.name} has {held}")

    def _cancel(self, subject: str, *kinds: Kind) -> None:
        while task := self._task_of(subject, *kinds):
            del self.tasks[task.id]

    def _claim_alone(self, instance: str, *kinds: Kind) -> None:
        """Assert that no task of these kinds goes on with another engine of the same device."""
        device = self.machine.engines[instance].device
        for task in self.tasks.values():
            other = self.machine.engines.get(task.subject) if task.kind in kinds else None
            claim(
                other is None or other.instance == instance or other.device != device,
                f"{instance} moves on {device} while {task} goes on",
            )

    def _tell_ways(self) -> None:
        for name in self.setup.sleeping:
            self.handle(events.Ways(at=self.now, model=name, definition="v1", level=LEVEL))

    def _claim_drained(self, instance: str) -> None:
        """Assert that nothing runs on an instance that the orchestrator could know of."""
        engine = self.machine.engines[instance]
        for request in engine.running.values():
            gateway = self.gateways[request.gateway]
            known = self.links.get(request.gateway)
            claim(
                known is None or known is not gateway.link,
                f"{instance} is stopped while request {request.id} of {request.gateway} runs on it",
            )

    def _notice(self, engine: Engine) -> None:
        host, port = engine.address
        self.handle(
            events.Appeared(
                at=self.now,
                instance=engine.instance,
                model=engine.model,
                definition=engine.definition,
                host=host,
                port=port,
                slots=engine.slots,
            )
        )

    def leaving(self, device: str) -> list[str]:
        """Return the engines on a device that are being turned away: its memory isn't free before they have ended."""
        leaving = [task.subject for task in self.tasks.values() if task.kind is Kind.TURN_AWAY]
        return [i for i in leaving if i in self.machine.engines and self.machine.engines[i].device == device]

    def _start(self, effect: effects.BringIn) -> None:
        facts = self.facts[effect.model]
        claim(not facts.prepare or effect.model in self.told_prepared, f"{effect.instance} starts unprepared")
        self.machine.start(effect.instance, effect.model, effect.definition, facts.device, facts.demand, facts.slots)

    def bury(self, instance: str) -> None:
        """End an engine, if it still runs, and forget it."""
        self._cut(self.machine.bury(instance))

    def _cut(self, requests: list[Request]) -> None:
        for request in requests:
            self.gateways[request.gateway].finished(request, self.now, well=False)

    def _watch_strangers(self) -> None:
        """Note engines that gateways may use without the orchestrator knowing."""
        if self.scheduler is None:
            return
        for gateway in self.gateways.values():
            if self.links.get(gateway.name) is None or self.links[gateway.name] is not gateway.link:
                for lease in gateway.admission.leases:
                    engine = self.machine.at(lease.address)
                    if engine is not None:
                        engine.disturbed = True

    def outcomes(self) -> dict[Outcome, int]:
        """Return how many requests ended how."""
        counts: dict[Outcome, int] = {}
        for request in self.requests.values():
            if request.outcome is not None:
                counts[request.outcome] = counts.get(request.outcome, 0) + 1
        return counts
