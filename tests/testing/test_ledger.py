from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from modelswap.testing.ledger import HISTORY, Account, Ledger, OutOfDeviceMemory
from modelswap.testing.liveness import born

ENDLESS = "import sys, signal; signal.alarm(900); print('up', flush=True); signal.pause()"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Return a device of 100 bytes."""
    return Ledger.create(tmp_path / "gpu.json", 100)


def _python(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True)


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _whats(account: Account) -> list[str]:
    return [happening.what for happening in account.history]


def test_what_is_allocated_is_held_until_it_is_released(ledger: Ledger) -> None:
    """Allocations lower what is free, are attributed to their process, and come back."""
    ledger.allocate(60, instance="a")
    account = ledger.read()
    assert (account.used, account.free, account.instances) == (60, 40, {"a"})
    assert [(held.pid, held.bytes) for held in account.allocations] == [(os.getpid(), 60)]
    ledger.release(instance="a")
    account = ledger.read()
    assert (account.used, account.peak, account.overlaps) == (0, 60, 0)
    assert _whats(account) == ["allocate", "release", "free"]
    assert all(isinstance(happening.at, float) for happening in account.history)


def test_an_allocation_that_does_not_fit_changes_nothing_and_is_remembered(ledger: Ledger) -> None:
    """The second engine gets an error with the figures, and the attempt stays in the books."""
    ledger.allocate(60, instance="a")
    with pytest.raises(OutOfDeviceMemory) as caught:
        ledger.allocate(60, instance="b")
    assert (caught.value.asked, caught.value.free, caught.value.capacity) == (60, 40, 100)
    account = ledger.read()
    assert (account.used, account.peak, account.overlaps, account.overcommits) == (60, 60, 1, 1)
    assert _whats(account) == ["allocate", "overlap", "refuse"]


def test_an_overlap_that_fits_is_counted_all_the_same(ledger: Ledger) -> None:
    """Two engines on one device are an overlap even if there is room for both."""
    ledger.allocate(10, instance="a")
    ledger.allocate(10, instance="b")
    assert (ledger.read().overlaps, ledger.read().overcommits) == (1, 0)


def test_a_sleepers_residue_and_a_foreign_holder_are_no_overlap(ledger: Ledger) -> None:
    """Only what working engines hold counts as overlapping."""
    ledger.allocate(60, instance="a")
    ledger.allocate(5, instance="a", residue=True)
    ledger.add_foreign(10)
    ledger.allocate(60, instance="b")
    account = ledger.read()
    assert (account.overlaps, account.used, account.instances) == (0, 75, {"b"})
    ledger.remove_foreign()
    assert ledger.read().used == 65


def test_an_allocation_resizes_what_the_instance_holds(ledger: Ledger) -> None:
    """Allocating again replaces the earlier size, and what it held before counts as free for it."""
    ledger.allocate(60, instance="a")
    ledger.allocate(90, instance="a")
    ledger.allocate(20, instance="a")
    account = ledger.read()
    assert (account.used, account.peak, account.overlaps) == (20, 90, 0)
    ledger.allocate(0, instance="a")
    assert ledger.read().allocations == []


def test_released_memory_comes_back_late_if_told_so(tmp_path: Path) -> None:
    """Memory on its way back is neither free nor another instance's business, until its delay has passed."""
    ledger = Ledger.create(tmp_path / "gpu.json", 100, release_delay=3600)
    ledger.allocate(60, instance="late")
    ledger.release(instance="late")
    assert ledger.read().free == 40
    with pytest.raises(OutOfDeviceMemory):
        ledger.allocate(60, instance="next")
    assert ledger.read().overlaps == 1
    ledger.delay_release(0.0, instance="late")
    assert ledger.read().free == 100


def test_shrinking_gives_the_difference_back_late_too(tmp_path: Path) -> None:
    """A sleeper's memory can come back as late as that of an ended process."""
    ledger = Ledger.create(tmp_path / "gpu.json", 100)
    ledger.allocate(60, instance="a", release_delay=3600)
    ledger.allocate(5, instance="a", residue=True, release_delay=0)
    assert ledger.read().free == 40
    ledger.delay_release(0.0, instance="a")
    assert ledger.read().free == 95


def test_whoever_looks_next_frees_what_a_dead_process_held(ledger: Ledger) -> None:
    """A killed process's memory is found and freed, even while it is a zombie."""
    process = _python(ENDLESS)
    _first_line(process)
    ledger.allocate(60, instance="a", pid=process.pid)
    assert ledger.read().used == 60
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while ledger.read().used and time.monotonic() < deadline:
        time.sleep(0.005)
    # Not reaped yet: its exit status is still to be had.
    assert process.returncode is None
    account = ledger.read()
    _end(process)
    assert account.used == 0
    assert _whats(account) == ["allocate", "death", "free"]


def test_a_pid_that_came_back_is_not_the_holder(ledger: Ledger) -> None:
    """A process is known by its number and creation time together."""
    ledger.allocate(60, instance="a")
    account = msgspec.json.decode(ledger.path.read_bytes(), type=Account)
    account.allocations[0].born -= 1
    ledger.path.write_bytes(msgspec.json.encode(account))
    assert ledger.read().used == 0


def test_a_process_that_has_ended_cannot_allocate(ledger: Ledger) -> None:
    """There is nobody to hold the memory."""
    process = _python("")
    process.communicate()
    assert born(process.pid) is None
    with pytest.raises(ProcessLookupError):
        ledger.allocate(1, instance="a", pid=process.pid)


def test_a_process_killed_with_the_lock_and_half_a_file_leaves_a_readable_one(ledger: Ledger) -> None:
    """Dying unlocks, and an unfinished draft never becomes the account."""
    ledger.allocate(60, instance="a")
    code = """
import fcntl, os, signal, sys
lock = open(sys.argv[1] + ".lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
open(sys.argv[1] + ".new", "w").write('{"capac')
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = _python(code, ledger.path)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert ledger.read().used == 60
    ledger.release(instance="a")
    assert ledger.read().used == 0


def test_processes_that_work_on_it_at_once_lose_no_update(ledger: Ledger) -> None:
    """Many processes allocating and releasing never exceed the capacity and leave nothing behind."""
    code = """
import sys
from modelswap.testing.ledger import Ledger, OutOfDeviceMemory
ledger, refused = Ledger(sys.argv[1]), 0
for turn in range(40):
    try:
        ledger.allocate(60, instance=sys.argv[2])
    except OutOfDeviceMemory:
        refused += 1
    else:
        ledger.release(instance=sys.argv[2])
print(refused)
"""
    processes = [_python(code, ledger.path, name) for name in "abc"]
    refused = sum(int(process.communicate()[0]) for process in processes)
    account = ledger.read()
    assert (account.used, account.peak, account.overcommits) == (0, 60, refused)


def test_history_is_bounded(ledger: Ledger) -> None:
    """An account doesn't grow for ever."""
    for _ in range(HISTORY):
        ledger.allocate(1, instance="a")
    assert len(ledger.read().history) == HISTORY


def test_without_proc_processes_are_told_apart_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc, zombies and ended processes count as ended, too."""
    monkeypatch.setattr("modelswap.testing.liveness._HAS_PROC", False)
    process = _python(ENDLESS)
    _first_line(process)
    alive = born(process.pid)
    assert alive is not None
    assert alive == born(process.pid)
    process.kill()
    deadline = time.monotonic() + 60
    while born(process.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert (born(process.pid), process.returncode) == (None, None)
    _end(process)
    assert born(process.pid) is None
