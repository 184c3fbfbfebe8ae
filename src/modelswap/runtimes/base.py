"""The Protocol that every runtime fulfils."""

from __future__ import annotations

from typing import Protocol

import msgspec

from modelswap.engines.base import Address, Launch
from modelswap.protocol.errors import Code, ModelswapError


class StartOrder(msgspec.Struct, frozen=True, kw_only=True):
    """All that a runtime needs to start one instance.

    ``instance`` is the id of this very start, unique forever; it is journalled before `Runtime.start` is called, and
    travels in the engine's environment (``MODELSWAP_INSTANCE``) or labels. ``definition`` is a digest of what the
    instance was started from, so that a later config can be compared with it.
    """

    instance: str
    model: str
    definition: str
    launch: Launch
    address: Address


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """One instance that a runtime hosts; plain data, kept in the journal.

    ``pid`` and ``born`` (the process's creation time in Unix seconds, as the kernel tells it) are its identity; both
    are 0 for runtimes with identities of their own.
    """

    instance: str
    model: str
    definition: str
    address: Address
    pid: int = 0
    born: float = 0.0


class Exit(msgspec.Struct, frozen=True):
    """How an instance ended: ``code`` is negative for a signal, None where it can't be known (not our child)."""

    code: int | None
    killed: bool = False

    def __str__(self) -> str:
        if self.code is None:
            return "ended"
        return f"killed by signal {-self.code}" if self.code < 0 else f"exited with status {self.code}"


class StartFailed(ModelswapError):
    """The engine could not even be started (disk full, no room for a process).

    With `Code.MODEL_BROKEN` if trying again is of no use (no such program, no permission).
    """

    code = Code.MODEL_START_FAILED


class Unkillable(ModelswapError):
    """A process survived SIGKILL (uninterruptible in the kernel); its device counts as stuck."""

    code = Code.DEVICE_STUCK


class Runtime(Protocol):
    """Hosts instances. Every method may be called for an instance that has just ended."""

    async def allocate(self) -> Address:
        """Return an address for the next start, not used by anything now and not lately used by us."""
        ...

    async def start(self, order: StartOrder) -> Running:
        """Start it and return at once; raises `StartFailed`. It goes on if we die right after."""
        ...

    async def wait(self, running: Running) -> Exit:
        """Return when the instance has ended; at once if it has already."""
        ...

    async def stop(self, running: Running, grace: float) -> Exit:
        """Ask it to end, kill all that belongs to it after ``grace`` seconds, return when all of it has gone.

        ``grace`` 0 kills at once. Raises `Unkillable`.
        """
        ...

    async def listening(self, running: Running) -> bool:
        """Return whether a process of this very instance owns the listening socket at its address."""
        ...

    async def instances(self) -> list[Running]:
        """Return every live instance that carries our ids, whoever started it."""
        ...

    async def log_tail(self, model: str, lines: int, instance: str | None = None) -> list[str]:
        """Return the last log lines of an instance, by default of the model's newest; empty if there is none."""
        ...
