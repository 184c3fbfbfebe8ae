"""What the process runtime promises beyond the contract of `Runtime`."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING

import msgspec
import psutil
import pytest
import uvloop

from modelswap.engines.base import Address, Launch
from modelswap.runtimes import process
from modelswap.runtimes.base import Exit, Running, StartOrder, Unkillable
from modelswap.runtimes.portable import PsutilTable
from modelswap.runtimes.process import ProcessRuntime
from modelswap.runtimes.procfs import PidfdHandle, ProcfsTable
from modelswap.spec.config import Model

if TYPE_CHECKING:
    from tests.runtimes.conftest import Host

GRACE = 20.0
HERE = Path(__file__).parent
SPEC = Model(engine="custom", command=["stand-in"])
SOMEWHERE = Address("127.0.0.1", 1)


def _order(launch: Launch) -> StartOrder:
    return StartOrder(
        instance="one", model="some/model", definition="digest", spec=SPEC, launch=launch, address=SOMEWHERE
    )


def _nothing(table: object, pid: int) -> None:
    pass


async def test_an_engine_is_on_its_own(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An engine leads its session, has three descriptors, our environment and its own, its folder, and no secret."""
    monkeypatch.setenv("MODELSWAP_TOKEN", "secret")
    with (tmp_path / "inheritable").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        launch = msgspec.structs.replace(host.launch("facts", env={"GREETING": "hello"}), cwd=str(tmp_path))
        order = host.order(launch, await host.allocate())
        running = await host.runtime.start(order)
    await host.says(running, "ready")
    lines = await host.runtime.log_tail(running.model, 100)
    assert lines == [
        "session True",
        "descriptors [0, 1, 2]",
        "stdin /dev/null",
        f"folder {tmp_path}",
        "GREETING hello",
        "MODELSWAP_TOKEN None",
        f"MODELSWAP_INSTANCE {order.instance}",
        f"MODELSWAP_ADDRESS {order.address.host}:{order.address.port}",
        "SPT_NOENV 1",
        "sighup True",
        "ready",
    ]


@pytest.mark.parametrize("behaviour", ["obey", "child-stays"])
async def test_an_engine_survives_its_starter(host: Host, behaviour: str) -> None:
    """An engine whose starter was killed right after the start lives on, is found, waited for and stopped."""
    starter = await asyncio.create_subprocess_exec(
        sys.executable, HERE / "starter.py", host.state_dir, "abandoned", HERE / "engine_script.py", behaviour
    )
    assert await starter.wait() == -9
    [found] = await host.runtime.instances()
    assert (found.instance, found.model, found.definition) == ("abandoned", "some/model", "digest")
    await host.says(found, "ready")
    waiting = asyncio.create_task(host.runtime.wait(found))
    await asyncio.sleep(0)
    assert await host.runtime.stop(found, GRACE) == Exit(None)
    assert await waiting == Exit(None)
    assert await host.process_runtime.sweep(set()) == []


async def test_a_reused_pid_is_not_touched(host: Host, stranger: subprocess.Popen[bytes]) -> None:
    """A process that has an instance's PID but another birth counts as ended, and is never signalled."""
    born = psutil.Process(stranger.pid).create_time()
    gone = Running(instance="gone", model="m", definition="d", address=SOMEWHERE, pid=stranger.pid, born=born - 1000)
    assert await host.runtime.wait(gone) == Exit(None)
    again = msgspec.structs.replace(gone, instance="gone-too")
    assert await host.runtime.stop(again, 0) == Exit(None)
    assert not await host.runtime.listening(gone)
    assert stranger.poll() is None


