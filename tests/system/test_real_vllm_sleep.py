"""The adapter's sleep against a real vLLM: ``make test-vllm``.

The CPU build accepts all of it and gives nothing back, which is enough to see that the questions are right.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelswap.engines.vllm import Vllm
from modelswap.spec.config import Model
from tests.system.serving import serving


@pytest.mark.vllm
async def test_real_vllm_sleeps_and_wakes_at_both_levels(tmp_path: Path) -> None:
    """Asleep it says so and is healthy; after either level its greedy answer is the one before."""
    python, folder = os.environ.get("MODELSWAP_VLLM_PYTHON"), os.environ.get("MODELSWAP_VLLM_MODEL")
    assert python is not None and folder is not None, "say MODELSWAP_VLLM_PYTHON and MODELSWAP_VLLM_MODEL"
    model = Model(
        engine="vllm",
        model=folder,
        program=[python, "-m", "vllm.entrypoints.openai.api_server"],
        args=["--enforce-eager", "--max-model-len", "1024"],
        env={"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_SERVER_DEV_MODE": "1"},
    )
    engine = Vllm()
    async with serving(model, tmp_path / "log") as (http, address):
        await engine.canary(http, "m", model, address)
        before = await engine.greedy(http, "m", model, address, 24)
        assert before is not None and len(before) == 24
        assert await engine.greedy(http, "m", model, address, 24) == before
        assert await engine.asleep(http, model, address) is False
        for level in (1, 2, 1):
            await engine.sleep(http, model, address, level)
            assert await engine.asleep(http, model, address) is True
            assert await engine.healthy(http, model, address)
            await engine.wake(http, model, address, level)
            assert await engine.asleep(http, model, address) is False
            assert await engine.greedy(http, "m", model, address, 24) == before
