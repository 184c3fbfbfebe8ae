"""The Protocol that every runtime fulfils."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from modelswap.engines.base import Address, Launch, Place, StandbyPlan
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.spec.config import Model


class Known(msgspec.Struct, frozen=True):
    """A configured model as a runtime needs to know it; ``definition`` is the digest of its config."""

    spec: Model
    definition: str


class Report(Protocol):
    """Is told how preparing goes on: what is done now, and which part (0..1) of it, if that can be told."""

    def __call__(self, stage: str, fraction: float | None) -> None:
        """Take it in; must return at once."""
        ...


class StartOrder(msgspec.Struct, frozen=True, kw_only=True):
    """All that a runtime needs to start one instance.

    ``instance`` is the id of this very start, unique forever; it is journalled before `Runtime.start` is called, and
    travels in the engine's environment (``MODELSWAP_INSTANCE``) or in the runtime's records. ``definition`` is a digest
    of what the instance was started from, so that a later config can be compared with it. ``address`` is the place's
    (`Runtime.allocate`); `Running.address` is where we reach it.
    """

    instance: str
    model: str
    definition: str
    spec: Model
    launch: Launch
    address: Address
    standby: StandbyPlan | None = None


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """One instance that a runtime hosts; plain data, kept in the journal.

    Its identity is its process's ``pid`` and ``born`` (creation time in Unix seconds, as the kernel tells it), or its
    container's full id and ``born`` (when Docker started it this time; ``pid`` is 0 then): Docker gives a container's
    address to the next one, and the same container is started again and again.
    """

    instance: str
    model: str
    definition: str
    address: Address
    pid: int = 0
    born: float = 0.0
    container: str = ""
    mechanism: Literal["cold", "standby"] = "cold"
    carried: str = ""
    """The instance id in its process's environment, if that isn't its own: it was a standby before."""


class StandbyState(msgspec.Struct, frozen=True, kw_only=True):
    """One key of `StandbyPlan`: a process that waits or is being made, or the ``problem`` that there is none.

    ``host_bytes`` is the host memory that it alone takes; ``pid`` is 0 in a container.
    """

    key: str
    ready: bool = False
    pid: int = 0
    host_bytes: int = 0
    problem: str = ""


class Told(msgspec.Struct, frozen=True):
    """What somebody else's container is started with: its words, the program's first, and its environment."""

    command: tuple[str, ...]
    env: Mapping[str, str]


class Exit(msgspec.Struct, frozen=True):
    """How an instance ended: ``code`` is negative for a signal, None where it can't be known (not our child).

    ``killed``: by us, after its grace. ``oom``: by the kernel, at its container's memory limit.
    """

    code: int | None
    killed: bool = False
    oom: bool = False

    def __str__(self) -> str:
        if self.oom:
            return "was killed: its container reached its memory limit"
        if self.code is None:
            return "ended"
        return f"killed by signal {-self.code}" if self.code < 0 else f"exited with status {self.code}"


class StartFailed(ModelswapError):
    """The engine could not even be started (disk full, no room for a process).

    With `Code.MODEL_BROKEN` if trying again is of no use (no such program, no permission).
    """

    code = Code.MODEL_START_FAILED


class NotPrepared(ModelswapError):
    """Raised by `Runtime.start` when what `Runtime.fetch` and `Runtime.create` make ready is missing again."""

    code = Code.MODEL_START_FAILED


class Unkillable(ModelswapError):
    """A process survived SIGKILL (uninterruptible in the kernel); its device counts as stuck."""

    code = Code.DEVICE_STUCK


class Runtime(Protocol):
    """Hosts instances. Every method may be called for an instance that has just ended."""

    async def configure(self, models: Mapping[str, Known]) -> None:
        """Learn which models there are, by name; called before everything else, and again on every change."""
        ...

    async def fetch(self, name: str, spec: Model, report: Report) -> None:
        """Have here what a start of the model needs from elsewhere (its image); raises `ModelswapError`.

        Needs no device. Cancelling it is safe; what was fetched so far is kept.
        """
        ...

    async def allocate(self, spec: Model) -> Place:
        """Return a place for the next start, not used by anything now and not lately used by us.

        Raises `StartFailed`, or `NotPrepared` when it must be fetched first.
        """
        ...

    async def create(self, order: StartOrder) -> None:
        """Do ahead of time all of a start that needs no device (make its container); raises as `start` does."""
        ...

    async def start(self, order: StartOrder) -> Running:
        """Start it and return at once; raises `StartFailed` or `NotPrepared`. It goes on if we die right after."""
        ...

    async def stand_by(self, plans: Sequence[StandbyPlan]) -> None:
        """Have exactly these waiting for a start whose `StartOrder.standby` is one of them; returns at once.

        What can't be made is told by `standbys` and in the log, and tried again minutes later. ``[]`` ends all.
        """
        ...

    def standbys(self) -> list[StandbyState]:
        """Return what waits, and what could not be made."""
        ...

    async def wait(self, running: Running) -> Exit:
        """Return when the instance has ended; at once if it has already."""
        ...

    async def stop(self, running: Running, grace: float) -> Exit:
        """Ask it to end, kill all that belongs to it after ``grace`` seconds, return when all of it has gone.

        ``grace`` 0 kills at once. Raises `Unkillable`. A later start of the same container is left alone.
        """
        ...

    async def listening(self, running: Running) -> bool:
        """Return whether a process of this very instance owns the listening socket at its address."""
        ...

    async def host_bytes(self, running: Running) -> int:
        """Return the host memory that the instance takes, beside files that were only read; 0 if nobody can tell."""
        ...

    async def told(self, running: Running) -> Told | None:
        """Return what an instance is started with where we don't say that; None for all others.

        Raises `ModelswapError` where nobody can tell for now.
        """
        ...

    async def instances(self) -> list[Running]:
        """Return every live instance that carries our ids, and every one of a configured model that others started.

        The latter have ids made up here, stable for as long as they run; see `foreign`.
        """
        ...

    def foreign(self, running: Running) -> bool:
        """Return whether somebody else started it (``docker start``, compose)."""
        ...

    async def appeared(self) -> Running:
        """Return the next instance of a configured model that somebody else starts, as soon as it runs."""
        ...

    def owns(self, pid: int) -> bool:
        """Return whether a process of this machine belongs to a live instance; explains who holds device memory."""
        ...

    async def log_tail(self, model: str, lines: int, instance: str | None = None) -> list[str]:
        """Return the last log lines of an instance, by default of the model's newest; empty if there is none."""
        ...

    async def sweep(self, keep: set[str]) -> list[str]:
        """Kill everything that carries our ids but is not of an instance in ``keep``; returns what that was.

        Raises `Unkillable` after having killed what could be.
        """
        ...

    async def rotate(self) -> None:
        """Keep house (rotate logs that have grown too large, say); called every few seconds."""
        ...
