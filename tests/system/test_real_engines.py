"""The main job on real servers: a request swaps, the answer is the model's own, and comes back the same.

Each needs its engine: see CONTRIBUTING.md.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import aiodocker
import aiohttp
import pytest

from modelswap.cli.weights import default_cache, smollm2
from tests.system.stack import Stack

QUESTION = {"role": "user", "content": "Say hello to Ada, who builds analytical engines."}


async def answer(session: aiohttp.ClientSession, stack: Stack, model: str) -> str:
    """Return the model's greedy answer."""
    body = {"model": model, "messages": [QUESTION], "max_tokens": 24, "temperature": 0}
    timeout = aiohttp.ClientTimeout(total=600)
    async with session.post(f"{stack.base_url}/chat/completions", json=body, timeout=timeout) as response:
        document: dict[str, Any] = await response.json()
        assert response.status == 200, document
        return str(document["choices"][0]["message"]["content"])


async def swap_there_and_back(stack: Stack, first: str, second: str) -> None:
    """Ask both models in turn; each turn is a swap, and each answer the same as before."""
    async with aiohttp.ClientSession() as session:
        answers = [await answer(session, stack, model) for model in (first, second, first, second)]
    assert answers[:2] == answers[2:]
    assert all(len(text.split()) > 2 for text in answers), answers
    status = await stack.status()
    swaps = [(swap["source"], swap["target"], swap["outcome"]) for swap in reversed(status["last_swaps"])]
    assert swaps == [(None, first, "ok"), (first, second, "ok"), (second, first, "ok"), (first, second, "ok")]
    for swap in reversed(status["last_swaps"]):
        phases = {phase: round(seconds, 3) for phase, seconds in swap["phases"].items()}
        print(f"{swap['source']} -> {swap['target']}: {swap['seconds']:.3f} s {phases}")  # noqa: T201 - the figures


@pytest.mark.openvino
async def test_openvino(tmp_path: Path) -> None:
    """Two models on the embedded engine."""
    weights = str(smollm2(default_cache(), lambda *_: None))
    models = {
        "one": {"engine": "openvino", "model": weights},
        "two": {"engine": "openvino", "model": weights, "args": ["--threads", "1"]},
    }
    async with Stack(tmp_path, models=models) as stack:
        await swap_there_and_back(stack, "one", "two")


@pytest.mark.llamacpp
async def test_llamacpp(tmp_path: Path) -> None:
    """Two llama.cpp servers."""
    program = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
    assert program is not None, "name llama-server in LLAMA_SERVER, or put it on PATH"
    weights = str(smollm2(default_cache(), lambda *_: None))
    base = {"engine": "llamacpp", "model": weights, "program": [program]}
    models = {
        "one": {**base, "args": ["--ctx-size", 2048, "--no-repack"], "aliases": ["uno"]},
        "two": {**base, "args": ["--ctx-size", 1024, "--no-repack"]},
    }
    async with Stack(tmp_path, models=models) as stack:
        await swap_there_and_back(stack, "one", "two")
        async with aiohttp.ClientSession() as session:
            assert await answer(session, stack, "uno")


@pytest.mark.vllm
async def test_vllm(tmp_path: Path) -> None:
    """Two vLLM servers, here the CPU build."""
    python, model = os.environ.get("MODELSWAP_VLLM_PYTHON"), os.environ.get("MODELSWAP_VLLM_MODEL")
    assert python is not None, "name the Python that has vLLM in MODELSWAP_VLLM_PYTHON"
    assert model is not None, "name a model's folder in MODELSWAP_VLLM_MODEL"
    base = {
        "engine": "vllm",
        "model": model,
        "program": [python, "-m", "vllm.entrypoints.openai.api_server"],
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
    }
    models = {
        "one": {**base, "args": ["--enforce-eager", "--max-model-len", 2048], "aliases": ["uno"]},
        "two": {**base, "args": ["--enforce-eager", "--max-model-len", 1024]},
    }
    async with Stack(tmp_path, models=models) as stack:
        await swap_there_and_back(stack, "one", "two")
        async with aiohttp.ClientSession() as session:
            assert await answer(session, stack, "uno")


@pytest.mark.vllm
async def test_vllm_in_containers(tmp_path: Path) -> None:
    """Two managed containers with a real vLLM, mounted into the plain base image (`make test-docker` makes that)."""
    python, model = os.environ.get("MODELSWAP_VLLM_PYTHON"), os.environ.get("MODELSWAP_VLLM_MODEL")
    assert python is not None, "name the Python that has vLLM in MODELSWAP_VLLM_PYTHON"
    assert model is not None, "name a model's folder in MODELSWAP_VLLM_MODEL"
    [packages] = Path(python).parent.parent.glob("lib/python3.*/site-packages")
    image = os.environ.get("MODELSWAP_TEST_BASE", "modelswap-base:bookworm")
    # The CPU build wants this one library of the system's (Debian: libnuma1).
    numa = next(Path("/usr/lib").glob("*/libnuma.so.1")).resolve()  # noqa: ASYNC240 - a test may look
    base = {
        "engine": "vllm",
        "image": image,
        "pull": "never",
        "model": "/models/model",
        "entrypoint": ["python3", "-m", "vllm.entrypoints.openai.api_server"],
        "volumes": [f"{packages}:/packages:ro", f"{model}:/models/model:ro", f"{numa}:/usr/lib/libnuma.so.1:ro"],
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": "/packages"},
    }
    models = {
        "one": {**base, "args": ["--enforce-eager", "--max-model-len", 2048], "aliases": ["uno"]},
        "two": {**base, "args": ["--enforce-eager", "--max-model-len", 1024]},
    }
    async with Stack(tmp_path, models=models) as stack:
        await swap_there_and_back(stack, "one", "two")
        async with aiohttp.ClientSession() as session:
            assert await answer(session, stack, "uno")
        await remove_containers(stack)


async def remove_containers(stack: Stack) -> None:
    """Stop everything and remove the containers that were made; the images stay."""
    await stack.stop()
    owner = (stack.state_dir / "docker" / "id").read_text().strip()
    async with aiodocker.Docker() as docker:
        for container in await docker.containers.list(all=True, filters={"label": [f"io.modelswap.owner={owner}"]}):
            await container.delete(force=True, v=True)
