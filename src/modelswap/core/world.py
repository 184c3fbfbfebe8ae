"""All that the scheduler knows, as data; `leasing`, `waiting` and `swapping` act on it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from modelswap.core import effects, events
from modelswap.core.estimates import Average, Pace
from modelswap.core.facts import DeviceFacts, ModelFacts, Settings
from modelswap.core.leases import Lease
from modelswap.core.line import WaitingRoom
from modelswap.core.states import (
    HOLDING,
    TRANSITIONS,
    ForbiddenTransitionError,
    InstanceState,
    Preparedness,
    Transition,
)
from modelswap.core.swap import Swap
from modelswap.protocol.errors import Code
from modelswap.protocol.messages import Epoch, OrchestratorMessage


@dataclass(slots=True, kw_only=True, eq=False)
class Instance:
    """One start of one model's engine."""

    id: str
    model: str
    device: str
    definition: str
    demand: int
    state: InstanceState = InstanceState.ABSENT
    since: float = 0.0
    """When it entered its state."""
    ready_at: float = 0.0
    """When it was opened (this time)."""
    host: str = ""
    port: int = 0
    slots: int = 0
    epoch: Epoch | None = None
    leases: dict[tuple[str, Epoch], Lease] = field(default_factory=dict)
    """By gateway and epoch; open ones have the instance's epoch, the others are closing."""
    floor: int = 0
    """Waiting tickets that must be served before it may be put out."""
    gone: bool = False
    """Its processes have ended (it may still wait for leases to drain)."""
    falling: int = 0
    """The level at which it is being put to sleep, once it has drained."""
    asleep: int = 0
    """The level at which it sleeps; also while it is being stopped in its sleep."""
    strays: set[str] = field(default_factory=set)
    """Gateways that were lost while they had leases on it, and haven't said hello again."""
    probing: bool = False
    contended: bool = False
    """Gateways have been told that somebody waits for another model."""
    adopted: bool = False
    """It was started by an earlier orchestrator, or by somebody else."""
    stage: str = ""
    fraction: float | None = None
    story: deque[Transition] = field(default_factory=lambda: deque(maxlen=32))

    @property
    def resident(self) -> bool:
        """Ready, and its gate open."""
        return self.state is InstanceState.READY and self.epoch is not None

    @property
    def holds(self) -> bool:
        """Whether it counts against its device's capacity."""
        return self.state in HOLDING and not self.asleep

    def open_leases(self) -> list[Lease]:
        """Return the leases of the current epoch."""
        return [lease for lease in self.leases.values() if not lease.closing]

    @property
    def in_flight(self) -> int:
        """Requests running, as last reported."""
        return sum(lease.in_flight for lease in self.leases.values())


@dataclass(slots=True, kw_only=True)
class Backoff:
    """A model that failed is not tried again before ``until``."""

    until: float
    failures: int
    code: Code
    message: str
    permanent: bool


@dataclass(slots=True, kw_only=True)
class Preparation:
    """How far a model's preparing is; ``fraction`` (0..1) of ``stage``, where it can be known."""

    state: Preparedness = Preparedness.NEEDED
    stage: str = ""
    fraction: float | None = None


@dataclass(slots=True, kw_only=True)
class ModelRecord:
    """A configured model and what was learned about it."""

    facts: ModelFacts
    device: str
    preparation: Preparation = field(default_factory=Preparation)
    swap_time: Average = field(default_factory=Average)
    load_time: Average = field(default_factory=Average)
    pace: Pace = field(default_factory=lambda: Pace(Average()))
    wake_time: Average = field(default_factory=Average)
    way: int = 0
    """How its instance is put out: 0 stopped, else put to sleep at this level."""
    pin: bool | None = None
    """What was said at run time about pinning it; None: the config holds."""
    backoff: Backoff | None = None
    failures: int = 0
    """Failed starts in a row, and early deaths beyond those that are forgiven."""
    mishaps: int = 0
    """Starts in a row that failed by no fault of the model's, and were repeated."""
    unprepared_starts: int = 0
    """Starts in a row that found something missing which had been prepared, and were repeated."""
    failed_wakes: int = 0
    """Failed wakes in a row."""
    early_deaths: int = 0
    """Deaths soon after coming in, in a row."""

    @property
    def pinned(self) -> bool:
        """Whether it isn't left for others once it is resident."""
        return self.facts.pinned if self.pin is None else self.pin

    @property
    def prepared(self) -> bool:
        """Whether a start may begin: all that it needs and that needs no device is there."""
        return not self.facts.prepare or self.preparation.state is Preparedness.DONE


@dataclass(slots=True, kw_only=True)
class DeviceRecord:
    """A device, or the private place of a model that needs none."""

    facts: DeviceFacts
    private: bool = False
    dirty: int = 0
    """Capacity whose holder has gone but whose memory the device hasn't been seen to give back."""
    swap: Swap | None = None
    stuck: str = ""
    """Why no memory will come back: a process can't be killed."""
    stuck_by: str = ""
    """The instance whose process that is."""
    blocked: str = ""
    """Why memory hasn't come back in time."""
    reconsider_at: float | None = None

    @property
    def name(self) -> str:
        """The device's name."""
        return self.facts.name


@dataclass(slots=True)
class GatewayRecord:
    """A connected gateway; ``heard`` is when it last said something."""

    heard: float


@dataclass(slots=True, kw_only=True)
class Request:
    """An `Ensure` or `Unload` that hasn't been answered."""

    id: int
    model: str | None
    began: float
    previous: str | None = None
    preload: bool = False
    """Our own, to preload a model; nobody hears the answer."""


