"""What can happen to the scheduler. Each event carries ``at``: the shell's monotonic clock, in seconds."""

from __future__ import annotations

import msgspec

from modelswap.core.facts import DeviceFacts, ModelFacts, Settings
from modelswap.protocol.errors import Code
from modelswap.protocol.messages import GatewayMessage


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all events."""

    at: float


class Configure(Event, frozen=True):
    """The config was loaded, at start or again; replaces the one before."""

    models: tuple[ModelFacts, ...]
    devices: tuple[DeviceFacts, ...]
    settings: Settings = Settings()


class Adopted(Event, frozen=True):
    """An instance of an earlier orchestrator is still alive; said before `Begin`.

    ``ready`` tells whether it had been opened before; otherwise its start is taken up where it was. ``asleep`` is the
    level that it sleeps at, 0 if it is awake. One that is neither for sure (its sleeping or waking was cut short) is
    not adopted.
    """

    instance: str
    model: str
    definition: str
    host: str
    port: int
    slots: int
    ready: bool = True
    asleep: int = 0


class Begin(Event, frozen=True):
    """All adoptions have been said. Decisions wait for ``expected`` gateways to say hello, at most one term."""

    expected: frozenset[str] = frozenset()


class GatewaySaid(Event, frozen=True):
    """A message came in from a gateway; the first one of a connection is a `Hello`."""

    gateway: str
    message: GatewayMessage


class GatewayLost(Event, frozen=True):
    """A gateway's connection was closed."""

    gateway: str


class BringInStage(Event, frozen=True):
    """A start made progress; ``fraction`` in 0..1 where it can be known."""

    instance: str
    stage: str
    fraction: float | None = None


class BroughtIn(Event, frozen=True):
    """An instance is healthy and its canary passed; ``mechanism``: ``cold``, ``standby`` or ``wake``."""

    instance: str
    host: str
    port: int
    slots: int
    mechanism: str = "cold"


class BringInFailed(Event, frozen=True):
    """A start failed, and nothing of it runs any more.

    ``message`` is for clients: the reason, the remedy and the engine's last log lines. ``permanent``: trying again
    would fail again. ``blameless``: it says nothing about the model (somebody killed it, another program took its
    port); its waiters are kept for another try. ``unprepared``: what had been made ready ahead of time is missing
    again; its waiters are kept while that is mended.
    """

    instance: str
    code: Code
    message: str
    permanent: bool = False
    blameless: bool = False
    unprepared: bool = False


class Ways(Event, frozen=True):
    """How a model is to be put out from now on: ``level`` 0 stops it, 1 or 2 puts it to sleep.

    Holds for this ``definition`` of the model only, and until it is said anew. What sleeps already sleeps on.
    """

    model: str
    definition: str
    level: int


class Slept(Event, frozen=True):
    """An instance is asleep and its device memory is free, but for its residue."""

    instance: str


class SleepFailed(Event, frozen=True):
    """An instance can't be made sleep, or doesn't give its memory back; it must be ended."""

    instance: str
    message: str


class WakeFailed(Event, frozen=True):
    """An instance can't be woken, or woke with wrong answers, and nothing of it runs any more.

    Its waiters are kept; the next try is a start.
    """

    instance: str
    message: str


class DropSleeper(Event, frozen=True):
    """A sleeper is to be stopped, for what it costs (host memory, its residue on the device) or isn't worth."""

    instance: str
    reason: str


class PrepareStage(Event, frozen=True):
    """Preparing a model made progress; ``fraction`` in 0..1 where it can be known."""

    model: str
    definition: str
    stage: str
    fraction: float | None = None


class Prepared(Event, frozen=True):
    """All that a start of the model needs and that needs no device is there (image, weights, container)."""

    model: str
    definition: str


class PrepareFailed(Event, frozen=True):
    """A model can't be made ready (no such image, disk full); ``message`` is for clients."""

    model: str
    definition: str
    code: Code
    message: str
    permanent: bool = False


class Appeared(Event, frozen=True):
    """Somebody else has started an instance of a configured model (``docker start``, compose), and it runs.

    On a free device it is taken up like an adopted start; else it is to go (`effects.TurnAway`).
    """

    instance: str
    model: str
    definition: str
    host: str
    port: int
    slots: int


class Died(Event, frozen=True):
    """A ready, draining or sleeping instance ended by itself, or hangs and must be ended."""

    instance: str
    message: str


class PutOut(Event, frozen=True):
    """An instance has been stopped: nothing of it runs any more."""

    instance: str


class PutOutFailed(Event, frozen=True):
    """A process of the instance can't be killed; its device is stuck until it has gone after all.

    Then comes `PutOut`, or `BringInFailed` if it was being started.
    """

    instance: str
    message: str


class Released(Event, frozen=True):
    """The device says that its memory is free (or can't say, and its last holder has gone)."""

    device: str


class ReleaseFailed(Event, frozen=True):
    """The memory did not come back in time; ``message`` names the holders. The shell keeps watching."""

    device: str
    message: str


class Probed(Event, frozen=True):
    """The answer to `effects.Probe`."""

    instance: str
    healthy: bool
    message: str = ""


class Ensure(Event, frozen=True):
    """Somebody asks through the admin API that a model be made resident; answered with `effects.Answer`."""

    request: int
    model: str


class Unload(Event, frozen=True):
    """Somebody asks that a model (None: every one) be drained and stopped; answered with `effects.Answer`."""

    request: int
    model: str | None = None


class Pin(Event, frozen=True):
    """Pin or release a model at run time; holds until it is said anew, or the config changes its own word on it.

    ``model`` None: every resident one is pinned, or every model is released.
    """

    model: str | None
    pinned: bool


class Withdraw(Event, frozen=True):
    """Who asked by `Ensure` or `Unload` has gone."""

    request: int


class Tick(Event, frozen=True):
    """Time has passed; comes at `Scheduler.next_deadline`."""


class Shutdown(Event, frozen=True):
    """Drain and stop everything, refuse whoever waits. ``now``: without draining."""

    now: bool = False
