"""``modelswap up`` with real services and simulated engines: starting, stopping, and what survives a kill."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.ports import free_port

pytestmark = pytest.mark.long

DEADLINE = 60.0

CONFIG = """
models:
  alpha: {{engine: custom, command: {command}, args: [--model, alpha], concurrency: 4, stop_grace: 2}}
  beta: {{engine: custom, command: {command}, args: [--model, beta], concurrency: 4, stop_grace: 2}}
gateway: {{port: {gateway}, workers: 2}}
orchestrator: {{port: {orchestrator}, state_dir: {state}, term: 2}}
scheduling: {{linger: 0.1, drain_timeout: 30}}
device: {{kind: slot}}
"""


@dataclass(slots=True)
class Up:
    """A running ``modelswap up``."""

    process: asyncio.subprocess.Process
    gateway: str
    orchestrator: str
    http: aiohttp.ClientSession
    lines: list[str]

    async def status(self) -> dict[str, Any]:
        """Return ``GET /status``, empty while nobody answers."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self.http.get(f"{self.orchestrator}/status") as answer:
                return dict(await answer.json())
        return {}

    async def reports(self, condition: Callable[[dict[str, Any]], object]) -> None:
        """Return when ``condition`` holds of its status."""
        async with asyncio.timeout(DEADLINE):
            while True:
                if condition(await self.status()):
                    return
                await asyncio.sleep(0.05)

    async def ask(self, model: str, tokens: int = 4) -> str:
        """Return the model's streamed answer."""
        body = {
            "model": model,
            "stream": True,
            "max_tokens": tokens,
            "messages": [{"role": "user", "content": "Hi"}],
        }
        async with self.http.post(f"{self.gateway}/v1/chat/completions", json=body) as answer:
            text = await answer.text()
            assert answer.status == 200, text
            return text

    async def said(self, text: str) -> None:
        """Return when it has said ``text``."""
        await until(lambda: any(text in line for line in self.lines))

    def services(self) -> list[psutil.Process]:
        """Return the service processes that run now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [
                child
                for child in psutil.Process(self.process.pid).children()
                if "modelswap.cli.main" in _cmdline(child)
            ]
        return []


def _cmdline(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def alive(process: psutil.Process) -> bool:
    """Return whether it runs; a zombie doesn't."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


async def until(condition: Callable[[], bool]) -> None:
    """Poll until ``condition`` holds; fails after the deadline."""
    async with asyncio.timeout(DEADLINE):
        while True:
            if condition():
                return
            await asyncio.sleep(0.02)


def busy(status: dict[str, Any]) -> bool:
    """Return whether any request runs."""
    return any(model["in_flight"] for model in status.get("models", []))


def engines(state: Path) -> list[int]:
    """Return the PIDs of live engines that belong to this state folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("MODELSWAP_STATE") == str(state.resolve())
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


class Place:
    """A config file with ports and a state folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.gateway = free_port()
        self.orchestrator = free_port()
        self.config = folder / "modelswap.yaml"
        engine = [sys.executable, "-m", "modelswap.testing.engine", "--port", "{port}", "--tokens-per-second", "20"]
        engine += ["--tokens", "100000"]
        self.config.write_text(
            CONFIG.format(
                command=json.dumps(engine), gateway=self.gateway, orchestrator=self.orchestrator, state=self.state
            )
        )

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[Up]:
        """Start ``modelswap up``, yield it when it is up, and leave nothing behind."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "modelswap.cli.main", "up", "--config", str(self.config)),
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        stderr = process.stderr
        lines: list[str] = []

        async def read() -> None:
            while line := await stderr.readline():
                lines.append(line.decode())

        reading = asyncio.create_task(read())
        urls = f"http://127.0.0.1:{self.gateway}", f"http://127.0.0.1:{self.orchestrator}"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE)) as http:
            up = Up(process, *urls, http, lines)
            try:
                await up.said("is up")
                yield up
            finally:
                services = up.services()
                if process.returncode is None:
                    process.kill()
                    await process.wait()
                for left in services:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        left.kill()
                await reading

    def kill_engines(self) -> None:
        """Leave no engine behind."""
        for pid in engines(self.state):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    """Yield a place to run in."""
    place = Place(tmp_path)
    try:
        yield place
    finally:
        place.kill_engines()


async def test_ctrl_c_lets_requests_finish_and_stops_everything(place: Place) -> None:
    """The running request gets its whole answer, then no service and no engine is left, and the status is 0."""
    async with place.up() as up:
        await up.ask("alpha", 1)
        running = asyncio.create_task(up.ask("alpha", 60))
        await up.reports(busy)
        up.process.send_signal(signal.SIGINT)
        await up.said("draining 1 request of alpha; press Ctrl-C again to stop at once")
        answer = await running
        assert answer.endswith("data: [DONE]\n\n"), "".join(up.lines)
        assert await up.process.wait() == 0
    assert engines(place.state) == []


async def test_a_second_signal_stops_at_once(place: Place) -> None:
    """Nobody has to wait for a long answer: it is cut, and everything is gone; the status says so."""
    async with place.up() as up:
        await up.ask("alpha", 1)
        running = asyncio.create_task(up.ask("alpha", 100_000))
        await up.reports(busy)
        up.process.send_signal(signal.SIGTERM)
        await up.said("draining 1 request")
        up.process.send_signal(signal.SIGTERM)
        assert await up.process.wait() == 130
        with contextlib.suppress(aiohttp.ClientError):
            assert "[DONE]" not in await running
    assert engines(place.state) == []


async def test_dead_services_come_back_and_the_engine_stays(place: Place) -> None:
    """After SIGKILL of orchestrator and gateway workers, requests are answered by the engine that ran all along."""
    async with place.up() as up:
        await up.ask("alpha")
        before = engines(place.state)
        assert len(before) == 1
        killed = up.services()
        assert len(killed) == 3
        for service in killed:
            service.kill()
        await until(lambda: len(up.services()) == 3 and not {s.pid for s in up.services()} & {k.pid for k in killed})
        await up.reports(lambda found: found.get("current_model"))
        assert "[DONE]" in await _answered(up, "alpha")
        assert engines(place.state) == before
        up.process.send_signal(signal.SIGTERM)
        assert await up.process.wait() == 0


async def _answered(up: Up, model: str) -> str:
    """Ask until the gateway is there to be asked."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                return await up.ask(model)
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)


