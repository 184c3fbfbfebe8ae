"""The supervisor: what dies comes back, what is to end ends, and nothing outlives it that shouldn't."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from modelswap.cli.supervisor import Backoff, Service, Supervisor

DEADLINE = 30.0

SLEEPER = "import pathlib, os, signal, sys\npathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\nsignal.pause()\n"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEPER


async def until(condition: Callable[[], bool]) -> None:
    """Poll until ``condition`` holds; fails after the deadline."""
    async with asyncio.timeout(DEADLINE):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def wrote(path: Path) -> bool:
    """Return whether a child has written its PID there."""
    return path.exists() and path.read_text() != ""


@pytest.fixture
def said() -> list[str]:
    """Return the list of what the supervisor reported."""
    return []


@pytest.fixture
async def supervisor(said: list[str]) -> AsyncIterator[Supervisor]:
    """Yield a supervisor in use."""
    async with Supervisor(said.append) as supervisor:
        yield supervisor


def python(name: str, code: str, *args: str) -> Service:
    """Return a service that runs Python code."""
    return Service(name, (sys.executable, "-c", code, *args))


def test_backoff_grows_and_starts_afresh_after_a_settled_life() -> None:
    """A first death costs no wait, later ones more up to 5 s, and a service that lived a while starts over."""
    backoff = Backoff()
    assert [backoff.after(0.1) for _ in range(8)] == [0.0, 0.25, 0.5, 1.0, 2.0, 5.0, 5.0, 5.0]
    assert backoff.after(60.0) == 0.0
    assert backoff.after(0.1) == 0.25


async def test_a_killed_service_is_started_again(supervisor: Supervisor, said: list[str], tmp_path: Path) -> None:
    """A service that dies of a signal comes back with another PID, and the user is told."""
    file = tmp_path / "pid"
    supervisor.start(python("one", SLEEPER, str(file)))
    await until(lambda: wrote(file))
    before = supervisor.pids()["one"]
    os.kill(before, signal.SIGKILL)
    await until(lambda: supervisor.pids().get("one", before) != before)
    assert supervisor.restarts("one") == 1
    assert said == [f"one (pid {before}) was killed by signal 9; starting it again"]


async def test_a_program_that_can_not_be_started_is_told_and_tried_again(
    supervisor: Supervisor, said: list[str], tmp_path: Path
) -> None:
    """A missing program is reported in words and does not end the supervisor."""
    supervisor.start(Service("ghost", (str(tmp_path / "missing"),)))
    await until(lambda: len(said) >= 2)
    assert said[0] == "ghost could not be started: No such file or directory; starting it again"


async def test_a_service_that_rejects_its_configuration_is_not_started_again(
    supervisor: Supervisor, said: list[str]
) -> None:
    """Exit status 2 before anything worked means that a restart won't help."""
    supervisor.start(python("strict", "raise SystemExit(2)"))
    async with asyncio.timeout(DEADLINE):
        await supervisor.misconfigured.wait()
    assert said == []


async def test_once_proven_every_death_is_worth_a_restart(supervisor: Supervisor, said: list[str]) -> None:
    """A config file broken by a later edit doesn't take a running system down."""
    supervisor.proven()
    supervisor.start(python("strict", "raise SystemExit(2)"))
    await until(lambda: bool(said))
    assert said[0] == "strict exited with status 2; starting it again"
    assert not supervisor.misconfigured.is_set()


async def test_end_asks_first_and_kills_who_does_not_listen(supervisor: Supervisor, tmp_path: Path) -> None:
    """SIGTERM is enough for most; who ignores it is killed after the grace and named."""
    files = {name: tmp_path / name for name in ("polite", "stubborn")}
    supervisor.start(python("polite", SLEEPER, str(files["polite"])))
    supervisor.start(python("stubborn", STUBBORN, str(files["stubborn"])))
    await until(lambda: all(map(wrote, files.values())))
    assert await supervisor.end(["polite", "stubborn"], grace=0.2) == ["stubborn"]
    assert supervisor.pids() == {}
    assert supervisor.restarts("polite") == 0


