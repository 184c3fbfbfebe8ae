"""Drives a scheduler by hand in tests: short words for events, filters for effects."""

from __future__ import annotations

from typing import Literal, TypeVar

from modelswap.core import effects, events
from modelswap.core.facts import DeviceFacts, ModelFacts, Settings
from modelswap.core.scheduler import Scheduler
from modelswap.protocol.errors import Code
from modelswap.protocol.messages import (
    Admitted,
    CatalogModel,
    Contended,
    Drained,
    Epoch,
    GatewayMessage,
    Heartbeat,
    HeldLease,
    Hello,
    Open,
    OrchestratorMessage,
    Usage,
    Want,
)

M = TypeVar("M", bound=OrchestratorMessage)
F = TypeVar("F", bound=effects.Effect)


def model(
    name: str,
    *,
    device: str | None = "gpu0",
    slots: int = 4,
    definition: str = "v1",
    priority: int = 0,
    prepare: bool = False,
    ttl: float | None = None,
    idle: Literal["sleep", "stop", "keep"] = "sleep",
    pinned: bool = False,
    preload: bool = False,
    demand: int = 1,
) -> ModelFacts:
    """A model's facts."""
    return ModelFacts(
        name=name,
        definition=definition,
        device=device,
        slots=slots,
        priority=priority,
        listing=CatalogModel(name=name),
        prepare=prepare,
        ttl=ttl,
        idle=idle,
        pinned=pinned,
        preload=preload,
        demand=demand,
    )