async def test_strangers_are_not_swept(host: Host, stranger: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """Neither a process without our ids nor an instance of another state directory is listed or swept."""
    other = ProcessRuntime(tmp_path / "other", 1024)
    order = host.order(host.launch("obey"), SOMEWHERE)
    running = await other.start(order)
    try:
        assert await host.runtime.instances() == []
        assert await host.process_runtime.sweep(set()) == []
        assert await other.instances() == [running]
        assert stranger.poll() is None
    finally:
        await other.stop(running, 0)


async def test_sweep_kills_all_but_what_is_kept(host: Host) -> None:
    """Sweeping spares the instances it is told to keep, kills the others, and says what they were."""
    kept = await host.start("obey")
    stray = await host.start("child-stays")
    await host.says(stray, "ready")
    swept = await host.process_runtime.sweep({kept.instance})
    assert len(swept) == 2
    assert all(stray.instance in line for line in swept)
    assert await host.runtime.instances() == [kept]
    assert await host.runtime.wait(stray) == Exit(-9, killed=True)


async def test_an_orphan_is_no_instance_but_is_stopped(host: Host) -> None:
    """A child that outlives its engine is not taken for the engine; stopping that ends the child, too."""
    running = await host.start("orphan")
    await host.says(running, "ready")
    assert await host.runtime.wait(running) == Exit(0)
    fresh = host.renew()
    assert await fresh.instances() == []
    [child] = await host.says(running, "child")
    assert psutil.pid_exists(int(child))
    assert await host.runtime.stop(running, GRACE) == Exit(0)
    assert await fresh.sweep(set()) == []


async def test_an_orphan_is_stopped_by_who_did_not_start_it(host: Host) -> None:
    """A runtime that knows an instance only from the journal ends what its dead main process left."""
    running = await host.start("orphan")
    await host.says(running, "ready")
    await host.runtime.wait(running)
    await host.renew().stop(running, GRACE)
    assert await host.process_runtime.sweep(set()) == []


async def test_a_bare_orphan_is_stopped(host: Host) -> None:
    """A child without any environment that outlives its engine in the same session is remembered and ended."""
    running = await host.start("bare-child", 4)
    assert await host.runtime.wait(running) == Exit(4)
    await host.says(running, "ready")
    [child] = await host.says(running, "child")
    orphan = psutil.Process(int(child))
    assert await host.runtime.stop(running, GRACE) == Exit(4)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


async def test_a_frozen_engine_can_end(host: Host) -> None:
    """An engine that was stopped with SIGSTOP is continued, so that it can obey SIGTERM."""
    running = await host.start("obey")
    await host.says(running, "ready")
    os.kill(running.pid, Signals.SIGSTOP)
    assert await host.runtime.stop(running, GRACE) == Exit(-15)


async def test_old_exits_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of long-gone instances nothing is kept, and asking for them is still no error."""
    monkeypatch.setattr(process, "_REMEMBERED_EXITS", 1)
    runtime = ProcessRuntime(tmp_path, 1024)
    launch = Launch((sys.executable, "-S", "-c", "raise SystemExit(2)"), {})
    old, new = [
        await runtime.start(msgspec.structs.replace(_order(launch), instance=instance)) for instance in ("old", "new")
    ]
    assert [await runtime.wait(one) for one in (old, new)] == [Exit(2), Exit(2)]
    assert [await runtime.wait(one) for one in (new, old)] == [Exit(2), Exit(None)]


async def test_an_orphan_is_swept(host: Host) -> None:
    """A child that outlives its engine is a stray for whoever comes next."""
    running = await host.start("orphan")
    await host.says(running, "ready")
    await host.runtime.wait(running)
    [swept] = await host.renew().sweep(set())
    assert running.instance in swept


async def test_without_a_record_the_oldest_process_is_the_instance(host: Host) -> None:
    """If we died before the start was written down, the engine is still told from its child."""
    running = await host.start("child-stays")
    await host.says(running, "ready")
    for record in (host.state_dir / "run").iterdir():
        record.unlink()
    assert await host.renew().instances() == [running]


async def test_a_cancelled_start_leaves_nothing(host: Host) -> None:
    """A start that is cancelled after the spawn ends what it started."""
    address = await host.allocate()
    before = set(psutil.Process().children())
    starting = asyncio.create_task(host.runtime.start(host.order(host.launch("obey"), address)))
    await asyncio.sleep(0)
    assert len(set(psutil.Process().children()) - before) == 1
    starting.cancel()
    await asyncio.wait([starting])
    assert starting.cancelled()

    async def gone() -> bool:
        return not (await host.runtime.instances() or set(psutil.Process().children()) - before)

    await host.until(gone)


@pytest.mark.parametrize("end", ["stop", "sweep"])
async def test_an_engine_that_hides_its_environment_is_known_by_its_record(
    host: Host, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """An engine that writes over what others see of its environment is still found and ended."""
    running = await host.start("child-stays")
    await host.says(running, "ready")
    monkeypatch.setattr(ProcfsTable, "environ", _nothing)
    monkeypatch.setattr(PsutilTable, "environ", _nothing)
    assert await host.renew().instances() == [running]
    if end == "stop":
        await host.runtime.stop(running, 0)
    else:
        assert len(await host.process_runtime.sweep(set())) == 1
    assert await host.runtime.wait(running) == Exit(-9, killed=True)
    monkeypatch.undo()
    # The child in a session of its own can't be told from a stranger until its environment can be read.
    assert len(await host.process_runtime.sweep(set())) == 1


async def test_instances_nobody_waited_for_are_collected(host: Host) -> None:
    """An engine that ended unobserved leaves no zombie once instances were listed."""
    running = await host.start("exit", 3)
    await asyncio.to_thread(os.waitid, os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)
    assert await host.runtime.instances() == []
    assert not psutil.pid_exists(running.pid)
    assert await host.runtime.wait(running) == Exit(3)


async def test_it_lives_beside_asyncios_children(host: Host) -> None:
    """Neither side collects the other's children."""
    theirs = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", "raise SystemExit(5)")
    ours = await host.start("exit", 6)
    assert (await theirs.wait(), await host.runtime.wait(ours)) == (5, Exit(6))


def test_it_works_on_uvloop(tmp_path: Path) -> None:
    """Waiting, stopping and collecting work on uvloop as well, beside its own children."""

    async def scenario() -> tuple[int, Exit, Exit]:
        runtime = ProcessRuntime(tmp_path, 1024)
        script = HERE / "engine_script.py"
        launch = Launch((sys.executable, "-S", "-E", str(script), "obey"), {})
        theirs = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", "raise SystemExit(5)")
        running = await runtime.start(_order(launch))
        waiting = asyncio.create_task(runtime.wait(running))
        stopped = await runtime.stop(running, GRACE)
        return await theirs.wait(), stopped, await waiting

    assert uvloop.run(scenario()) == (5, Exit(-15), Exit(-15))


async def test_without_pidfds_processes_are_polled(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel refuses pidfds, everything works by polling."""

    def refuse(pid: int, flags: int = 0) -> int:
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    running = await host.start("child-stays")
    await host.says(running, "ready")
    assert await host.runtime.stop(running, GRACE) == Exit(-15)


async def test_what_survives_sigkill_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that SIGKILL doesn't end within the time limit raises `Unkillable` with its name and PID."""
    runtime = ProcessRuntime(tmp_path, 1024, kill_timeout=0.1)
    launch = Launch((sys.executable, "-S", "-E", str(HERE / "engine_script.py"), "obey"), {})
    running = await runtime.start(_order(launch))

    def swallow(handle: PidfdHandle, number: Signals) -> None:
        pass

    with monkeypatch.context() as patch:
        patch.setattr(PidfdHandle, "signal", swallow)
        with pytest.raises(Unkillable, match=rf"python.*\(pid {running.pid}\).* survived SIGKILL"):
            await runtime.stop(running, 0)
        with pytest.raises(Unkillable):
            await runtime.sweep(set())
    assert await runtime.stop(running, 0) == Exit(-9, killed=True)


async def test_a_stranger_that_listens_is_not_the_instance(host: Host) -> None:
    """A port that someone else holds doesn't count as the instance's."""
    address = await host.allocate()
    with socket.create_server((address.host, address.port)):
        running = await host.runtime.start(host.order(host.launch("obey"), address))
        await host.says(running, "ready")
        assert not await host.runtime.listening(running)


async def test_addresses_are_loopback_and_differ(host: Host) -> None:
    """Addresses are on loopback, and not the same twice in a row."""
    addresses = [await host.allocate() for _ in range(20)]
    assert len(set(addresses)) == 20
    assert {address.host for address in addresses} == {"127.0.0.1"}
