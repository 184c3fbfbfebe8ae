"""How long it takes from the end of a hold on device memory until the device says that the memory is free."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final

from bench.gpu_device import Device, until_free
from bench.gpu_report import GIB, Release
from bench.gpu_stack import Failed, free_ports

SLACK: Final = 64 << 20
"""Bytes that may still be missing when memory counts as free again: the driver keeps a little for itself."""
EVENTS: Final = {
    signal.SIGKILL: "SIGKILL",
    signal.SIGTERM: "SIGTERM, the interpreter's own end included",
}
START_LIMIT: Final = 120.0
RELEASE_LIMIT: Final = 30.0
SETTLED: Final = 1.0


class Run:
    """How things are started in the engines' Python."""

    def __init__(self, python: str, root: Path, device: Device, log: Path) -> None:
        self.python = python
        self.device = device
        self.log = log
        self._root = root
        self._env = os.environ | device.env | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}"}

    @contextlib.contextmanager
    def process(self, module: str, *argv: str, **env: str) -> Iterator[subprocess.Popen[str]]:
        """Run a module until the block ends; what it prints to standard error goes to the log."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [self.python, "-m", module, *argv, *self.device.options],
                env=self._env | env,
                cwd=self._root,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def last_words(self) -> str:
        """Return the last line of the log, then what came before it."""
        *before, last = self.log.read_text(errors="replace")[-2000:].splitlines() or [""]
        return "\n".join([last, *before])

    def probe(self, *argv: str) -> Any:
        """Return what ``bench.gpu_probe`` finds; raises `Failed`."""
        with self.process("bench.gpu_probe", *argv) as process:
            said, _ = process.communicate()
        if process.returncode:
            raise Failed(f"bench.gpu_probe {argv[0]} failed: {self.last_words()}")
        return json.loads(said.splitlines()[-1])


def kills(run: Run, sizes: Sequence[int], rounds: int, left: Callable[[], float]) -> list[Release]:
    """Return the latencies after SIGKILL and SIGTERM of processes that hold so much."""
    found = []
    with run.process("bench.gpu_probe", "hold", "holder") as process:
        _line(process)  # it has imported PyTorch
        empty = run.device.free()
        for how in EVENTS:
            for size in sizes:
                seconds: list[float] = []
                while len(seconds) < rounds and left() > 0:
                    seconds.append(_kill(run.device, process, size, how, empty))
                found.append(Release(event=EVENTS[how], size=size, seconds=seconds))
    return found


def _kill(device: Device, process: subprocess.Popen[str], size: int, how: signal.Signals, empty: int) -> float:
    _pipe(process.stdin).write(f"{size}\n")
    _pipe(process.stdin).flush()
    holder = _line(process)
    if not holder.isdecimal():
        raise Failed(f"a process can't hold {size / GIB:.2f} GiB: {holder}")
    began = time.perf_counter()
    os.kill(int(holder), how)
    taken = until_free(device, empty - min(SLACK, size // 4), began, RELEASE_LIMIT)
    if taken is None:
        raise Failed(f"memory did not come back within {RELEASE_LIMIT:g} s of {how.name}")
    return taken


def sleeps(run: Run, model: Path, share: float, rounds: int, left: Callable[[], float]) -> list[Release]:
    """Return the latencies after an engine was told to sleep at level 1, and after it said that it does."""
    [port] = free_ports(1)
    argv = ["--model", str(model), "--served-model-name", "m", "--port", str(port), "--enable-sleep-mode"]
    argv += ["--gpu-memory-utilization", str(share)]
    asked: list[float] = []
    answered: list[float] = []
    with run.process("bench.gpu_engine", *argv, VLLM_SERVER_DEV_MODE="1") as process:
        _until_ready(run, process, port)
        before = run.device.free()
        # The first sleep pins host memory, and tells how much is freed in the end.
        _post(port, "/sleep?level=1")
        until_free(run.device, run.device.total, time.perf_counter(), SETTLED)
        freed = run.device.free()
        while len(asked) < rounds and left() > 0:
            _post(port, "/wake_up")
            began = time.perf_counter()
            with ThreadPoolExecutor(1) as pool:
                said = pool.submit(_answered, port)
                taken = until_free(run.device, freed - min(SLACK, (freed - before) // 4), began, RELEASE_LIMIT)
                late = said.result()
            if taken is None:
                raise Failed(f"an engine's memory did not come back within {RELEASE_LIMIT:g} s of its sleep")
            asked.append(taken)
            answered.append(max(began + taken - late, 0.0))
    return [
        Release(event="asking for sleep level 1", size=freed - before, seconds=asked),
        Release(event="the answer to that", size=freed - before, seconds=answered),
    ]


def _until_ready(run: Run, process: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + START_LIMIT
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failed(f"the engine did not start: {run.last_words()}")
        time.sleep(0.05)


def _answered(port: int) -> float:
    """Have it sleep; returns when it said that it does."""
    _post(port, "/sleep?level=1")
    return time.perf_counter()


def _post(port: int, path: str) -> None:
    with urllib.request.urlopen(
        urllib.request.Request(f"http://127.0.0.1:{port}{path}", method="POST"), timeout=START_LIMIT
    ):
        pass


def _line(process: subprocess.Popen[str]) -> str:
    line = _pipe(process.stdout).readline()
    if not line:
        raise Failed(f"bench.gpu_probe ended with {process.wait()}")
    return line.strip()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
