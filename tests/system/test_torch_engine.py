"""The test engine of `bench/gpu.py` with real weights and a real PyTorch, on the CPU: ``make test-vllm``.

It needs only MODELSWAP_VLLM_PYTHON, since whatever has vLLM has PyTorch.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from bench.gpu_layout import FILE
from modelswap.engines.base import Address
from modelswap.engines.vllm import Vllm
from modelswap.spec.config import Model
from modelswap.testing.ledger import Ledger
from tests.system.serving import serving

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
SIZE = 50 << 20
CAPACITY = 2 * SIZE
SHARE = 0.9
TOKENS = 16


def python() -> str:
    """Return the Python that has PyTorch."""
    found = os.environ.get("MODELSWAP_VLLM_PYTHON")
    assert found is not None, "say MODELSWAP_VLLM_PYTHON"
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 50 MB of weights."""
    folder = tmp_path_factory.mktemp("weights")
    make = [python(), "-m", "bench.gpu_probe", "make", str(folder), str(SIZE), "1", "--device", "cpu"]
    subprocess.run(make, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return folder


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Return the pretended device."""
    return Ledger.create(tmp_path / "gpu.json", CAPACITY)


def engine(weights: Path, ledger: Ledger, **fields: Any) -> Model:
    """Return the engine's configuration."""
    return Model(
        engine="vllm",
        model=str(weights),
        program=[python(), "-m", "bench.gpu_engine"],
        args=["--device", "cpu", "--ledger", str(ledger.path), "--gpu-memory-utilization", str(SHARE)],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"},
        sleep="on",
        **fields,
    )


async def said(http: aiohttp.ClientSession, model: Model, address: Address) -> tuple[str, ...]:
    """Return its greedy answer."""
    answer = await Vllm().greedy(http, "m", model, address, TOKENS)
    assert answer is not None
    assert len(answer) == TOKENS
    return answer


async def test_it_sleeps_and_wakes_with_the_same_answer(weights: Path, ledger: Ledger, tmp_path: Path) -> None:
    """At either level the memory is given back but for a residue, and every wake answers as before."""
    model = engine(weights, ledger)
    async with serving(model, tmp_path / "log") as (http, address):
        await Vllm().canary(http, "m", model, address)
        before = await said(http, model, address)
        assert ledger.read().used == int(CAPACITY * SHARE)
        for level in (1, 2, 1, 2):
            await Vllm().sleep(http, model, address, level)
            assert await Vllm().asleep(http, model, address) is True
            assert await Vllm().healthy(http, model, address)
            assert 0 < ledger.read().used < SIZE / 20
            await Vllm().wake(http, model, address, level)
            assert await Vllm().asleep(http, model, address) is False
            assert ledger.read().used == int(CAPACITY * SHARE)
            assert await said(http, model, address) == before
    assert ledger.read().overcommits == 0


async def test_wrong_weights_answer_something_else(weights: Path, ledger: Ledger, tmp_path: Path) -> None:
    """One flipped bit changes the answer, and so does a wake from level 2 without the weights."""
    own = tmp_path / "weights"
    own.mkdir()
    content = bytearray((weights / FILE).read_bytes())
    (own / FILE).write_bytes(content)
    model = engine(own, ledger)
    async with serving(model, tmp_path / "log") as (http, address):
        before = await said(http, model, address)
        await Vllm().sleep(http, model, address, 2)
        await Vllm().wake(http, model, address, 1)  # no reload
        assert await said(http, model, address) != before
        content[-12345] ^= 1
        (own / FILE).write_bytes(content)
        await Vllm().sleep(http, model, address, 2)
        await Vllm().wake(http, model, address, 2)
        assert await said(http, model, address) != before


async def test_asleep_it_lets_requests_wait(weights: Path, ledger: Ledger, tmp_path: Path) -> None:
    """A request to a sleeping engine waits without a word, is counted as waiting, and is answered after the wake."""
    model = engine(weights, ledger)
    async with serving(model, tmp_path / "log") as (http, address):
        before = await said(http, model, address)
        await Vllm().sleep(http, model, address, 1)
        asked = asyncio.create_task(said(http, model, address))
        async with asyncio.timeout(60):
            while await Vllm().running(http, model, address) != 1:  # noqa: ASYNC110 - another process's count
                await asyncio.sleep(0.01)
        assert not asked.done()
        await Vllm().wake(http, model, address, 1)
        assert await asked == before


async def test_without_free_memory_it_does_not_start(weights: Path, ledger: Ledger, tmp_path: Path) -> None:
    """It ends as vLLM does, with words that its adapter explains."""
    ledger.add_foreign(SIZE)
    launch = Vllm().launch("m", engine(weights, ledger), Address("127.0.0.1", 9))
    ended = await asyncio.create_subprocess_exec(
        *launch.argv, env=os.environ | launch.env, cwd=launch.cwd, stderr=asyncio.subprocess.PIPE
    )
    _, log = await ended.communicate()
    assert ended.returncode == 1
    diagnosis = Vllm().diagnose(1, log.decode().splitlines())
    assert "end what else uses the GPU" in diagnosis.reason
    assert not diagnosis.permanent


def test_the_whole_benchmark_can_be_rehearsed(tmp_path: Path) -> None:
    """All parts run on the CPU; answers are the same, nothing is missing, and nothing is written."""
    page = tmp_path / "page.md"
    argv = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--gib", "0.05", "--rounds", "1", "--limit", "900"]
    argv += ["--python", python(), "--weights", str(tmp_path / "weights"), "--into", str(page)]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for row in (
        "| pinned |",
        "| SIGKILL |",
        "| stop, cold start |",
        "| sleep level 1, later |",
        "| sleep level 2, later |",
    ):
        assert row in ended.stdout
    assert "were the same throughout" in ended.stdout
    assert not page.exists()
