"""The gateway's metrics through its own address: one sum over workers that never falls, and bounded labels."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from tests.system.front_door import chat, metrics, post, send, total, wire
from tests.system.load import clients
from tests.system.stack import MODELS, Stack, until

REQUESTS = "modelswap_gateway_requests_total"
COUNTERS = re.compile(r"\w+_(total|sum|count|bucket)(\{|$)")


async def test_sum_over_workers_is_monotonic(tmp_path: Path) -> None:
    """Whichever worker is asked tells the sum over all; no counter falls when a worker is killed, nor later."""
    async with Stack(tmp_path, workers=2) as stack:
        outcomes = await clients(stack.base_url, MODELS[:2], count=60, at_once=8, seed=1)
        assert all(outcome.right for outcome in outcomes)

        async def sums(count: float) -> bool:
            # From several connections, so that both workers are asked.
            told = [total(await metrics(stack), REQUESTS, path="/v1/chat/completions", status="200") for _ in range(8)]
            return all(value == count for value in told)

        await until(lambda: sums(60), "every worker tells of all requests")
        before = await metrics(stack)
        for model in MODELS[:2]:
            wanted = sum(outcome.model == model for outcome in outcomes)
            assert total(before, REQUESTS, model=model, status="200") == wanted
            labels = {"model": model, "path": "/v1/chat/completions"}
            for name in ("time_to_first_byte", "request_duration"):
                assert total(before, f"modelswap_gateway_{name}_seconds_count", **labels) == wanted
                assert total(before, f"modelswap_gateway_{name}_seconds_bucket", le="+Inf", **labels) == wanted
            assert before[f'modelswap_gateway_in_flight{{model="{model}"}}'] == 0

        for victim in stack.gateways():
            # Killed between ticks: what it had counted since may be lost, but nothing that was told before.
            told = await metrics(stack)
            victim.kill()
            await asyncio.to_thread(victim.wait, 30)

            async def two_again(pid: int = victim.pid) -> bool:
                return len(stack.gateways()) == 2 and all(process.pid != pid for process in stack.gateways())

            await until(two_again, "the worker comes back")
            await until(stack.healthy, "well again")
            for _ in range(6):
                now = await metrics(stack)
                fallen = {key: (value, now.get(key)) for key, value in told.items() if COUNTERS.match(key)}
                fallen = {key: pair for key, pair in fallen.items() if pair[1] is None or pair[1] < pair[0]}
                assert fallen == {}
                told = now
        outcomes = await clients(stack.base_url, MODELS[:2], count=20, at_once=4, seed=2)
        assert all(outcome.right for outcome in outcomes)
        await until(lambda: sums(80), "what came after is counted, too")


async def test_labels_are_bounded(tmp_path: Path) -> None:
    """Unknown models, paths and methods appear in no label; aliases count as their model."""
    async with Stack(tmp_path, workers=2) as stack:
        for n in range(20):
            await send(stack, post(chat(f"secret-model-{n}")))
            await send(stack, post(chat("mistral"), f"/v1/secret-path-{n}"))
            await send(stack, f"GET /secret-path-{n} HTTP/1.1\r\nHost: g\r\n\r\n".encode(), method="GET")
            await send(stack, f"BREW /secret-path-{n} HTTP/1.1\r\nHost: g\r\n\r\n".encode(), method="GET")
        assert (await send(stack, post(chat("mistral-alias")))).status == 200
        async with wire(stack) as client:
            await client.send(b"garbage\r\n\r\n")
            assert (await client.answer()).status == 400

        async def written_down() -> bool:
            series = await metrics(stack)
            return (
                total(series, REQUESTS, model="", path="/v1/chat/completions", status="404") == 20
                and total(series, REQUESTS, model="mistral", path="other", status="404") == 20
                and total(series, REQUESTS, model="", path="other", status="404") == 20
                and total(series, REQUESTS, model="mistral", path="/v1/chat/completions", status="200") == 1
            )

        await until(written_down, "all is counted under known labels")
        series = await metrics(stack)
        assert [key for key in series if "secret" in key or "alias" in key] == []
        known = {"", *MODELS}
        assert {value for key in series for value in re.findall(r'model="([^"]*)"', key)} <= known
