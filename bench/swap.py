"""Request to first token across a swap of real vLLM servers: cold against standby, in one run.

Two models (the same weights under two names and two context lengths) are asked by turns; each request swaps. In half of
the blocks models have `standby: false`. With standby, the next request is sent when one is ready again, as it is in
real life after a few quiet seconds. Answers are greedy, and must be the same whichever way the server came in.

Usage: python bench/swap.py [--rounds N] [--containers]; MODELSWAP_VLLM_PYTHON names the Python that has vLLM,
MODELSWAP_VLLM_MODEL a model's folder. ``--containers``: in managed containers (`make test-docker` makes the image).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

BAR = 4.0
GATEWAY, ORCHESTRATOR = 28531, 28532
MODELS = ("one", "two")
QUESTION = "Say hello to Ada, who builds analytical engines."


def named(variable: str) -> str:
    """Return what the environment says, or end with the remedy."""
    found = os.environ.get(variable)
    if not found:
        sys.exit(f"{variable} is not set; see the first lines of this file")
    return found


def models(*, containers: bool, standby: bool) -> dict[str, Any]:
    """Return the two models' configuration."""
    python, weights = named("MODELSWAP_VLLM_PYTHON"), named("MODELSWAP_VLLM_MODEL")
    module = ["-m", "vllm.entrypoints.openai.api_server"]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    base: dict[str, Any] = {"engine": "vllm", "standby": standby, "env": env}
    if containers:
        [packages] = Path(python).parent.parent.glob("lib/python3.*/site-packages")
        numa = next(Path("/usr/lib").glob("*/libnuma.so.1")).resolve()
        base |= {
            "image": os.environ.get("MODELSWAP_TEST_BASE", "modelswap-base:bookworm"),
            "pull": "never",
            "model": "/models/model",
            "entrypoint": ["python3", *module],
            "volumes": [f"{packages}:/packages:ro", f"{weights}:/models/model:ro", f"{numa}:/usr/lib/libnuma.so.1:ro"],
            "env": {**env, "PYTHONPATH": "/packages"},
        }
    else:
        base |= {"program": [python, *module], "model": weights}
    return {
        name: {**base, "args": ["--enforce-eager", "--max-model-len", str(length)]}
        for name, length in zip(MODELS, (2048, 1024), strict=True)
    }


@contextlib.contextmanager
def running(folder: Path, configured: dict[str, Any]) -> Iterator[None]:
    """Run modelswap with these models until the block ends."""
    config = {
        "models": configured,
        "scheduling": {"linger": 0, "min_residency": 0},
        "gateway": {"port": GATEWAY},
        "orchestrator": {"port": ORCHESTRATOR, "state_dir": str(folder / "state")},
    }
    (folder / "modelswap.yaml").write_text(yaml.safe_dump(config))
    argv = [sys.executable, "-m", "modelswap.cli.main", "up", "--config", str(folder / "modelswap.yaml")]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{GATEWAY}/health"):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit((folder / "log").read_text()[-2000:])
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(60)


def first_token(model: str) -> tuple[float, str]:
    """Return the seconds from sending a streamed request until its first piece of text, and the whole answer."""
    body = json.dumps(
        {
            "model": model,
            "stream": True,
            "max_tokens": 16,
            "temperature": 0,
            "messages": [{"role": "user", "content": QUESTION}],
        }
    ).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{GATEWAY}/v1/chat/completions", data=body, headers={"content-type": "application/json"}
    )
    began = time.perf_counter()
    taken, text = 0.0, ""
    try:
        with urllib.request.urlopen(request, timeout=900) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                piece = json.loads(line[6:])
                if "error" in piece:
                    sys.exit(f"{model}: {piece}")
                content = piece["choices"][0]["delta"].get("content") if piece["choices"] else None
                if content and not text:
                    taken = time.perf_counter() - began
                text += content or ""
    except urllib.error.HTTPError as error:
        sys.exit(f"{model}: {error.read().decode()}")
    return taken, text


def status() -> dict[str, Any]:
    """Return the orchestrator's status."""
    with urllib.request.urlopen(f"http://127.0.0.1:{ORCHESTRATOR}/status") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def standby_ready(within: float = 300.0) -> float:
    """Wait until a standby is ready, and return the seconds that took."""
    began = time.monotonic()
    while time.monotonic() - began < within:
        states = status()["standbys"]
        if any(state["problem"] for state in states):
            sys.exit(f"no standby: {states}")
        if any(state["ready"] for state in states):
            return time.monotonic() - began
        time.sleep(0.1)
    sys.exit(f"no standby within {within:g} s")


def main() -> int:
    """Measure both, print both; status 1 if the bar is missed or answers differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--containers", action="store_true")
    said = parser.parse_args()
    times: dict[str, list[float]] = {"cold": [], "standby": []}
    ready: list[float] = []
    answers: set[str] = set()
    for block in range(said.rounds // 2):
        for way in times:
            configured = models(containers=said.containers, standby=way == "standby")
            with tempfile.TemporaryDirectory() as name, running(Path(name), configured):
                first_token(MODELS[1])
                for turn in range(2):
                    if way == "standby":
                        ready.append(standby_ready())
                    taken, text = first_token(MODELS[turn % 2])
                    mechanism = status()["last_swaps"][0]["mechanism"]
                    if mechanism != way:
                        log = (Path(name) / "log").read_text()
                        sys.exit(f"that swap was {mechanism}, not {way}:\n{log[-3000:]}")
                    times[way].append(taken)
                    answers.add(text)
                    print(f"  block {block} {way:8} {taken:6.2f} s", flush=True)
    where = "managed containers" if said.containers else "processes"
    print(f"vLLM in {where}, request to first token across a swap, {said.rounds} swaps each, {os.cpu_count()} cores")
    for way, taken_times in times.items():
        ordered = sorted(taken_times)
        print(f"  {way:8} p50 {statistics.median(ordered):6.2f} s   min {ordered[0]:.2f}   max {ordered[-1]:.2f}")
    print(f"  a new standby is ready after {statistics.median(ready):.1f} s")
    ratio = statistics.median(times["cold"]) / statistics.median(times["standby"])
    same = len(answers) == 1
    print(f"  ratio of the medians {ratio:.1f} (bar: {BAR:g}); greedy answers {'the same' if same else 'DIFFER'}")
    return not (same and ratio >= BAR)


if __name__ == "__main__":
    sys.exit(main())