@dataclass(slots=True)
class World:
    """Everything. ``out`` collects the effects of the event at hand."""

    generation: int
    now: float = 0.0
    settings: Settings = field(default_factory=Settings)
    models: dict[str, ModelRecord] = field(default_factory=dict)
    devices: dict[str, DeviceRecord] = field(default_factory=dict)
    instances: dict[str, Instance] = field(default_factory=dict)
    by_model: dict[str, str] = field(default_factory=dict)
    gateways: dict[str, GatewayRecord] = field(default_factory=dict)
    waiting: WaitingRoom = field(default_factory=WaitingRoom)
    ensures: dict[int, Request] = field(default_factory=dict)
    unloads: dict[int, Request] = field(default_factory=dict)
    appeared: dict[str, events.Appeared] = field(default_factory=dict)
    """What others have started and we haven't decided about, by instance."""
    begun: bool = False
    begin_deadline: float | None = None
    expected: set[str] = field(default_factory=set)
    doubtful: dict[str, float] = field(default_factory=dict)
    """Gateways that may use leases we don't know of, and until when: they would have said hello again by then."""
    fences: set[tuple[str, Epoch]] = field(default_factory=set)
    """Leases on instances that are gone, which their gateways have been told to close but haven't drained yet."""
    ahead: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Model and definition that were last said to be read ahead, by device."""
    shutting_down: bool = False
    catalog_changed: bool = False
    progress_at: float = 0.0
    finished: bool = False
    epochs: int = 0
    starts: int = 0
    out: list[effects.Effect] = field(default_factory=list)

    def emit(self, effect: effects.Effect) -> None:
        """Have something done."""
        self.out.append(effect)

    def say(self, gateway: str, message: OrchestratorMessage) -> None:
        """Send a message to a gateway."""
        self.out.append(effects.Say(gateway=gateway, message=message))

    def next_epoch(self) -> Epoch:
        """Return an epoch never used before."""
        self.epochs += 1
        return Epoch(self.generation, self.epochs)

    def instance_of(self, model: str) -> Instance | None:
        """Return the model's one instance, in whatever state."""
        id_ = self.by_model.get(model)
        return self.instances[id_] if id_ is not None else None

    def state_of(self, model: str) -> InstanceState:
        """Return the state of the model's instance."""
        instance = self.instance_of(model)
        return instance.state if instance is not None else InstanceState.ABSENT

    def on_device(self, device: str) -> Iterator[Instance]:
        """Yield the instances that belong to a device, failed ones and sleepers aside."""
        return (i for i in self._of_device(device) if not i.asleep)

    def sleepers(self, device: str) -> Iterator[Instance]:
        """Yield the instances that sleep on a device or are being stopped in their sleep."""
        return (i for i in self._of_device(device) if i.asleep)

    def _of_device(self, device: str) -> Iterator[Instance]:
        return (i for i in self.instances.values() if i.device == device and i.state is not InstanceState.FAILED)

    def soil(self, instance: Instance) -> None:
        """Note that what an instance held has been left, but hasn't been seen to be free."""
        device = self.devices[instance.device]
        if not device.private:
            device.dirty = min(device.dirty + instance.demand, device.facts.capacity)

    def room(self, device: DeviceRecord) -> int:
        """Return the capacity that nothing holds and that is known to be free."""
        held = sum(i.demand for i in self.on_device(device.name) if i.holds)
        return device.facts.capacity - held - device.dirty

    def add_instance(self, model: ModelRecord, id_: str) -> Instance:
        """Make a new instance of ``model``, absent yet; a failed one before it is cleared away."""
        before = self.instance_of(model.facts.name)
        if before is not None:
            self.transition(before, InstanceState.ABSENT, "tried again")
            self.remove(before)
        instance = Instance(
            id=id_,
            model=model.facts.name,
            device=model.device,
            definition=model.facts.definition,
            demand=model.facts.demand,
            slots=model.facts.slots,
            since=self.now,
        )
        self.instances[id_] = instance
        self.by_model[instance.model] = id_
        return instance

    def remove(self, instance: Instance) -> None:
        """Forget an instance that is absent."""
        del self.instances[instance.id]
        if self.by_model.get(instance.model) == instance.id:
            del self.by_model[instance.model]

    def clear_failed(self, instance: Instance) -> None:
        """Forget an instance that has failed."""
        self.transition(instance, InstanceState.ABSENT, "may be tried again")
        self.remove(instance)

    def transition(self, instance: Instance, after: InstanceState, cause: str) -> None:
        """Change an instance's state; raises `ForbiddenTransitionError`, which is a bug."""
        before = instance.state
        if after not in TRANSITIONS[before]:
            raise ForbiddenTransitionError(instance.id, before, after, instance.story)
        instance.story.append(Transition(self.now, before, after, cause))
        instance.state = after
        instance.since = self.now
        if after is InstanceState.ASLEEP:
            instance.asleep = instance.asleep or instance.falling
        elif after is not InstanceState.STOPPING:
            instance.asleep = 0
        if after is not InstanceState.DRAINING:
            instance.falling = 0
        self.catalog_changed = True
        self.emit(
            effects.Transitioned(
                instance=instance.id,
                model=instance.model,
                before=before,
                after=after,
                cause=cause,
                definition=instance.definition,
                host=instance.host,
                port=instance.port,
                asleep=instance.asleep,
            )
        )
