"""A simulated GPU's memory: a file that says who holds how much, shared between processes.

The file is JSON, replaced atomically under a lock beside it, so that a process killed at any moment leaves it
readable and unlocked. Whoever looks next frees what dead processes held. All times are `time.monotonic`, which the
processes of one machine share.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import msgspec

from modelswap.testing.liveness import born

HISTORY: Final = 500
"""Happenings that a ledger remembers."""

GIB: Final = 1 << 30


class OutOfDeviceMemory(MemoryError):
    """An allocation did not fit. ``asked``, ``free`` and ``capacity`` are in bytes; nothing was allocated."""

    def __init__(self, asked: int, free: int, capacity: int) -> None:
        super().__init__(
            f"tried to allocate {asked / GIB:.2f} GiB on a device of {capacity / GIB:.2f} GiB "
            f"of which {max(free, 0) / GIB:.2f} GiB is free"
        )
        self.asked = asked
        self.free = free
        self.capacity = capacity


class Allocation(msgspec.Struct, kw_only=True):
    """What one process holds for one instance.

    ``residue`` is what a sleeping engine keeps. ``foreign`` holders are no engines, and are never thought dead.
    ``freed_at`` is when it was released or its process was found dead; the memory is back ``release_delay`` seconds
    later.
    """

    pid: int
    born: float
    instance: str
    bytes: int
    name: str = "engine"
    residue: bool = False
    foreign: bool = False
    release_delay: float = 0.0
    freed_at: float | None = None


class Happening(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a ledger's history.

    ``allocate`` and ``resize`` say what is held from then on; ``refuse``: it did not fit; ``overlap``: an instance came
    while another one held memory; ``release`` and ``death``: given up or found dead; ``free``: the memory is back.
    """

    at: float
    what: Literal["allocate", "resize", "refuse", "overlap", "release", "death", "free"]
    pid: int
    instance: str
    bytes: int


class Account(msgspec.Struct, kw_only=True):
    """A ledger's content.

    ``peak`` is the most bytes ever held at once. ``overlaps`` counts the times an engine took, or tried to take, memory
    while another instance held more than a sleeper's residue, memory not yet back included. ``overcommits`` counts
    allocations that did not fit.
    """

    capacity: int
    release_delay: float = 0.0
    allocations: list[Allocation] = []
    peak: int = 0
    overlaps: int = 0
    overcommits: int = 0
    history: list[Happening] = []

    @property
    def used(self) -> int:
        """Bytes held."""
        return sum(allocation.bytes for allocation in self.allocations)

    @property
    def free(self) -> int:
        """Bytes that could be allocated."""
        return self.capacity - self.used

    @property
    def instances(self) -> set[str]:
        """The instances that hold more than a sleeper's residue, memory not yet back included."""
        return {a.instance for a in self.allocations if not (a.residue or a.foreign)}


