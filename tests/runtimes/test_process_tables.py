"""Processes as the system shows them: births, ids, handles."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from signal import Signals

import msgspec
import psutil
import pytest

from modelswap.engines.base import Address, Launch
from modelswap.runtimes import procfs
from modelswap.runtimes.base import Exit, StartOrder
from modelswap.runtimes.portable import PsutilTable
from modelswap.runtimes.process import ProcessRuntime
from modelswap.runtimes.processes import Ids, ProcessTable, system_table
from modelswap.runtimes.procfs import ProcfsTable
from modelswap.spec.config import Model

SPEC = Model(engine="custom", command=["stand-in"])
SOMEWHERE = Address("127.0.0.1", 1)


def _order(launch: Launch) -> StartOrder:
    return StartOrder(
        spec=Model(engine="custom", command=["stand-in"]),
        instance="one",
        model="some/model",
        definition="digest",
        launch=launch,
        address=SOMEWHERE,
    )


async def test_births_outlast_a_change_of_the_clock(tmp_path: Path) -> None:
    """A process is the same one for a runtime that started after the machine's clock was set."""
    runtime = ProcessRuntime(tmp_path, 1024)
    known = procfs.boot(tmp_path)
    # The kernel would now say another boot time than the one written down.
    shifted = msgspec.structs.replace(known, seconds=known.seconds - 5000)
    (tmp_path / "boot.json").write_bytes(msgspec.json.encode(shifted))
    early = ProcessRuntime(tmp_path, 1024)
    running = await early.start(_order(Launch((sys.executable, "-S", "-c", "import time; time.sleep(1000)"), {})))
    assert await ProcessRuntime(tmp_path, 1024).instances() == [running]
    assert await runtime.wait(running) == Exit(None)
    assert await early.stop(running, 0) == Exit(-9, killed=True)


def test_another_boot_is_noticed(tmp_path: Path) -> None:
    """What was written down in an earlier boot, or is garbage, is replaced."""
    known = procfs.boot(tmp_path)
    for stale in (msgspec.json.encode(msgspec.structs.replace(known, id="earlier", seconds=1)), b"garbage"):
        (tmp_path / "boot.json").write_bytes(stale)
        assert abs(procfs.boot(tmp_path).seconds - known.seconds) <= 1
        assert procfs.boot(tmp_path) == procfs.boot(tmp_path)


@pytest.mark.parametrize("make", [ProcfsTable, lambda _: PsutilTable()], ids=["procfs", "psutil"])
async def test_a_table_looks_past_processes_that_are_gone(
    tmp_path: Path, make: Callable[[Path], ProcessTable], stranger: subprocess.Popen[bytes]
) -> None:
    """Asking for a process that has gone, also while one looks, returns nothing and raises nothing."""
    table = make(tmp_path)
    born = table.born(stranger.pid)
    held = table.open(stranger.pid, born)
    assert held is not None and not held.ended()
    stranger.kill()
    await held.wait()
    assert table.environ(stranger.pid) is None
    stranger.wait()
    held.signal(Signals.SIGTERM)
    assert held.ended()
    held.close()
    assert table.open(stranger.pid) is None
    assert table.open(stranger.pid, born) is None
    assert table.born(stranger.pid) is None
    assert table.environ(stranger.pid) is None
    assert not table.listens(SOMEWHERE, stranger.pid, list)
    assert str(stranger.pid) in table.describe(stranger.pid)


async def test_a_process_that_may_not_be_signalled_is_told(
    tmp_path: Path, stranger: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What psutil calls denied access is a `PermissionError`, as with pidfds."""

    def refuse(one: psutil.Process, number: int) -> None:
        raise psutil.AccessDenied(one.pid)

    handle = PsutilTable().open(stranger.pid)
    assert handle is not None
    monkeypatch.setattr(psutil.Process, "send_signal", refuse)
    with pytest.raises(PermissionError):
        handle.signal(Signals.SIGTERM)


def test_other_systems_have_psutils_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``/proc``, processes are looked at through psutil."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert isinstance(system_table(tmp_path), PsutilTable)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MODELSWAP_INSTANCE": "one", "MODELSWAP_STATE": "/state"},
        {"MODELSWAP_INSTANCE": "one", "MODELSWAP_STATE": "/state", "MODELSWAP_ADDRESS": "127.0.0.1:http"},
        {"MODELSWAP_STATE": "/state", "MODELSWAP_ADDRESS": "127.0.0.1:1"},
    ],
)
def test_ids_that_are_not_whole_are_none(environ: dict[str, str]) -> None:
    """A process that carries only part of our variables is not taken for ours."""
    assert Ids.of_environ(environ) is None


@pytest.mark.parametrize("host_name", ["127.0.0.1", "::1"])
def test_ids_come_back_as_they_went_out(host_name: str) -> None:
    """What an instance carries says all that must be known to take it over."""
    ids = Ids("one", "some/model", "digest", Address(host_name, 1234), "/state")
    assert Ids.of_environ(ids.variables()) == ids
