"""Processes that wait for their model: a stand-in script instead of vLLM's, real processes and sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil
import pytest

from modelswap.engines.base import Launch, StandbyPlan
from modelswap.runtimes.base import Exit, Running, StandbyState
from modelswap.runtimes.process import ProcessRuntime
from tests.runtimes.conftest import ENGINE, Host, process_host

WAITER = """
import json, os, socket, sys, time
path = sys.argv[2]
mode = os.environ.get("MODE", "")
if mode == "unfit":
    sys.exit("standby: this vLLM has no such thing")
if mode == "hang":
    print("standby: about to import", file=sys.stderr, flush=True)
    time.sleep(1000)
eaten = b"." * (50 << 20 if mode == "eat" else 0)
os.chdir(os.path.dirname(path))
listener = socket.socket(socket.AF_UNIX)
listener.bind(os.path.basename(path))
listener.listen()
while True:
    connection, _ = listener.accept()
    said = json.loads(connection.makefile("rb").readline())
    if said.get("ask"):
        connection.sendall(b'{"ready": true, "version": "1"}\\n')
        connection.close()
        continue
    if mode == "refuse":
        connection.sendall(b'{"error": "not today"}\\n')
        continue
    if mode == "vanish":
        os._exit(1)
    if mode == "slow":
        open("asked", "w").close()
        while not os.path.exists("go"):
            time.sleep(0.01)
    connection.sendall(b'{"taken": true}\\n')
    break
for name in said["unset"]:
    del os.environ[name]