class Ledger:
    """The account at ``path``; any number of processes may hold one. No method blocks for longer than others work."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = self.path.with_name(self.path.name + ".lock")
        self._draft = self.path.with_name(self.path.name + ".new")

    @classmethod
    def create(cls, path: Path | str, capacity: int, *, release_delay: float = 0.0) -> Ledger:
        """Begin an empty account of ``capacity`` bytes, replacing what was at ``path``.

        ``release_delay`` is how many seconds freed memory takes to come back, where an allocation says nothing else.
        """
        ledger = cls(path)
        with ledger._locked():
            ledger._write(Account(capacity=capacity, release_delay=release_delay))
        return ledger

    def read(self) -> Account:
        """Return the account, with what dead processes held on its way back."""
        with self._opened() as account:
            return account

    def allocate(
        self,
        size: int,
        *,
        instance: str,
        pid: int | None = None,
        name: str = "engine",
        residue: bool = False,
        release_delay: float | None = None,
    ) -> None:
        """Make ``size`` bytes what ``instance`` holds by process ``pid`` (default: this one); 0 releases it.

        What it held before counts as free for it. Raises `OutOfDeviceMemory` if the rest does not fit, and
        `ProcessLookupError` if there is no such process.
        """
        pid = os.getpid() if pid is None else pid
        birth = born(pid)
        if birth is None:
            raise ProcessLookupError(f"process {pid} has ended")
        with self._opened() as account:
            held = _find(account, instance, pid, birth)
            before = held.bytes if held else 0
            room = account.free + before
            if size and not residue and account.instances - {instance}:
                account.overlaps += 1
                _note(account, "overlap", pid, instance, size)
            if size <= room:
                delay = account.release_delay if release_delay is None else release_delay
                self._set(account, held, size, pid, birth, instance, name, residue, delay)
            else:
                account.overcommits += 1
                _note(account, "refuse", pid, instance, size)
        if size > room:
            raise OutOfDeviceMemory(size, room, account.capacity)

    def release(self, *, instance: str, pid: int | None = None) -> None:
        """Give up all that ``instance`` holds (by ``pid`` only, if given)."""
        with self._opened() as account:
            for held in account.allocations:
                if held.instance == instance and held.freed_at is None and pid in (None, held.pid):
                    _give_up(account, held, "release")
            _sweep(account)

    def delay_release(self, seconds: float, *, instance: str) -> None:
        """Let the memory that ``instance`` holds now come back ``seconds`` after it is released."""
        with self._opened() as account:
            for held in account.allocations:
                if held.instance == instance:
                    held.release_delay = seconds

    def add_foreign(self, size: int, *, pid: int = 4121, name: str = "python") -> None:
        """Let some process that is no engine hold ``size`` bytes until `remove_foreign`; ``pid`` need not exist."""
        with self._opened() as account:
            account.allocations.append(
                Allocation(pid=pid, born=0.0, instance=f"foreign-{pid}", bytes=size, name=name, foreign=True)
            )
            account.peak = max(account.peak, account.used)
            _note(account, "allocate", pid, f"foreign-{pid}", size)

    def remove_foreign(self, *, pid: int = 4121) -> None:
        """Take away the foreign holder ``pid``."""
        with self._opened() as account:
            for held in [a for a in account.allocations if a.foreign and a.pid == pid]:
                account.allocations.remove(held)
                _note(account, "free", pid, held.instance, held.bytes)

    def _set(
        self,
        account: Account,
        held: Allocation | None,
        size: int,
        pid: int,
        birth: float,
        instance: str,
        name: str,
        residue: bool,
        delay: float,
    ) -> None:
        what: Literal["allocate", "resize"] = "allocate" if held is None else "resize"
        if held is None:
            held = Allocation(pid=pid, born=birth, instance=instance, bytes=0)
            account.allocations.append(held)
        given_back = held.bytes - size
        if given_back > 0:
            rest = msgspec.structs.replace(held, bytes=given_back)
            account.allocations.append(rest)
            _give_up(account, rest, "release")
        held.bytes, held.name, held.residue, held.release_delay = size, name, residue, delay
        _note(account, what, pid, instance, size)
        if size == 0:
            account.allocations.remove(held)
        _sweep(account)
        account.peak = max(account.peak, account.used)

    @contextmanager
    def _opened(self) -> Iterator[Account]:
        with self._locked():
            found = self.path.read_bytes()
            account = msgspec.json.decode(found, type=Account)
            _sweep(account)
            yield account
            if (changed := msgspec.json.encode(account)) != found:
                self._write(account, changed)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            # Closing unlocks, and so does dying.
            os.close(descriptor)

    def _write(self, account: Account, encoded: bytes | None = None) -> None:
        self._draft.write_bytes(encoded or msgspec.json.encode(account))
        self._draft.replace(self.path)


def _find(account: Account, instance: str, pid: int, birth: float) -> Allocation | None:
    for held in account.allocations:
        if (held.instance, held.pid, held.born) == (instance, pid, birth) and held.freed_at is None:
            return held
    return None


def _give_up(account: Account, held: Allocation, what: Literal["release", "death"]) -> None:
    held.freed_at = time.monotonic()
    _note(account, what, held.pid, held.instance, held.bytes)


def _sweep(account: Account) -> None:
    kept: list[Allocation] = []
    for held in account.allocations:
        if not held.foreign and held.freed_at is None and born(held.pid) != held.born:
            _give_up(account, held, "death")
        if held.freed_at is not None and time.monotonic() >= held.freed_at + held.release_delay:
            _note(account, "free", held.pid, held.instance, held.bytes)
        else:
            kept.append(held)
    account.allocations = kept


def _note(
    account: Account,
    what: Literal["allocate", "resize", "refuse", "overlap", "release", "death", "free"],
    pid: int,
    instance: str,
    size: int,
) -> None:
    account.history.append(Happening(at=time.monotonic(), what=what, pid=pid, instance=instance, bytes=size))
    del account.history[:-HISTORY]
