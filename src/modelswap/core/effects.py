"""What the scheduler wants done. The shell carries effects out in order and reports back as events."""

from __future__ import annotations

import msgspec

from modelswap.core.states import InstanceState
from modelswap.core.swap import SwapRecord
from modelswap.protocol.errors import Code
from modelswap.protocol.messages import OrchestratorMessage


class Effect(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all effects."""


class Say(Effect, frozen=True):
    """Send a message to a gateway."""

    gateway: str
    message: OrchestratorMessage


class Disconnect(Effect, frozen=True):
    """Close the connection to a gateway that was silent for too long; it must say hello again."""

    gateway: str
    reason: str


class BringIn(Effect, frozen=True):
    """Start an instance, wait until it is healthy, pass its canary.

    Reports `BringInStage`, then `BroughtIn` or `BringInFailed`. ``adopted``: it runs already, only wait for it.
    """

    instance: str
    model: str
    definition: str
    adopted: bool = False


class Sleep(Effect, frozen=True):
    """Make a drained instance sleep at ``level``; reports `events.Slept` or `events.SleepFailed`.

    Its `Watch` ends. A `PutOut` meanwhile cancels it. ``target`` is the model that comes in instead, if one does.
    """

    instance: str
    model: str
    level: int
    target: str = ""


class Wake(Effect, frozen=True):
    """Wake an instance that sleeps at ``level``, and pass its canary.

    Reports `BringInStage`, then `BroughtIn` (``mechanism="wake"``) or `WakeFailed`. Its `Watch` ends. A `PutOut`
    meanwhile cancels it.
    """

    instance: str
    model: str
    level: int
    definition: str


class Prepare(Effect, frozen=True):
    """Make ready all that a start of the model needs and that needs no device: image, weights, container.

    Reports `PrepareStage`, then `Prepared` or `PrepareFailed`. A second one while the first goes on changes nothing.
    """

    model: str
    definition: str


class ReadAhead(Effect, frozen=True):
    """Read the weights of the model that comes in next on a device into host memory's page cache; None: no more.

    Takes the place of the device's last one, which ends at once. It reports nothing, and nothing waits for it: it may
    be left undone.
    """

    device: str
    model: str | None
    definition: str = ""


class TurnAway(Effect, frozen=True):
    """Stop an instance that somebody else started while its device was another's, and tell; it never counted.

    No start on this device may begin before it has ended. The scheduler has the device verified before its next start.
    """

    instance: str
    model: str
    reason: str


class PutOut(Effect, frozen=True):
    """Stop an instance and all that belongs to it, also while it is being brought in, falls asleep or wakes.

    What it was doing is then cancelled. Reports `events.PutOut` or `events.PutOutFailed`. ``kill``: without grace, it
    is dead or hangs.
    """

    instance: str
    model: str
    kill: bool = False


class Watch(Effect, frozen=True):
    """Tell with `events.Died` when this instance ends or hangs; takes the place of an earlier one of it.

    Ends by itself on `PutOut`, `Sleep` and `Wake`. ``asleep``: it sleeps, so all that can be seen is whether it ends.
    """

    instance: str
    model: str
    asleep: bool = False


class Probe(Effect, frozen=True):
    """A gateway had trouble with this instance: look whether it is alive and healthy; reports `Probed`."""

    instance: str
    model: str


class VerifyReleased(Effect, frozen=True):
    """See that the device has room for ``model``; reports `Released` or `ReleaseFailed` and then `Released`.

    ``holders`` are the instances that rightly hold memory there meanwhile, sleepers with their residue among them.
    """

    device: str
    model: str
    holders: tuple[str, ...] = ()


class Answer(Effect, frozen=True):
    """The outcome of an `Ensure` or `Unload`; ``code`` is None on success.

    ``previous`` is the model that was put out (None: none was), ``mechanism`` how the model came in (``resident``:
    it already was), ``seconds`` since the request.
    """

    request: int
    model: str | None
    code: Code | None = None
    message: str = ""
    retry_after_ms: int | None = None
    previous: str | None = None
    mechanism: str = "resident"
    seconds: float = 0.0
    host: str = ""
    port: int = 0


class SwapEnded(Effect, frozen=True):
    """A swap is over; for metrics, history and events."""

    record: SwapRecord


class Transitioned(Effect, frozen=True):
    """An instance changed its state; for the journal and for events. ``cause`` is the event's name and detail.

    ``asleep`` is the level at which it sleeps from now on, 0 if it doesn't.
    """

    instance: str
    model: str
    before: InstanceState
    after: InstanceState
    cause: str
    definition: str = ""
    host: str = ""
    port: int = 0
    asleep: int = 0


class TicketEnded(Effect, frozen=True):
    """A waiting request was granted, refused or forgotten (``outcome``) after ``waited`` seconds."""

    model: str
    outcome: str
    waited: float


class Finished(Effect, frozen=True):
    """A `Shutdown` is complete: nothing runs any more."""
