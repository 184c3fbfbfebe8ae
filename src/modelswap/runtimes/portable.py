"""A process table from psutil, for systems without ``/proc`` and pidfds (macOS; best effort)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from typing import Final

import psutil

from modelswap.engines.base import Address
from modelswap.runtimes.processes import PREFIX, Handle

_POLL_SECONDS: Final = 0.02
# psutil's creation times follow the clock's adjustments; a PID is not used again within this time.
_BORN_TOLERANCE: Final = 1.0


class PsutilHandle:
    """A process by its PID and creation time."""

    __slots__ = ("_process", "pid")

    def __init__(self, process: psutil.Process) -> None:
        self.pid = process.pid
        self._process = process

    def ended(self) -> bool:
        """See `Handle`."""
        try:
            return not self._process.is_running() or self._process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    async def wait(self) -> None:
        """See `Handle`."""
        while not self.ended():  # noqa: ASYNC110 - psutil offers no event
            await asyncio.sleep(_POLL_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        """See `Handle`."""
        with contextlib.suppress(psutil.NoSuchProcess):
            try:
                self._process.send_signal(number)
            except psutil.AccessDenied as error:
                raise PermissionError(str(error)) from error

    def close(self) -> None:
        """See `Handle`."""


class PsutilTable:
    """`ProcessTable` from psutil."""

    def pids(self) -> list[int]:
        """See `ProcessTable`."""
        return psutil.pids()

    def born(self, pid: int) -> float | None:
        """See `ProcessTable`."""
        try:
            return psutil.Process(pid).create_time()
        except psutil.Error:
            return None

    def environ(self, pid: int) -> dict[str, str] | None:
        """See `ProcessTable`."""
        try:
            environ = psutil.Process(pid).environ()
        except (psutil.Error, OSError):  # gone, or not ours to look at
            return None
        if not environ:
            return None
        return {name: value for name, value in environ.items() if name.startswith(PREFIX)}

    def describe(self, pid: int) -> str:
        """See `ProcessTable`."""
        try:
            return f"{psutil.Process(pid).name()} (pid {pid})"
        except psutil.Error:
            return f"process (pid {pid})"

    def open(self, pid: int, born: float | None = None) -> Handle | None:
        """See `ProcessTable`."""
        try:
            process = psutil.Process(pid)
            if born is not None and abs(process.create_time() - born) > _BORN_TOLERANCE:
                return None
        except psutil.Error:
            return None
        return PsutilHandle(process)

    def listens(self, address: Address, main: int, others: Callable[[], list[int]]) -> bool:
        """See `ProcessTable`; sees only our processes' sockets, so a stranger beside them goes unnoticed."""
        hosts = {address.host, "0.0.0.0", "::", f"::ffff:{address.host}"}
        for pid in (main, *others()):
            try:
                connections = psutil.Process(pid).net_connections("tcp")
            except (psutil.Error, OSError):
                continue
            for connection in connections:
                local = connection.laddr
                if connection.status == psutil.CONN_LISTEN and local.port == address.port and local.ip in hosts:
                    return True
        return False