async def test_a_killed_up_leaves_the_engine_to_the_next_one(place: Place) -> None:
    """SIGKILL of ``up`` ends its services; the next ``up`` takes the running engine over."""
    async with place.up() as up:
        await up.ask("alpha")
        before = engines(place.state)
        services = up.services()
        up.process.kill()
        await up.process.wait()
        await until(lambda: not any(map(alive, services)))
        assert engines(place.state) == before
    async with place.up() as up:
        await up.ask("alpha")
        assert engines(place.state) == before
        await up.ask("beta")
        assert len(engines(place.state)) == 1
        up.process.send_signal(signal.SIGTERM)
        assert await up.process.wait() == 0
    assert engines(place.state) == []


async def test_sighup_reads_the_config_again(place: Place) -> None:
    """A model added to the file is known after SIGHUP, and the running engine is untouched."""
    async with place.up() as up:
        await up.ask("alpha")
        before = engines(place.state)
        place.config.write_text(place.config.read_text().replace("  beta:", "  gamma:"))
        up.process.send_signal(signal.SIGHUP)
        await up.reports(lambda found: "gamma" in [model["name"] for model in found.get("models", [])])
        assert engines(place.state) == before
        up.process.send_signal(signal.SIGTERM)
        assert await up.process.wait() == 0


async def test_a_second_up_is_told_of_the_first(place: Place) -> None:
    """The ports are taken by a running modelswap, which is named by its PID; the exit code is 1."""
    async with place.up() as up:
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "modelswap.cli.main", "up", "--config", str(place.config)),
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await second.communicate()
        assert second.returncode == 1
        assert f"taken by a running modelswap (pid {up.process.pid})" in said.decode()
        up.process.send_signal(signal.SIGTERM)
        assert await up.process.wait() == 0


TERMINAL = "import pty, sys; pty.spawn(sys.argv[1:])"


async def test_closing_the_terminal_stops_everything(place: Place) -> None:
    """A hang-up of the terminal is a wish to stop, not to reload, and nothing is left of services and engines."""
    command = (sys.executable, "-m", "modelswap.cli.main", "up", "--config", str(place.config))
    terminal = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", TERMINAL, *command), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert terminal.stdout is not None
        async with asyncio.timeout(DEADLINE):
            while b"is up" not in await terminal.stdout.readline():
                pass
        (up,) = psutil.Process(terminal.pid).children()
        services = up.children()
        assert len(services) == 3
        async with aiohttp.ClientSession() as http:
            urls = f"http://127.0.0.1:{place.gateway}", f"http://127.0.0.1:{place.orchestrator}"
            await Up(terminal, *urls, http, []).ask("alpha")
        assert len(engines(place.state)) == 1
    finally:
        terminal.kill()
        await terminal.wait()
    await until(lambda: not any(map(alive, [up, *services])))
    assert engines(place.state) == []
