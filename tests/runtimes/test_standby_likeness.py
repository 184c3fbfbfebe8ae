"""A server that waited is like one that was started cold: the real bootstrap, a package that passes for vLLM."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import structlog

from modelswap.engines.base import Address, Launch, StandbyPlan
from modelswap.engines.vllm import Vllm
from modelswap.runtimes.base import Exit, Running, StandbyState
from modelswap.spec.config import Model
from tests.engines import fake_vllm
from tests.runtimes.conftest import Host, process_host

MODULE = [sys.executable, "-m", fake_vllm.MODULE]


class Bench:
    """Starts one model cold, and from a process that waited."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.folder = folder
        self.script = str(fake_vllm.write_to(folder))
        self.address = Address("127.0.0.1", 0)

    def model(self, program: list[str], *args: str, **env: str) -> Model:
        """Return a model that ``program`` serves."""
        fields = {"program": program, "model": "org/one", "args": list(args), "cwd": str(self.folder)}
        env = {"PYTHONPATH": str(self.folder), **env}
        return Model.model_validate({"engine": "vllm", **fields, "env": env}, strict=False)

    def launch(self, model: Model) -> Launch:
        """Return how it is started."""
        return Vllm().launch("m", model, self.address)

    def plan(self, model: Model) -> StandbyPlan:
        """Return how one waits for it."""
        found = Vllm().standby(model, self.launch(model))
        assert found is not None
        return found

    async def settled(self, model: Model) -> StandbyState:
        """Have one wait for it; returns its state once it is ready or known not to be made."""
        await self.host.process_runtime.stand_by([self.plan(model)])
        found: list[StandbyState] = []

        async def settled() -> bool:
            found[:] = [one for one in self.host.process_runtime.standbys() if one.ready or one.problem]
            return bool(found)

        await self.host.until(settled)
        return found[0]

    async def start(self, model: Model, mechanism: str) -> Running:
        """Start it one way or the other."""
        standby = self.plan(model) if mechanism == "standby" else None
        if standby is not None:
            assert (await self.settled(model)).ready
        order = self.host.order(self.launch(model), self.address)
        running = await self.host.process_runtime.start(msgspec.structs.replace(order, standby=standby))
        assert running.mechanism == mechanism
        return running

    async def facts(self, running: Running) -> dict[str, Any]:
        """Return what it finds."""
        await self.host.says(running, "facts")
        found: dict[str, Any] = json.loads((self.folder / "facts.json").read_bytes())
        return found


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with process_host("procfs", tmp_path / "state") as host:
        made = Bench(host, tmp_path)
        made.address = await host.allocate()
        yield made
        await host.process_runtime.stand_by([])


@pytest.fixture
def hangup_ignored() -> Iterator[None]:
    """Ignore SIGHUP, as whoever is started with nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("program", ["module", "flags", "isolated", "script", "wrapped", "uv"])
async def test_a_server_finds_what_it_would_find_after_a_cold_start(
    bench: Bench, hangup_ignored: None, program: str
) -> None:
    """Arguments, environment, search path, descriptors, signals, limits, priorities, session, title and more."""
    programs = {
        "module": MODULE,
        "flags": [sys.executable, "-X", "utf8", "-W", "ignore", "-m", fake_vllm.MODULE],
        "isolated": [sys.executable, "-P", "-m", fake_vllm.MODULE],
        "script": [bench.script],
        "wrapped": ["env", "ADDED=1", bench.script],
        "uv": ["env", f"PATH={Path(bench.script).parent}:{Path(sys.executable).parent}:/usr/bin", "vllm"],
    }
    model = bench.model(programs[program], "--seed", "1", "--chat-template", "x" * 600)
    found = {}
    for mechanism in ("cold", "standby"):
        running = await bench.start(model, mechanism)
        found[mechanism] = await bench.facts(running)
        assert await bench.host.process_runtime.stop(running, 20.0) == Exit(-15)
    assert found["cold"]["instance"] is True
    assert ("ADDED" in found["cold"]["environ"]) is (program == "wrapped")
    assert found["standby"] == found["cold"]


@pytest.mark.parametrize("program", ["module", "script"])
@pytest.mark.parametrize("end", ["exit", "say", "raise", "signal", "return"])
async def test_a_server_ends_as_after_a_cold_start(bench: Bench, program: str, end: str) -> None:
    """Exit status, last words and what is done at exit are the same."""
    model = bench.model(MODULE if program == "module" else [bench.script], FAKE_END=end)
    found = []
    for mechanism in ("cold", "standby"):
        running = await bench.start(model, mechanism)
        ended = await bench.host.process_runtime.wait(running)
        lines = await bench.host.process_runtime.log_tail("some/model", 100, running.instance)
        found.append((ended, [line for line in lines if not line.startswith(("facts", "method", " "))]))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("env", "args", "method"),
    [
        ({}, (), "fork"),
        ({"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}, (), "spawn"),
        ({}, ("--numa-bind",), "spawn"),
    ],
)
async def test_processes_are_forked_unless_somebody_has_a_reason(
    bench: Bench, env: dict[str, str], args: tuple[str, ...], method: str
) -> None:
    """Also by modules that took vLLM's function by its name; what the user or vLLM wants otherwise holds."""
    running = await bench.start(bench.model(MODULE, *args, **env), "standby")
    assert await bench.host.says(running, "method") == [method]
    await bench.host.process_runtime.stop(running, 20.0)


@pytest.mark.parametrize(
    ("file", "text", "env", "reason"),
    [
        ("vllm/utils/system_utils.py", "", {}, "standby: vLLM's get_mp_context or _maybe_force_spawn is not where it"),
        ("vllm/utils/nothing.py", "", {"FAKE_CUDA": "1"}, "standby: an import initialised CUDA"),
        ("vllm/early.py", "raise RuntimeError('not for you')", {}, "RuntimeError: not for you"),
    ],
)
async def test_what_is_missing_is_said_and_costs_a_cold_start(
    bench: Bench, file: str, text: str, env: dict[str, str], reason: str
) -> None:
    """A vLLM that can't be held on standby says why, and the start is a cold one."""
    (bench.folder / file).write_text(text)
    state = await bench.settled(bench.model(MODULE, **env))
    assert state.problem.startswith(reason)


async def test_another_vllm_costs_a_cold_start(bench: Bench) -> None:
    """What was imported before an upgrade doesn't serve after it; the log says what has changed."""
    model = bench.model(MODULE)
    waits = await bench.settled(model)
    changed = bench.folder / "vllm" / "platforms" / "__init__.py"
    changed.write_text(changed.read_text() + "\n")
    order = bench.host.order(bench.launch(model), bench.address)
    with structlog.testing.capture_logs() as logs:
        running = await bench.host.process_runtime.start(msgspec.structs.replace(order, standby=bench.plan(model)))
    assert running.mechanism == "cold"
    assert [f"{changed} has been replaced since it was imported" in str(one.get("reason")) for one in logs] == [True]
    assert not psutil.pid_exists(waits.pid)
    await bench.host.process_runtime.stop(running, 20.0)


async def test_a_forked_process_does_not_hold_the_servers_port(bench: Bench) -> None:
    """As one that is not forked wouldn't: if the server dies before it, nobody connects in vain. Other sockets stay."""
    running = await bench.start(bench.model(MODULE, FAKE_END="fork"), "standby")
    assert await bench.host.says(running, "parent") == ["2"]
    assert await bench.host.says(running, "child") == ["1"]
    await bench.host.process_runtime.stop(running, 20.0)
