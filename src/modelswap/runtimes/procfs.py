"""Linux's process table: ``/proc`` and pidfds."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from modelswap.engines.base import Address
from modelswap.runtimes import sockets
from modelswap.runtimes.processes import PREFIX, Handle

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_POLL_SECONDS: Final = 0.02
# Where there are no pidfds (old kernels, seccomp filters) or no descriptors left, processes are polled.
_NO_PIDFD: Final = frozenset({errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.EMFILE, errno.ENFILE})


class Boot(msgspec.Struct, frozen=True):
    """Which boot of the machine this is, and what we take for its time in Unix seconds.

    The kernel tells a process's birth in ticks since the boot; its own idea of when that was moves with every
    adjustment of the clock. Remembering the first answer makes births comparable for as long as the boot lasts.
    """

    id: str
    seconds: int

    def born(self, ticks: int) -> float:
        """Return a birth in Unix seconds."""
        return self.seconds + ticks / _TICKS

    def same(self, born: float, ticks: int) -> bool:
        """Return whether a time that `born` returned means this birth."""
        return abs(self.born(ticks) - born) < 0.5 / _TICKS


def boot(state_dir: Path) -> Boot:
    """Return the boot we run in, the same in every process that uses ``state_dir``."""
    path = state_dir / "boot.json"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError, msgspec.DecodeError):
        known = msgspec.json.decode(path.read_bytes(), type=Boot)
        if known.id == boot_id:
            return known
    lines = Path("/proc/stat").read_bytes().splitlines()
    seconds = next(int(line.split()[1]) for line in lines if line.startswith(b"btime"))
    found = Boot(boot_id, seconds)
    # Not being able to write it down (a full disk) only matters if the clock is set before the next start.
    with contextlib.suppress(OSError):
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(msgspec.json.encode(found))
        fresh.replace(path)
    return found


def _read(path: str) -> bytes:
    """Return a file of ``/proc``; empty if the process has gone or may not be looked at."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        chunks = []
        while chunk := os.read(descriptor, 65536):
            chunks.append(chunk)
        return b"".join(chunks)
    except OSError:  # it went while we read
        return b""
    finally:
        os.close(descriptor)


class Stat(NamedTuple):
    """What we use of ``/proc/PID/stat``; ``ticks`` is the birth in clock ticks since the boot."""

    state: str
    parent: int
    ticks: int


def stat(pid: int) -> Stat | None:
    """Look at a process; None if there is none."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return Stat(fields[0].decode(), int(fields[1]), int(fields[19])) if len(fields) > 19 else None


def pids() -> list[int]:
    """Return the PIDs there are, zombies included."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208 - looked at per swap


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class PidfdHandle:
    """A process by its pidfd."""

    __slots__ = ("_fd", "pid")

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self._fd = fd

    def ended(self) -> bool:
        """See `Handle`. A leader whose other threads live on is a zombie for ``ps``, but its pidfd knows better."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    async def wait(self) -> None:
        """See `Handle`."""
        if self.ended():
            return
        # Several may wait at once, and a loop takes one reader per descriptor: each has its own.
        fd = os.dup(self._fd)
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        try:
            loop.add_reader(fd, _settle, ended)
            try:
                await ended
            finally:
                loop.remove_reader(fd)
        finally:
            os.close(fd)

    def signal(self, number: signal.Signals) -> None:
        """See `Handle`."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)

    def close(self) -> None:
        """See `Handle`."""
        os.close(self._fd)


class PolledHandle:
    """A process by its PID and birth, where there are no pidfds."""

    __slots__ = ("_ticks", "pid")

    def __init__(self, pid: int, ticks: int) -> None:
        self.pid = pid
        self._ticks = ticks

    def ended(self) -> bool:
        """See `Handle`."""
        found = stat(self.pid)
        return found is None or found.ticks != self._ticks or found.state in "ZX"

    async def wait(self) -> None:
        """See `Handle`."""
        while not self.ended():  # noqa: ASYNC110 - the kernel offers no event here
            await asyncio.sleep(_POLL_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        """See `Handle`."""
        if not self.ended():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def close(self) -> None:
        """See `Handle`."""


class ProcfsTable:
    """`ProcessTable` from ``/proc``."""

    def __init__(self, state_dir: Path) -> None:
        self._boot = boot(state_dir)

    def pids(self) -> list[int]:
        """See `ProcessTable`."""
        return pids()

    def born(self, pid: int) -> float | None:
        """See `ProcessTable`."""
        found = stat(pid)
        return None if found is None else self._boot.born(found.ticks)

    def environ(self, pid: int) -> dict[str, str] | None:
        """See `ProcessTable`. There is none of a zombie, a stranger's process, or one that has written over it."""
        raw = _read(f"/proc/{pid}/environ")
        if not raw.strip(b"\0"):
            return None
        prefix = PREFIX.encode()
        if prefix not in raw:
            return {}
        pairs = (entry.partition(b"=") for entry in raw.split(b"\0") if entry.startswith(prefix))
        return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}

    def describe(self, pid: int) -> str:
        """See `ProcessTable`."""
        name = _read(f"/proc/{pid}/comm").decode(errors="replace").strip() or "process"
        found = stat(pid)
        return f"{name} (pid {pid}{', in an uninterruptible wait' if found and found.state == 'D' else ''})"

    def open(self, pid: int, born: float | None = None) -> Handle | None:
        """See `ProcessTable`."""
        fd = -1
        try:
            fd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno not in _NO_PIDFD:
                return None
        # Looked at after the pidfd was opened: if this is the right birth, then the pidfd is of that process.
        found = stat(pid)
        if found is None or (born is not None and not self._boot.same(born, found.ticks)):
            if fd >= 0:
                os.close(fd)
            return None
        return PidfdHandle(pid, fd) if fd >= 0 else PolledHandle(pid, found.ticks)

    def listens(self, address: Address, main: int, others: Callable[[], list[int]]) -> bool:
        """See `ProcessTable`."""
        inodes = sockets.listeners(address)
        if not inodes:
            return False
        inodes -= sockets.held(main, inodes)
        for pid in others() if inodes else ():
            inodes -= sockets.held(pid, inodes)
        return not inodes
