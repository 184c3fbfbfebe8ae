"""One ``modelswap up`` over two test engines, and swaps between them through its gateway."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import yaml

from bench.gpu_device import Device
from bench.gpu_report import COLD, LATER, Swap, kinds

QUESTION: Final = "Say hello to Ada, who builds analytical engines."
TOKENS: Final = 16
UP_LIMIT: Final = 60.0
END_LIMIT: Final = 90.0
OVERTIME: Final = 60.0
"""Seconds by which what was begun in time may be late."""
SHOWN: Final = 3000
"""Characters of the log that are shown when something fails."""


class Failed(Exception):
    """A part of the benchmark that can't be measured here; the message says why."""


def engines(
    folders: Mapping[str, Path], python: str, device: Device, *, root: Path, share: float, level: int
) -> dict[str, Any]:
    """Return the configuration of the models whose weights lie in ``folders``; ``level`` 0: they never sleep.

    modelswap chooses the level itself, from what it measures; an engine that refuses all others leaves it one.
    """
    args = [*device.options, "--gpu-memory-utilization", str(share)]
    return {
        name: {
            "engine": "vllm",
            "model": str(folder),
            "program": [python, "-m", "bench.gpu_engine"],
            "args": [*args, "--sleep-levels", str(level)] if level else args,
            "cwd": str(root),
            "env": {**device.env, "PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}"},
            "concurrency": 4,
            "standby": False,
            "sleep": "on" if level else "off",
        }
        for name, folder in folders.items()
    }


class Stack:
    """``modelswap up`` with these models from ``with`` to its end."""

    def __init__(self, folder: Path, models: Mapping[str, Any], device: Device) -> None:
        folder.mkdir(parents=True)
        self.models = list(models)
        self._gateway, self._orchestrator = free_ports(2)
        self._config = folder / "modelswap.yaml"
        self._log = folder / "up.log"
        config = {
            "models": dict(models),
            "gateway": {"port": self._gateway},
            "orchestrator": {"port": self._orchestrator, "state_dir": str(folder / "state")},
            "scheduling": {"linger": 0, "min_residency": 0},
            "device": device.config,
        }
        self._config.write_text(yaml.safe_dump(config))
        self._up: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        argv = [sys.executable, "-m", "modelswap.cli.main", "up", "--config", str(self._config)]
        with self._log.open("ab") as log:
            self._up = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self._until_up(self._up)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._up is not None
        if self._up.poll() is None:
            self._up.terminate()
        try:
            self._up.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            self._up.kill()
            self._up.wait()

    def _until_up(self, up: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + UP_LIMIT
        while True:
            with contextlib.suppress(OSError, Failed):
                self._get(self._gateway, "/health")  # 503 until the orchestrator is there
                return
            if up.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"modelswap did not come up:\n{self.log()}")
            time.sleep(0.05)

    def log(self) -> str:
        """Return the end of modelswap's log."""
        return self._log.read_text(errors="replace")[-SHOWN:]

    def status(self) -> dict[str, Any]:
        """Return the orchestrator's status."""
        return self._get(self._orchestrator, "/status")

    def calibrate(self, model: str, limit: float) -> None:
        """Have modelswap measure all ways in and out of a model; raises `Failed`."""
        self._ask(self._orchestrator, "/calibrate", {"model": model}, limit).close()

    def swap(self, model: str, limit: float) -> Swap:
        """Ask a model that isn't resident; raises `Failed`."""
        body = {"model": model, "stream": True, "max_tokens": TOKENS, "temperature": 0}
        body["messages"] = [{"role": "user", "content": QUESTION}]
        began, first, text = time.perf_counter(), 0.0, ""
        try:
            with self._ask(self._gateway, "/v1/chat/completions", body, limit) as answer:
                for line in answer:
                    if line.startswith(b"data: {"):
                        piece = json.loads(line[6:])
                        if "error" in piece:
                            raise Failed(f"{model}: {piece['error']}\n{self.log()}")
                        first = first or time.perf_counter() - began
                        text += piece["choices"][0]["delta"].get("content") or ""
        except (OSError, http.client.HTTPException) as error:
            raise Failed(f"{model}: {error!r}\n{self.log()}") from error
        record = self.status()["last_swaps"][0]
        if record["target"] != model or record["outcome"] != "ok":
            raise Failed(f"the last swap was not the one to {model}: {record}\n{self.log()}")
        return Swap(seconds=first, answer=text, model=model, record=record)

    def _get(self, port: int, path: str) -> dict[str, Any]:
        with self._ask(port, path, None, UP_LIMIT) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def _ask(self, port: int, path: str, body: dict[str, Any] | None, limit: float) -> http.client.HTTPResponse:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        try:
            answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=limit)
        except urllib.error.HTTPError as error:
            with error:
                raise Failed(f"{path}: {error.read().decode(errors='replace')}\n{self.log()}") from error
        except TimeoutError as error:
            raise Failed(f"{path} took longer than {limit:.0f} s\n{self.log()}") from error
        return answer


def turns(stack: Stack, level: int, rounds: int, left: Callable[[], float], say: Callable[[str], None]) -> list[Swap]:
    """Ask the models by turns until ``rounds`` swaps went as ``level`` says, or no time is left; return them all."""
    wanted = LATER if level else COLD
    swaps: list[Swap] = []
    while left() > 0 and kinds(swaps).count(wanted) < rounds:
        swaps.append(stack.swap(stack.models[len(swaps) % len(stack.models)], limit=max(left() + OVERTIME, 1.0)))
        last = swaps[-1]
        say(f"  {last.model}: {kinds(swaps)[-1]:5} {last.seconds:7.3f} s  {_phases(last.record['phases'])}")
        if len(swaps) > rounds + 12:
            raise Failed(
                f"swaps don't go as sleep level {level} wants, see measurements:\n{_why(stack)}\n{stack.log()}"
            )
    return swaps


def asleep(status: Mapping[str, Any], level: int) -> tuple[int, int] | None:
    """Return the most device and host bytes that a sleeper was measured to take at ``level``; None if none was."""
    rows = [row for row in status["measurements"] if row["mechanism"] == f"sleep{level}" and row["host_bytes"]]
    if not rows:
        return None
    return max(row["residue_bytes"] or 0 for row in rows), max(row["host_bytes"] for row in rows)


def free_ports(count: int) -> Sequence[int]:
    """Return loopback ports on which nobody listens now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _phases(phases: Mapping[str, float]) -> str:
    return "  ".join(f"{phase} {seconds:.3f}" for phase, seconds in phases.items())


def _why(stack: Stack) -> str:
    rows = stack.status()["measurements"]
    return "\n".join(f"  {row['model']} {row['mechanism']} ok={row['ok']} {row['reason']}" for row in rows)
