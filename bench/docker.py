"""Swap overhead on containers: what modelswap adds to the containers' own stop, start and load.

By turns in one run, on the same two containers with a simulated engine: by hand (stop the one, start the other and ask
for its health every 2 ms, all over the Docker Engine API), and by a request through the gateway to its first byte.

Usage: python bench/docker.py [--rounds N] [--load-seconds S]; `make test-docker` makes the image.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiodocker
import aiohttp
import yaml
from aiodocker.containers import DockerContainer

IMAGE = os.environ.get("MODELSWAP_TEST_ENGINE", "modelswap-engine:latest")
BAR = 0.050
GATEWAY, ORCHESTRATOR = 28521, 28522
GRACE = 15


async def made(docker: aiodocker.Docker, name: str, load: float) -> DockerContainer:
    """Return a new container, not started, that serves a model of its own name."""
    return await docker.containers.create(
        {
            "Image": IMAGE,
            "Cmd": [name, "--served-model-name", name],
            "Env": [f"SIM_ARGS=--load-seconds={load} --tokens=1"],
            "HostConfig": {"Init": True},
        },
        name=name,
    )


async def by_hand(http: aiohttp.ClientSession, out: DockerContainer, into: DockerContainer) -> float:
    """Swap, and return the seconds until the new one is healthy."""
    began = time.perf_counter()
    await out.stop(t=GRACE)
    await into.start()
    shown = await into.show()
    url = f"http://{shown['NetworkSettings']['IPAddress']}:8000/health"
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            async with http.get(url) as answer:
                if answer.status == 200:
                    return time.perf_counter() - began
        await asyncio.sleep(0.002)


async def by_request(http: aiohttp.ClientSession, model: str) -> float:
    """Ask for a model, and return the seconds until its answer."""
    began = time.perf_counter()
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    async with http.post(f"http://127.0.0.1:{GATEWAY}/v1/chat/completions", json=body) as answer:
        text = await answer.text()
        if answer.status != 200:
            sys.exit(f"{model}: {answer.status} {text}")
    return time.perf_counter() - began


@contextlib.asynccontextmanager
async def modelswap(folder: Path, names: list[str]) -> AsyncIterator[None]:
    """Run modelswap over the two containers."""
    config = {
        "models": {name: {"engine": "vllm", "container": name, "model": name, "concurrency": 4} for name in names},
        "scheduling": {"linger": 0, "min_residency": 0},
        "gateway": {"port": GATEWAY},
        "orchestrator": {"port": ORCHESTRATOR, "state_dir": str(folder / "state")},
        "docker": {"network": "bridge"},
        "device": {"kind": "slot"},
    }
    (folder / "modelswap.yaml").write_text(yaml.safe_dump(config))
    argv = [sys.executable, "-m", "modelswap.cli.main", "up", "--config", str(folder / "modelswap.yaml")]
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*argv, stdout=log, stderr=log)
    try:
        async with aiohttp.ClientSession() as http, asyncio.timeout(60):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(f"http://127.0.0.1:{GATEWAY}/health") as answer:
                        if (await answer.json())["orchestrator"]["connected"]:
                            break
                if process.returncode is not None:
                    sys.exit((folder / "log").read_text()[-2000:])
                await asyncio.sleep(0.05)
        yield
    finally:
        process.terminate()
        await process.wait()


async def run(rounds: int, load: float) -> int:
    """Measure both, print both; status 1 if the bar is missed."""
    prefix = f"bench-{uuid.uuid4().hex[:6]}"
    names = [f"{prefix}-a", f"{prefix}-b"]
    times: dict[str, list[float]] = {"by hand": [], "modelswap": []}
    with tempfile.TemporaryDirectory() as folder:
        async with aiodocker.Docker() as docker:
            pair = [await made(docker, name, load) for name in names]
            connector = aiohttp.TCPConnector(force_close=True)
            try:
                async with aiohttp.ClientSession(connector=connector) as http:
                    for block in range(-1, rounds // 4):
                        kept = block >= 0  # the block before warms both up
                        await pair[1].start()
                        for turn in range(4):
                            taken = await by_hand(http, pair[(turn + 1) % 2], pair[turn % 2])
                            times["by hand"] += [taken] if kept else []
                        await pair[1].stop(t=GRACE)
                        async with modelswap(Path(folder), names):
                            await by_request(http, names[1])
                            for turn in range(4):
                                taken = await by_request(http, names[turn % 2])
                                times["modelswap"] += [taken] if kept else []
            finally:
                for container in pair:
                    await container.delete(force=True)
    print(f"swap of two containers, load {load:g} s, {len(times['by hand'])} swaps each, {os.cpu_count()} cores")
    for system, taken_times in times.items():
        ordered = sorted(taken_times)
        print(f"  {system:10} p50 {statistics.median(ordered):.3f} s   min {ordered[0]:.3f}   max {ordered[-1]:.3f}")
    added = statistics.median(times["modelswap"]) - statistics.median(times["by hand"])
    print(f"  added at the median {added * 1000:.0f} ms (bar: {BAR * 1000:.0f} ms)")
    return added > BAR


def main() -> int:
    """Run it as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--load-seconds", type=float, default=0.2)
    said = parser.parse_args()
    return asyncio.run(run(said.rounds, said.load_seconds))


if __name__ == "__main__":
    sys.exit(main())
