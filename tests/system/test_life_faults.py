"""Engines, services and files that misbehave, under a real ``modelswap up``: it goes on, and nothing is left over."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import sys
from pathlib import Path

import aiohttp
import pytest
import yaml

from modelswap.testing.engine.behaviour import Behaviour
from modelswap.testing.engine.options import Options
from tests.system.load import ask
from tests.system.stack import MODELS, Stack, until

pytestmark = pytest.mark.long


async def right(stack: Stack, model: str) -> bool:
    """Ask a model for an answer, and return whether it came as it should."""
    async with aiohttp.ClientSession() as http:
        return (await ask(http, stack.base_url, model, stream=False)).right


async def current(stack: Stack) -> str | None:
    """Return the current model."""
    found: str | None = (await stack.status())["current_model"]
    return found


async def test_an_engine_that_dies_idle_is_noticed_and_comes_back(tmp_path: Path) -> None:
    """Nobody asks for it meanwhile: the state says so at once, and the next request starts it again."""
    async with Stack(tmp_path) as stack:
        assert await right(stack, "mistral")
        (engine,) = stack.engines()
        engine.kill()

        async def gone() -> bool:
            return await current(stack) is None and not (await stack.status())["instances"]

        await until(gone, "its death is noticed")
        assert await right(stack, "mistral")
        assert await current(stack) == "mistral"
        stack.assert_never_overlapped()


@pytest.mark.parametrize(
    "behaviour",
    [Behaviour(ignore_sigterm=True), Behaviour(child="session")],
    ids=["deaf", "child with its own session"],
)
async def test_engines_that_do_not_end_properly_leave_nothing(tmp_path: Path, behaviour: Behaviour) -> None:
    """Swaps and the stop in the end take what ignores SIGTERM, and children that hold the memory elsewhere."""
    engine = Options(load_seconds=0.05, tokens=4, behaviour=behaviour)
    stack = Stack(tmp_path, engine=engine)
    config = yaml.safe_load(stack.config.read_text())
    for model in config["models"].values():
        model["stop_grace"] = 0.3
    stack.config.write_text(yaml.safe_dump(config))
    async with stack:
        for model in MODELS:
            assert await right(stack, model)
            mains = [engine for engine in stack.engines() if f"--model={model}" in engine.cmdline()]
            assert mains and len(mains) == len(stack.engines()), "what was put out has left nothing"
        assert await stack.stop() == 0
        assert stack.leftovers() == []
        assert stack.ledger.read().used == 0
        stack.assert_never_overlapped()


_TAKES_THE_PORT_ONCE = """
import os, pathlib, socket, subprocess, sys
once, port, *engine = sys.argv[1:]
if not pathlib.Path(once).exists():
    pathlib.Path(once).touch()
    other = socket.create_server(("127.0.0.1", int(port)))
    sys.exit(subprocess.run(engine).returncode)
os.execv(engine[0], engine)
"""


async def test_a_port_that_another_program_took_costs_no_request(tmp_path: Path) -> None:
    """The engine is started again at another port for the same waiters, and they get their answer."""
    stack = Stack(tmp_path)
    config = yaml.safe_load(stack.config.read_text())
    model = config["models"]["mistral"]
    model["command"] = [sys.executable, "-c", _TAKES_THE_PORT_ONCE, str(tmp_path / "once"), "{port}", *model["command"]]
    stack.config.write_text(yaml.safe_dump(config))
    async with stack:
        assert await right(stack, "mistral")
        swaps = (await stack.status())["last_swaps"]
        assert [swap["outcome"] for swap in swaps] == ["ok", "failed"], swaps
        assert "its port was taken" in swaps[1]["message"]


async def test_a_broken_database_costs_nothing_but_history(tmp_path: Path) -> None:
    """It is put aside, and requests are served."""
    stack = Stack(tmp_path)
    stack.state_dir.mkdir()
    (stack.state_dir / "modelswap.db").write_bytes(b"no database at all" * 1000)
    async with stack:
        assert await right(stack, "mistral")
        assert (await stack.status())["warnings"] == []
        assert list(stack.state_dir.glob("modelswap.db.broken-*"))


async def test_a_killed_stack_is_waited_for_once(tmp_path: Path) -> None:
    """`up` is killed with its services: the next one adopts the engine, and forgets the gateways that died."""
    async with Stack(tmp_path) as stack:
        assert await right(stack, "mistral")
        (engine,) = stack.engines()
        assert stack.up is not None
        stack.up.kill()
        stack.up.wait()
        await until(lambda: not stack.gateways() and not stack.orchestrators(), "its services end")
        await stack.start()
        assert await right(stack, "mistral")
        assert [one.pid for one in stack.engines()] == [engine.pid]

        def journalled() -> list[str]:
            path = f"file:{stack.state_dir / 'modelswap.db'}?mode=ro"
            with contextlib.closing(sqlite3.connect(path, uri=True)) as db:
                return [row[0] for row in db.execute("select gateway from gateways")]

        await until(lambda: len(journalled()) == 1, "the gateways before are forgotten after a term")


async def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    """The first waits for the running stream, the second doesn't: its client is told, nothing is left."""
    async with Stack(tmp_path) as stack, aiohttp.ClientSession() as http:
        assert stack.up is not None
        asking = asyncio.create_task(
            ask(http, stack.base_url, "mistral", stream=True, sim={"tokens": 10_000, "tokens_per_second": 20})
        )

        async def runs() -> bool:
            return any(model["in_flight"] for model in (await stack.status())["models"])

        await until(runs, "the stream runs")
        stack.up.send_signal(signal.SIGTERM)
        await until(lambda: "draining 1 request of mistral" in stack.log.read_text(), "it says what it waits for")
        assert not asking.done()
        stack.up.send_signal(signal.SIGTERM)
        await asyncio.to_thread(stack.up.wait, 30)
        outcome = await asking
        assert outcome.first_byte and not outcome.complete
        assert stack.leftovers() == []


async def test_up_says_who_has_its_port(tmp_path: Path) -> None:
    """A second `up` on the same file ends with a reason and a remedy, and the first doesn't notice."""
    async with Stack(tmp_path) as stack:
        assert stack.up is not None
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "modelswap.cli.main", "up", "--config", str(stack.config)),
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await second.communicate()
        assert second.returncode == 1
        assert f"port {stack.gateway_port} is taken by a running modelswap (pid {stack.up.pid})" in said.decode()
        assert await right(stack, "mistral")
