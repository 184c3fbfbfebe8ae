"""Sleeping models under load, with engines that fail at random in all the ways there are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from modelswap.protocol.errors import OUTCOMES, Code
from tests.system.load import clients
from tests.system.sleepers import sleepable
from tests.system.stack import Stack

MODELS: Final = ("mistral", "coder", "llava", "qwen")
REQUESTS: Final = 2000
PAUSE: Final = 0.1
SEED: Final = int(os.environ.get("MODELSWAP_SEED", "4"))
FAULTS: Final[tuple[dict[str, Any], ...]] = (
    {"sleep": "fail"},
    {"sleep": "ignore"},
    {"early_sleep": 0.3},
    {"late_release": 0.3},
    {"crash": "sleep"},
    {"crash": "sleep", "by": "kill"},
    {"crash": "wake"},
    {"wake": "fail"},
    {"wake": "oom", "nth": 1},
    {"wake": "oom"},
)
"""What may happen again and again. In between, engines work as they should."""
ONCE: Final[tuple[dict[str, Any], ...]] = ({"hang": "sleep"}, {"hang": "wake"}, {"garbled": 1})
"""What turns a level off, or takes its time: once each."""


class Trouble:
    """Makes engines fail, at random."""

    def __init__(self, stack: Stack, seed: int) -> None:
        self.stack = stack
        self.rng = random.Random(seed)
        self.made: list[dict[str, Any]] = []
        self._once = list(ONCE)

    async def make(self) -> None:
        """Go on until cancelled."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5)) as http:
            while True:
                await asyncio.sleep(PAUSE)
                status = await self.stack.status()
                known = {row["model"] for row in status["measurements"] if row["mechanism"] == "wake1"}
                awake = [one for one in status["instances"] if one["state"] == "ready" and one["model"] in known]
                if not awake:
                    continue
                one = self.rng.choice(awake)
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):  # it has just ended
                    await self._tell(http, f"http://{one['host']}:{one['port']}/sim/fault")

    async def _tell(self, http: aiohttp.ClientSession, url: str) -> None:
        fault = self.rng.choice(FAULTS) if self.rng.random() < 0.6 else {}
        if self._once and self.rng.random() < 0.15:
            fault = self._once.pop()
        async with http.post(url, json=fault) as answer:
            assert answer.status == 200, await answer.text()
        if fault:
            self.made.append(fault)


@pytest.mark.long
async def test_every_request_is_answered_whatever_sleepers_do(tmp_path: Path) -> None:
    """2,000 requests over four models end in a right answer or a retryable error; nothing overlaps or is left over."""
    stack = Stack(
        tmp_path,
        models={name: sleepable(tmp_path, "--tokens=4", concurrency=8) for name in MODELS},
        device={"kind": "simulated", "ledger": str(tmp_path / "gpu.json"), "release_timeout": 5.0},
    )
    async with stack:
        trouble = Trouble(stack, seed=SEED)
        making = asyncio.create_task(trouble.make())
        try:
            outcomes = await clients(stack.base_url, MODELS, count=REQUESTS, at_once=32, seed=SEED + 3)
        finally:
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)
        status = await stack.status()
        log = stack.log.read_text()
    assert len(outcomes) == REQUESTS
    for outcome in outcomes:
        if not outcome.right:
            assert outcome.error in set(Code), outcome
            assert OUTCOMES[Code(outcome.error)].should_retry is not False, outcome
    right = sum(outcome.right for outcome in outcomes)
    assert right > REQUESTS * 0.9
    assert len(trouble.made) > 10
    assert log.count("mechanism=wake") > 20, status["timings"]
    stack.assert_never_overlapped()