class Bench:
    """A scheduler with a clock; every event is followed by `Scheduler.check`."""

    def __init__(self, *models: ModelFacts, begin: bool = True, **settings: float) -> None:
        self.scheduler = Scheduler(generation=1)
        self.now = 1000.0
        self.out: list[effects.Effect] = []
        self.history: list[effects.Effect] = []
        self.running: dict[tuple[str, str], int] = {}
        self.answering = True  # gateways report at once when they are told of contention
        self.models = models or (model("a"), model("b"), model("c"))
        self.settings = Settings(**settings)  # type: ignore[arg-type]
        self.configure(*self.models)
        if begin:
            self.handle(events.Begin(at=self.now))
            self.released()
            self.out.clear()

    def configure(self, *models: ModelFacts) -> None:
        """Load a config with these models."""
        self.handle(
            events.Configure(at=self.now, models=models, devices=(DeviceFacts("gpu0"),), settings=self.settings)
        )

    def handle(self, event: events.Event) -> list[effects.Effect]:
        """Handle one event and keep its effects in ``out``, too."""
        out = self.scheduler.handle(event)
        self.scheduler.check()
        self.out.extend(out)
        self.history.extend(out)
        if self.answering:
            for effect in of(out, effects.Say):
                if isinstance(effect.message, Contended) and effect.message.contended:
                    name, gateway = effect.message.model, effect.gateway
                    out = out + self.usage(name, self.running.get((gateway, name), 0), gateway)
        return out

    def after(self, seconds: float) -> list[effects.Effect]:
        """Let time pass, ticking at every deadline and keeping gateways alive."""
        end = self.now + seconds
        out: list[effects.Effect] = []
        while self.now < end:
            at = self.scheduler.next_deadline()
            self.now = min(end, self.now + 1.0, max(at, self.now) if at is not None else end)
            for gateway in self.scheduler.snapshot(self.now).gateways:
                out += self.say(Heartbeat(), gateway.gateway)
            out += self.handle(events.Tick(at=self.now))
        return out

    def silence(self, seconds: float) -> list[effects.Effect]:
        """Let time pass, ticking at every deadline, while gateways say nothing."""
        end = self.now + seconds
        out: list[effects.Effect] = []
        while self.now < end:
            at = self.scheduler.next_deadline()
            self.now = min(end, max(at, self.now + 0.001)) if at is not None else end
            out += self.handle(events.Tick(at=self.now))
        return out

    # ── gateways ─────────────────────────────────────────────────────────────────────────────────────────

    def hello(self, gateway: str = "g", *held: HeldLease, tickets: tuple[Want, ...] = ()) -> list[effects.Effect]:
        """A gateway connects."""
        return self.say(Hello(gateway=gateway, leases=held, tickets=tickets), gateway)

    def say(self, message: GatewayMessage, gateway: str = "g") -> list[effects.Effect]:
        """A gateway says something."""
        return self.handle(events.GatewaySaid(at=self.now, gateway=gateway, message=message))

    def want(
        self, name: str, ticket: int, gateway: str = "g", *, age: float = 0.0, priority: int = 0, size: int = 0
    ) -> list[effects.Effect]:
        """A request waits at a gateway."""
        return self.say(
            Want(ticket=ticket, model=name, age_ms=int(age * 1000), priority=priority, body_bytes=size), gateway
        )

    def admit(self, ticket: int, name: str, gateway: str = "g") -> list[effects.Effect]:
        """A waiting request went to its instance."""
        self.running[gateway, name] = self.running.get((gateway, name), 0) + 1
        return self.say(Admitted(ticket=ticket, model=name, epoch=self.epoch(name, gateway)), gateway)

    def usage(
        self, name: str, in_flight: int, gateway: str = "g", *, idle: float = 0.0, served: int = 1
    ) -> list[effects.Effect]:
        """A gateway reports what runs."""
        self.running[gateway, name] = in_flight
        last = self.opened(name, gateway)
        return self.say(
            Usage(
                model=name,
                epoch=last.epoch,
                revision=last.revision,
                in_flight=in_flight,
                served=served,
                idle_ms=int(idle * 1000),
            ),
            gateway,
        )

    def drained(self, name: str, gateway: str = "g") -> list[effects.Effect]:
        """A gateway says that nothing runs under the last lease any more."""
        return self.say(Drained(model=name, epoch=self.epoch(name, gateway)), gateway)

    # ── the shell ────────────────────────────────────────────────────────────────────────────────────────

    def come_in(self, name: str, *, slots: int = 4, port: int = 9000) -> list[effects.Effect]:
        """The engine that is being started is healthy."""
        return self.handle(
            events.BroughtIn(at=self.now, instance=self.instance(name), host="127.0.0.1", port=port, slots=slots)
        )

    def fail(
        self,
        name: str,
        *,
        permanent: bool = False,
        blameless: bool = False,
        unprepared: bool = False,
        message: str = "it broke",
    ) -> list[effects.Effect]:
        """The engine that is being started fails."""
        code = Code.MODEL_BROKEN if permanent else Code.MODEL_START_FAILED
        return self.handle(
            events.BringInFailed(
                at=self.now,
                instance=self.instance(name),
                code=code,
                message=message,
                permanent=permanent,
                blameless=blameless,
                unprepared=unprepared,
            )
        )

    def sleeps(self, *names: str, level: int = 1) -> None:
        """These models are put out by sleep from now on (``level`` 0: they are stopped again)."""
        for name in names:
            self.handle(events.Ways(at=self.now, model=name, definition="v1", level=level))

    def slept(self, name: str) -> list[effects.Effect]:
        """The engine that is being put to sleep is asleep."""
        return self.handle(events.Slept(at=self.now, instance=self.instance(name)))

    def sleep_fails(self, name: str) -> list[effects.Effect]:
        """The engine that is being put to sleep won't."""
        return self.handle(events.SleepFailed(at=self.now, instance=self.instance(name), message="it hangs"))

    def wake(self, name: str) -> list[effects.Effect]:
        """The engine that is being woken is healthy."""
        return self.handle(
            events.BroughtIn(
                at=self.now,
                instance=self.instance(name),
                host="127.0.0.1",
                port=9000,
                slots=4,
                mechanism="wake",
            )
        )

    def wake_fails(self, name: str) -> list[effects.Effect]:
        """The engine that is being woken could not be, and has been ended."""
        return self.handle(events.WakeFailed(at=self.now, instance=self.instance(name), message="out of memory"))

    def drop_sleeper(self, name: str) -> list[effects.Effect]:
        """A sleeper isn't worth its memory."""
        return self.handle(events.DropSleeper(at=self.now, instance=self.instance(name), reason="memory is short"))

    def die(self, name: str) -> list[effects.Effect]:
        """A model's engine ends by itself."""
        return self.handle(events.Died(at=self.now, instance=self.instance(name), message="exited with status 1"))

    def unload(self, name: str | None, request: int = 1) -> list[effects.Effect]:
        """An operator has a model unloaded."""
        return self.handle(events.Unload(at=self.now, request=request, model=name))

    def ensure(self, name: str, request: int = 1) -> list[effects.Effect]:
        """An operator asks for a model."""
        return self.handle(events.Ensure(at=self.now, request=request, model=name))

    def pin(self, name: str | None, pinned: bool = True) -> list[effects.Effect]:
        """An operator pins a model, or releases it."""
        return self.handle(events.Pin(at=self.now, model=name, pinned=pinned))

    def prepared(self, name: str, definition: str = "v1") -> list[effects.Effect]:
        """A model is prepared."""
        return self.handle(events.Prepared(at=self.now, model=name, definition=definition))

    def prepare_stage(
        self, name: str, stage: str, fraction: float | None = None, definition: str = "v1"
    ) -> list[effects.Effect]:
        """Preparing a model has come so far."""
        return self.handle(
            events.PrepareStage(at=self.now, model=name, definition=definition, stage=stage, fraction=fraction)
        )

    def prepare_fails(
        self, name: str, definition: str = "v1", *, permanent: bool = False, message: str = "no such image"
    ) -> list[effects.Effect]:
        """A model can't be prepared."""
        code = Code.MODEL_BROKEN if permanent else Code.MODEL_START_FAILED
        return self.handle(
            events.PrepareFailed(
                at=self.now, model=name, definition=definition, code=code, message=message, permanent=permanent
            )
        )

    def appear(self, name: str, instance: str = "by-hand", definition: str = "v1") -> list[effects.Effect]:
        """Somebody else has started a model's engine."""
        return self.handle(
            events.Appeared(
                at=self.now, instance=instance, model=name, definition=definition, host="127.0.0.1", port=9500, slots=4
            )
        )

    def go_out(self, name: str) -> list[effects.Effect]:
        """The engine that is being stopped has gone."""
        return self.handle(events.PutOut(at=self.now, instance=self.instance(name)))

    def released(self) -> list[effects.Effect]:
        """The device's memory is free."""
        return self.handle(events.Released(at=self.now, device="gpu0"))

    def reside(self, name: str, ticket: int = 900, gateway: str = "g") -> None:
        """Bring a model in for one request, which is served; the model is idle then."""
        self.want(name, ticket, gateway)
        if any(isinstance(e, effects.VerifyReleased) for e in self.out):
            self.released()
        self.come_in(name)
        self.admit(ticket, name, gateway)
        self.usage(name, 0, gateway)
        self.out.clear()

    def lull(self, name: str, other: str, level: int = 1) -> None:
        """Swap from ``name``, which falls asleep, to ``other``, which serves one request and is idle then."""
        self.sleeps(name, level=level)
        self.reside(name, 801)
        self.want(other, 802)
        self.after(5)
        self.drained(name)
        self.slept(name)
        self.released()
        self.come_in(other)
        self.admit(802, other)
        self.usage(other, 0)
        self.out.clear()

    # ── views ────────────────────────────────────────────────────────────────────────────────────────────

    def instance(self, name: str) -> str:
        """The id of a model's instance."""
        return next(i.instance for i in self.scheduler.snapshot(self.now).instances if i.model == name)

    def state(self, name: str) -> str:
        """The state of a model's instance."""
        return next(m.state for m in self.scheduler.snapshot(self.now).models if m.name == name)

    def opened(self, name: str, gateway: str = "g") -> Open:
        """The last `Open` that a gateway got for a model."""
        return [
            e.message
            for e in self.history
            if isinstance(e, effects.Say)
            and e.gateway == gateway
            and isinstance(e.message, Open)
            and e.message.model == name
        ][-1]

    def epoch(self, name: str, gateway: str = "g") -> Epoch:
        """The epoch of the last lease that a gateway got for a model."""
        return self.opened(name, gateway).epoch


def said(out: list[effects.Effect], kind: type[M], gateway: str = "g") -> list[M]:
    """The messages of one kind to one gateway among ``out``."""
    return [
        e.message for e in out if isinstance(e, effects.Say) and e.gateway == gateway and isinstance(e.message, kind)
    ]


def of(out: list[effects.Effect], kind: type[F]) -> list[F]:
    """The effects of one kind among ``out``."""
    return [e for e in out if isinstance(e, kind)]
