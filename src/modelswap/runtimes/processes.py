"""Processes as the operating system shows them: identities, handles, and who carries which ids.

`modelswap.runtimes.procfs` reads them from ``/proc``; `modelswap.runtimes.portable` is for systems without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from signal import Signals
from typing import Final, Protocol

import msgspec

from modelswap.engines.base import Address
from modelswap.runtimes.base import Running, StartOrder

PREFIX: Final = "MODELSWAP_"


class Handle(Protocol):
    """One process, held so that a reuse of its PID is never mistaken for it. Close it after use."""

    pid: int

    def ended(self) -> bool:
        """Return whether it has ended; a zombie has."""
        ...

    async def wait(self) -> None:
        """Return when it has ended; may be cancelled, and awaited by several."""
        ...

    def signal(self, number: Signals) -> None:
        """Send a signal; does nothing to a process that has ended. Raises `PermissionError`."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class ProcessTable(Protocol):
    """What this package must know of the system's processes."""

    def pids(self) -> list[int]:
        """Return the PIDs there are, zombies included."""
        ...

    def born(self, pid: int) -> float | None:
        """Return a process's creation time in Unix seconds (the same at every look); None if there is none."""
        ...

    def environ(self, pid: int) -> Mapping[str, str] | None:
        """Return the ``MODELSWAP_`` variables it was started with; None where there is no environment to read."""
        ...

    def describe(self, pid: int) -> str:
        """Return its name and PID for people."""
        ...

    def open(self, pid: int, born: float | None = None) -> Handle | None:
        """Return a handle; None if there is no such process, or it was not born at ``born``."""
        ...

    def listens(self, address: Address, main: int, others: Callable[[], list[int]]) -> bool:
        """Return whether all sockets that accept connections to ``address`` belong to ``main`` or to ``others``.

        ``others`` is only asked for where someone else than ``main`` listens.
        """
        ...


class Ids(msgspec.Struct, frozen=True):
    """What a process of ours carries in its environment."""

    instance: str
    model: str
    definition: str
    address: Address
    state: str

    def variables(self) -> dict[str, str]:
        """Return the environment variables that say this."""
        return {
            "MODELSWAP_INSTANCE": self.instance,
            "MODELSWAP_MODEL": self.model,
            "MODELSWAP_DEFINITION": self.definition,
            "MODELSWAP_ADDRESS": f"{self.address.host}:{self.address.port}",
            "MODELSWAP_STATE": self.state,
        }

    @classmethod
    def of_order(cls, order: StartOrder, state: str) -> Ids:
        """Return what the processes of this start will carry."""
        return cls(order.instance, order.model, order.definition, order.address, state)

    @classmethod
    def of_environ(cls, environ: Mapping[str, str]) -> Ids | None:
        """Read them back; None where they are missing or not whole."""
        host, _, port = environ.get("MODELSWAP_ADDRESS", "").rpartition(":")
        instance, state = environ.get("MODELSWAP_INSTANCE"), environ.get("MODELSWAP_STATE")
        if not instance or not state or not host or not port.isdecimal():
            return None
        model, definition = environ.get("MODELSWAP_MODEL", ""), environ.get("MODELSWAP_DEFINITION", "")
        return cls(instance, model, definition, Address(host, int(port)), state)

    def running(self, pid: int, born: float) -> Running:
        """Return the instance whose main process this is."""
        return Running(
            instance=self.instance,
            model=self.model,
            definition=self.definition,
            address=self.address,
            pid=pid,
            born=born,
        )


def sessions(table: ProcessTable) -> dict[int, list[int]]:
    """Return all processes by session, without the kernel's and without our own session."""
    found: dict[int, list[int]] = {}
    for pid in table.pids():
        try:
            session = os.getsid(pid)
        except OSError:  # it has gone, or may not be looked at
            continue
        found.setdefault(session, []).append(pid)
    found.pop(0, None)
    found.pop(os.getsid(0), None)
    return found


def carried(table: ProcessTable, session: int, pids: list[int]) -> Ids | None:
    """Return the ids that a session carries.

    A process can only be born into a session or make its own, so one member with readable ids speaks for all, and
    the leader speaks first: reading one environment per session is what makes looking at a whole system cheap.
    """
    if session in pids and (environ := table.environ(session)) is not None:
        return Ids.of_environ(environ)
    for pid in pids:
        if pid != session and (ids := Ids.of_environ(table.environ(pid) or {})) is not None:
            return ids
    return None


def carriers(table: ProcessTable, state: str) -> Iterator[tuple[Ids, int, list[int]]]:
    """Yield the ids, session and processes of every session that carries ids of this state directory."""
    for session, pids in sessions(table).items():
        ids = carried(table, session, pids)
        if ids is not None and ids.state == state:
            yield ids, session, pids


def system_table(state_dir: Path) -> ProcessTable:
    """Return this system's process table; ``state_dir`` is where it may remember what must outlive us."""
    if sys.platform == "linux":
        from modelswap.runtimes.procfs import ProcfsTable

        return ProcfsTable(state_dir)
    from modelswap.runtimes.portable import PsutilTable

    return PsutilTable()
