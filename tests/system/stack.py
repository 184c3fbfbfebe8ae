"""The whole system as a user runs it: ``modelswap up`` in processes of its own, on simulated engines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil
import yaml

from modelswap.testing.engine.options import Options, command
from modelswap.testing.ledger import Ledger
from tests.ports import free_port

MODELS: Final = ("mistral", "coder", "llava")
GIB: Final = 1 << 30
DEADLINE: Final = 60.0


async def until(true: Callable[[], bool | Awaitable[bool]], what: str, seconds: float = DEADLINE) -> None:
    """Wait until a condition holds; fails the test if it doesn't in time."""
    deadline = time.monotonic() + seconds
    while True:
        answer = true()
        if not isinstance(answer, bool):
            answer = await answer
        if answer:
            return
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.02)


def _environment() -> dict[str, str]:
    """Return our environment; coverage stays out of it, since it would cost each engine more than its start."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    return {**kept, "NO_COLOR": "1"}


class Stack:
    """One ``modelswap up``; by default with three models that share a simulated GPU, each of which fills it."""

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 1,
        engine: Options | None = None,
        models: dict[str, Any] | None = None,
        **sections: Any,
    ) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.gateway_port = free_port()
        self.orchestrator_port = free_port()
        self.ledger = Ledger.create(folder / "gpu.json", 8 * GIB)
        base = engine if engine is not None else Options(load_seconds=0.05, tokens=4)
        config: dict[str, Any] = {
            "models": {
                name: {
                    "engine": "custom",
                    "command": command(self._options(base, name), host="{host}", port="{port}"),
                    "concurrency": 4,
                    "aliases": [f"{name}-alias"],
                }
                for name in MODELS
            },
            "gateway": {"port": self.gateway_port, "workers": workers},
            "orchestrator": {"port": self.orchestrator_port, "state_dir": str(self.state_dir), "term": 2.0},
            # Lingering is for people and agents; here it would only make the tests slow.
            "scheduling": {"linger": 0.1, "min_residency": 0.1},
            "device": {"kind": "simulated", "ledger": str(folder / "gpu.json")},
        }
        if models is not None:  # real ones, on whatever device there is
            config["models"] = models
            config["device"] = {"kind": "auto"}
        for section, values in sections.items():
            config.setdefault(section, {}).update(values)
        self.config = folder / "modelswap.yaml"
        self.config.write_text(yaml.safe_dump(config))
        self.log = folder / "up.log"
        self.up: subprocess.Popen[bytes] | None = None

    def _options(self, base: Options, name: str) -> Options:
        return msgspec.structs.replace(
            base, model=name, gpu_ledger=str(self.folder / "gpu.json"), gpu_bytes=6 * GIB, quiet=True
        )

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> Stack:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.stop()
        finally:
            for process in self.leftovers():
                process.kill()

    async def start(self) -> None:
        """Start ``up`` and wait until the gateway and the orchestrator are well."""
        with self.log.open("ab") as log:
            self.up = subprocess.Popen(  # noqa: ASYNC220 - returns at once
                [sys.executable, "-m", "modelswap.cli.main", "up", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_environment(),
            )
        await until(self.healthy, f"healthy:\n{self.log.read_text()[-2000:]}")

    async def stop(self, seconds: float = DEADLINE) -> int:
        """End ``up`` as Ctrl-C does; returns its exit status."""
        assert self.up is not None
        if self.up.poll() is None:
            self.up.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(self.up.wait, seconds)
        await until(lambda: not self.leftovers(), f"left over: {self.leftovers()}", 10)
        return code

    async def healthy(self) -> bool:
        """Return whether the gateway says that it and the orchestrator are well."""
        assert self.up is not None
        assert self.up.poll() is None, self.log.read_text()[-3000:]
        try:
            health = await self.get("/health")
        except OSError:
            return False
        return bool(health["orchestrator"]["connected"]) if isinstance(health.get("orchestrator"), dict) else False

    # ── processes ────────────────────────────────────────────────────────────────────────────────────────

    def processes(self, *words: str) -> list[psutil.Process]:
        """Return our live processes whose command line has all ``words``."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            cmdline = process.info["cmdline"] or []
            ours = str(self.config) in cmdline or f"--gpu-ledger={self.folder / 'gpu.json'}" in cmdline
            if ours and process.info["status"] != psutil.STATUS_ZOMBIE and all(word in cmdline for word in words):
                found.append(process)
        return found

    def orchestrators(self) -> list[psutil.Process]:
        """Return the orchestrator's process."""
        return self.processes("orchestrator")

    def gateways(self) -> list[psutil.Process]:
        """Return the gateway workers' processes."""
        return self.processes("gateway")

    def engines(self) -> list[psutil.Process]:
        """Return the engines' processes."""
        return self.processes("modelswap.testing.engine")

    def leftovers(self) -> list[psutil.Process]:
        """Return every process of this stack that is alive."""
        return self.processes()

    # ── talking to it ────────────────────────────────────────────────────────────────────────────────────

    @property
    def base_url(self) -> str:
        """What OpenAI's clients take."""
        return f"http://127.0.0.1:{self.gateway_port}/v1"

    async def get(self, path: str, *, orchestrator: bool = False) -> dict[str, Any]:
        """GET a JSON document."""
        return await asyncio.to_thread(self._ask, path, None, orchestrator)

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST to the orchestrator."""
        return await asyncio.to_thread(self._ask, path, body, True)

    async def status(self) -> dict[str, Any]:
        """Return the orchestrator's status."""
        return await self.get("/status", orchestrator=True)

    def _ask(self, path: str, body: dict[str, Any] | None, orchestrator: bool) -> dict[str, Any]:
        port = self.orchestrator_port if orchestrator else self.gateway_port
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            data=json.dumps(body).encode() if body is not None else None,
            headers={"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as answer:  # noqa: S310
                result: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                result = json.load(error)
        return result

    async def settled(self) -> None:
        """Wait until nothing waits, nothing runs and no swap is under way."""

        async def quiet() -> bool:
            status = await self.status()
            text = json.dumps(status)
            idle = all(m["waiting"] == 0 and m["in_flight"] == 0 for m in status["models"])
            return idle and not status["swaps"] and "draining" not in text.replace("draining_", "")

        await until(quiet, "the stack settles")

    def assert_never_overlapped(self) -> None:
        """Assert that no two engines ever held, or tried to hold, the simulated GPU together."""
        reading = self.ledger.read()
        assert reading.overlaps == 0
        assert reading.peak <= 8 * GIB
