"""Swap overhead: request to first token across a swap, modelswap against llama.cpp's own router mode.

Both serve the same weights under two names with the same llama-server program and arguments, in alternating rounds
of one run. modelswap's lingering is switched off, because the router has none: every request swaps, on both sides.

Usage: python bench/llamacpp.py [--rounds N]; ``llama-server`` is taken from PATH or LLAMA_SERVER.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml

from modelswap.cli.weights import smollm2

# --no-repack: some virtual machines announce AMX and refuse it, and the repacked kernels crash there.
ARGS = ["--ctx-size", "2048", "--threads", "2", "--parallel", "1", "--no-repack"]
BAR = 1.1
MODELS = ("model-a", "model-b")
ROUTER, GATEWAY, ORCHESTRATOR = 28510, 28511, 28512


def llama_server() -> str:
    """Return the program, or end with the remedy."""
    found = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    if found is None:
        sys.exit("llama-server is not on PATH; name it: LLAMA_SERVER=/path/to/llama-server make bench-llamacpp")
    return found


@contextlib.contextmanager
def running(argv: list[str], log: Path, port: int) -> Iterator[None]:
    """Run a server until the block ends; its port answers /health when the block begins."""
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{argv[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def first_token(port: int, model: str) -> float:
    """Return the seconds from sending a streamed request until its first piece of text."""
    body = json.dumps(
        {
            "model": model,
            "stream": True,
            "max_tokens": 4,
            "temperature": 0,
            "messages": [{"role": "user", "content": "Say hello."}],
        }
    ).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", data=body, headers={"content-type": "application/json"}
    )
    began = time.perf_counter()
    taken: float | None = None
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if taken is None and line.startswith(b"data: ") and b'"content":"' in line:
                taken = time.perf_counter() - began
    if taken is None:
        sys.exit(f"no token from {model} on port {port}")
    return taken


def main() -> int:
    """Run both, print both; status 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    program = llama_server()
    weights = smollm2(Path.home() / ".cache" / "modelswap", lambda *_: None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = folder / "models"
        models.mkdir()
        for model in MODELS:
            shutil.copyfile(weights, models / f"{model}.gguf")
        config = {
            "models": {
                model: {
                    "engine": "llamacpp",
                    "program": [program],
                    "model": str(models / f"{model}.gguf"),
                    "args": ARGS,
                }
                for model in MODELS
            },
            "scheduling": {"linger": 0, "min_residency": 0},
            "gateway": {"port": GATEWAY},
            "orchestrator": {"port": ORCHESTRATOR, "state_dir": str(folder / "state")},
        }
        (folder / "modelswap.yaml").write_text(yaml.safe_dump(config))
        router = [program, "--models-dir", str(models), "--models-max", "1", "--port", str(ROUTER), *ARGS]
        ours = [sys.executable, "-m", "modelswap.cli.main", "up", "--config", str(folder / "modelswap.yaml")]
        times: dict[str, list[float]] = {"router": [], "modelswap": []}
        with running(router, folder / "router.log", ROUTER), running(ours, folder / "up.log", GATEWAY):
            for number in range(-2, rounds):
                for system, port in (("router", ROUTER), ("modelswap", GATEWAY)):
                    taken = first_token(port, MODELS[number % 2])
                    if number >= 0:  # the rounds before warm both up
                        times[system].append(taken)
    print(f"request to first token across a swap, {rounds} swaps each, {os.cpu_count()} cores")
    for system, taken_times in times.items():
        ordered = sorted(taken_times)
        print(
            f"  {system:10} p50 {statistics.median(ordered):.3f} s   min {ordered[0]:.3f}   "
            f"p90 {ordered[int(len(ordered) * 0.9)]:.3f}   max {ordered[-1]:.3f}"
        )
    ratio = statistics.median(times["modelswap"]) / statistics.median(times["router"])
    print(f"  ratio of the medians {ratio:.2f} (bar: {BAR})")
    return ratio > BAR


if __name__ == "__main__":
    sys.exit(main())