os.environ.update(said["env"])
log = os.open(said["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.dup2(log, 1)
os.dup2(log, 2)
sys.argv = said["argv"][3:]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


class Bench:
    """A host whose runtime keeps stand-ins waiting."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.script = folder / "waiter.py"
        self.script.write_text(WAITER)

    @property
    def runtime(self) -> ProcessRuntime:
        """Return the runtime that is current."""
        return self.host.process_runtime

    def plan(self, mode: str = "", key: str = "k") -> StandbyPlan:
        """Return how a stand-in waits."""
        return StandbyPlan(key, (sys.executable, "-S", "-E"), self.script, {"MODE": mode})

    def state(self) -> StandbyState | None:
        """Return the first state there is."""
        states = self.runtime.standbys()
        return states[0] if states else None

    async def waiting(self, mode: str = "") -> StandbyState:
        """Have one wait, and return its state."""
        await self.runtime.stand_by([self.plan(mode)])

        async def ready() -> bool:
            state = self.state()
            return state is not None and state.ready

        await self.host.until(ready)
        state = self.state()
        assert state is not None
        return state

    async def start(self, behaviour: str, mode: str = "", argument: object = None) -> Running:
        """Start a stand-in engine in the one that waits."""
        address = await self.host.allocate()
        word = address.port if argument is None else argument
        launch = Launch((sys.executable, "-S", "-E", str(ENGINE), behaviour, str(word)), {"GREETING": "hello"})
        order = msgspec.structs.replace(self.host.order(launch, address), standby=self.plan(mode))
        return await self.runtime.start(order)


@pytest.fixture
async def bench(host: Host, tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(host, tmp_path)
    yield made
    await made.runtime.stand_by([])


async def test_a_start_spends_the_process_that_waits(bench: Bench) -> None:
    """The process that waited becomes the engine: same PID, the engine's arguments, environment and log."""
    state = await bench.waiting()
    running = await bench.start("facts")
    assert running.mechanism == "standby"
    assert running.pid == state.pid
    assert await bench.host.says(running, "GREETING") == ["hello"]
    assert await bench.host.says(running, "MODELSWAP_INSTANCE") == [running.instance]
    assert await bench.runtime.instances() == [running]
    assert bench.runtime.standbys() == []
    assert await bench.runtime.stop(running, 20.0) == Exit(-15)
    assert await bench.runtime.instances() == []


async def test_its_exit_status_and_children_are_an_engines(bench: Bench) -> None:
    """What a spent standby leaves and how it ended is known as of any engine."""
    await bench.waiting()
    running = await bench.start("exit", argument=7)
    assert await bench.runtime.wait(running) == Exit(7)
    await bench.waiting()
    running = await bench.start("child-stays")
    await bench.host.says(running, "ready")
    assert await bench.runtime.stop(running, 20.0) == Exit(-15)
    assert await bench.runtime.sweep(set()) == []


async def test_one_that_has_not_taken_its_order_is_no_engine(bench: Bench) -> None:
    """If we are killed while we give the order, the one after us doesn't take what may still wait for an engine."""
    await bench.waiting("slow")
    starting = asyncio.create_task(bench.start("listen", mode="slow"))
    [socket] = (bench.host.state_dir / "run" / "standby").glob("*.sock")

    async def asked() -> bool:
        return socket.with_name("asked").exists()

    await bench.host.until(asked)
    assert await bench.host.renew().instances() == []
    socket.with_name("go").touch()
    running = await starting
    assert running.mechanism == "standby"
    assert await bench.host.renew().instances() == [running]


async def test_the_next_orchestrator_knows_it_by_its_new_name(bench: Bench) -> None:
    """A runtime that comes later finds the instance, and ends a standby that still waits as a stray."""
    await bench.waiting()
    running = await bench.start("listen")
    await bench.host.says(running, "ready")
    waits = await bench.waiting()
    fresh = bench.host.renew()
    assert await fresh.instances() == [running]
    assert await fresh.listening(running)
    swept = await fresh.sweep({running.instance})
    assert [str(waits.pid) in word for word in swept] == [True]
    assert await fresh.instances() == [running]
    await fresh.stop(running, 20.0)


@pytest.mark.parametrize("mode", ["refuse", "vanish"])
async def test_a_standby_that_will_not_serve_costs_a_cold_start(bench: Bench, mode: str) -> None:
    """If the hand-over fails the start is cold, and nothing of the standby is left."""
    state = await bench.waiting(mode)
    running = await bench.start("obey", mode)
    assert running.mechanism == "cold"
    assert running.pid != state.pid
    await bench.host.says(running, "ready")
    assert await bench.runtime.instances() == [running]
    assert not psutil.pid_exists(state.pid)
    assert await bench.runtime.stop(running, 20.0) == Exit(-15)


async def test_without_one_that_is_ready_the_start_is_cold(bench: Bench) -> None:
    """A start waits for no standby."""
    running = await bench.start("obey")
    assert running.mechanism == "cold"
    await bench.runtime.stop(running, 0)


async def test_one_that_can_not_be_made_is_told_and_not_tried_at_once(bench: Bench) -> None:
    """The reason is its last line; it isn't made again and again."""

    async def failed() -> bool:
        state = bench.state()
        return state is not None and bool(state.problem)

    await bench.runtime.stand_by([bench.plan("unfit")])
    await bench.host.until(failed)
    assert bench.runtime.standbys() == [StandbyState(key="k", problem="standby: this vLLM has no such thing")]
    await bench.runtime.stand_by([])
    await bench.runtime.stand_by([bench.plan("unfit")])
    state = bench.state()
    assert state is not None
    assert state.pid == 0


async def test_what_nobody_wants_any_more_ends(bench: Bench) -> None:
    """Standbys for other plans are ended, and those that are killed from outside are noticed."""
    state = await bench.waiting()
    await bench.runtime.stand_by([])
    assert not psutil.pid_exists(state.pid)
    assert bench.runtime.standbys() == []
    state = await bench.waiting()
    os.kill(state.pid, signal.SIGKILL)

    async def noticed() -> bool:
        now = bench.state()
        return now is not None and bool(now.problem)

    await bench.host.until(noticed)
    await asyncio.sleep(0)
    running = await bench.start("obey")
    assert running.mechanism == "cold"
    await bench.runtime.stop(running, 0)


async def test_a_standbys_memory_is_counted(bench: Bench) -> None:
    """The host memory that it alone takes is told while it waits."""
    state = await bench.waiting()
    assert state.host_bytes > 1 << 20


async def test_the_memory_of_a_wrapped_one_is_counted(bench: Bench) -> None:
    """Where something else starts the process that waits, its memory is what counts."""
    wrapper = bench.script.with_name("wrapper.py")
    wrapper.write_text("import subprocess, sys\nsys.exit(subprocess.call(sys.argv[1:]))")
    plan = bench.plan("eat")
    python = (sys.executable, "-S", "-E")
    await bench.runtime.stand_by([msgspec.structs.replace(plan, python=(*python, str(wrapper), *python))])

    async def ready() -> bool:
        state = bench.state()
        return state is not None and state.ready

    await bench.host.until(ready)
    state = bench.state()
    assert state is not None and state.host_bytes > 50 << 20


async def test_one_that_hangs_is_given_up(tmp_path: Path) -> None:
    """One that isn't ready within its time is ended, with its last line as the reason, so that it can be made anew."""
    async with process_host("procfs", tmp_path / "state") as host:
        bench = Bench(host, tmp_path)
        runtime = ProcessRuntime(tmp_path / "state", 64 * 1024, standby_within=0.5)
        await runtime.stand_by([bench.plan("hang")])
        [state] = runtime.standbys()

        async def given_up() -> bool:
            return bool(runtime.standbys()[0].problem)

        await host.until(given_up)
        [problem] = [one.problem for one in runtime.standbys()]
        assert problem.startswith("it was not ready within 0.5 s")
        assert not psutil.pid_exists(state.pid)