async def test_leaving_it_kills_what_still_runs(said: list[str], tmp_path: Path) -> None:
    """No child survives the block, also when it is left by an error."""
    file = tmp_path / "pid"

    async def leave() -> None:
        async with Supervisor(said.append) as supervisor:
            supervisor.start(python("one", STUBBORN, str(file)))
            await until(lambda: wrote(file))
            raise RuntimeError("left")

    with pytest.raises(RuntimeError, match="left"):
        await leave()
    assert not psutil.pid_exists(int(file.read_text()))


async def test_cancelling_its_owner_kills_what_runs(said: list[str], tmp_path: Path) -> None:
    """A cancelled owner leaves no child either."""
    file = tmp_path / "pid"

    async def own() -> None:
        async with Supervisor(said.append) as supervisor:
            supervisor.start(python("one", SLEEPER, str(file)))
            await asyncio.Event().wait()

    owner = asyncio.create_task(own())
    await until(lambda: wrote(file))
    owner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await owner
    assert not psutil.pid_exists(int(file.read_text()))


async def test_services_do_not_hear_the_terminals_ctrl_c(supervisor: Supervisor, tmp_path: Path) -> None:
    """Children are in a process group of their own, so that a Ctrl-C reaches the supervisor alone."""
    file = tmp_path / "pid"
    supervisor.start(python("one", SLEEPER, str(file)))
    await until(lambda: wrote(file))
    pid = supervisor.pids()["one"]
    assert os.getpgid(pid) == pid != os.getpgid(0)


ORPHAN_MAKER = '''
import asyncio, subprocess, sys
from modelswap.cli.supervisor import Service, Supervisor
child = """import subprocess, sys
grandchild = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(grandchild.pid, flush=True)"""
async def main():
    async with Supervisor(lambda line: None) as supervisor:
        supervisor.proven()
        supervisor.start(Service("parent", (sys.executable, "-c", child)))
        await asyncio.Event().wait()
asyncio.run(main())
'''


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has subreapers")
def test_orphans_of_services_leave_no_zombies() -> None:
    """A grandchild whose parent has died is taken in by the supervisor and collected when it ends."""
    with subprocess.Popen([sys.executable, "-c", ORPHAN_MAKER], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            orphan = int(process.stdout.readline())
            psutil.wait_procs([psutil.Process(orphan)] if psutil.pid_exists(orphan) else [], DEADLINE)
            assert not psutil.pid_exists(orphan)
        finally:
            process.kill()


TIED = """
import signal, sys
from modelswap.cli.parent import tie_to_parent
tie_to_parent()
open(sys.argv[1], "w").write(str(__import__("os").getpid()))
while True: signal.pause()
"""
KEEPER = """
import asyncio, sys
from modelswap.cli.supervisor import Service, Supervisor
async def main():
    async with Supervisor(print) as supervisor:
        for name in ("a", "b"):
            supervisor.start(Service(name, (sys.executable, "-c", sys.argv[1], f"{sys.argv[2]}/{name}")))
        await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_services_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    """SIGKILL of the supervisor ends its services, which can't have been told by it."""
    keeper = await asyncio.create_subprocess_exec(sys.executable, "-c", KEEPER, TIED, str(tmp_path))
    try:
        await until(lambda: all(wrote(tmp_path / name) for name in ("a", "b")))
    finally:
        keeper.kill()
        await keeper.wait()
    pids = [int((tmp_path / name).read_text()) for name in ("a", "b")]
    await until(lambda: not any(_runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_service_whose_supervisor_is_already_gone_ends_at_once(tmp_path: Path) -> None:
    """A service that was born too late to be told ends by itself."""
    env = {**os.environ, "MODELSWAP_PARENT": "1999999999"}
    ended = subprocess.run([sys.executable, "-c", TIED, str(tmp_path / "pid")], env=env, timeout=DEADLINE, check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "pid").exists()
