"""The main job on containers: managed and adopted ones, one at a time, all on one port."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import aiohttp
import openai
import pytest

from tests.docker.containers import ADOPTED, MANAGED, MODELS, container_stack
from tests.system.load import clients
from tests.system.test_main_job import one

pytestmark = pytest.mark.docker

REQUESTS = 200
AT_ONCE = 12


@pytest.mark.parametrize("network", [None, "bridge"], ids=["published-ports", "reused-addresses"])
async def test_openai_client_through_six_containers(tmp_path: Path, network: str | None) -> None:
    """200 requests of OpenAI's client in random order: each is answered by the model it named, one container at a time.

    All listen on one port inside. The adopted ones publish the same loopback port, or all get each other's addresses.
    """
    rng = random.Random(3)
    orders = [(rng.choice(MODELS), rng.random() < 0.5) for _ in range(REQUESTS)]
    async with container_stack(tmp_path, network, gateway={"workers": 2}) as run:
        answers: list[tuple[str, str]] = []
        async with openai.AsyncOpenAI(base_url=run.stack.base_url, api_key="none", max_retries=0) as client:

            async def worker() -> None:
                while orders:
                    model, stream = orders.pop()
                    answers.append((model, await one(client, model, stream=stream)))

            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(worker())
        assert len(answers) == REQUESTS
        assert [(model, text) for model, text in answers if f"model={model} " not in text + " "] == []
        await run.stack.settled()
        assert run.watched.most == 1
        assert {*MANAGED, *ADOPTED} == set(run.watched.starts)


def restarted(starts: list[str]) -> list[str]:
    """Return the models whose container was started twice in a row: for one swap, if nobody stopped it meanwhile."""
    return [before for before, after in itertools.pairwise(starts) if before == after]


async def test_orchestrator_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    """kill -9 of the orchestrator at twenty moments of swaps under load: all is answered, no start is made twice."""
    rng = random.Random(5)
    async with container_stack(tmp_path) as run:
        done = asyncio.Event()

        async def load() -> list[str]:
            wrong: list[str] = []
            for seed in itertools.count():
                outcomes = await clients(run.stack.base_url, MODELS, count=12, at_once=6, seed=seed)
                wrong += [str(outcome) for outcome in outcomes if not outcome.right]
                if done.is_set():
                    return wrong
            raise AssertionError

        loading = asyncio.create_task(load())
        for _ in range(20):
            await asyncio.sleep(rng.uniform(0.3, 1.5))
            for orchestrator in run.stack.orchestrators():
                orchestrator.kill()
        done.set()
        assert await loading == []
        await run.stack.settled()
        assert run.watched.most == 1
        assert sum((await run.containers()).values()) == 1
        assert restarted(run.watched.starts) == []


async def test_manual_starts_and_stops_at_random_moments(tmp_path: Path) -> None:
    """``docker start`` and ``docker stop`` at random moments of swaps: all is answered, one model is left running."""
    rng = random.Random(8)
    async with container_stack(tmp_path, "bridge") as run:
        done = asyncio.Event()

        async def load() -> list[str]:
            wrong: list[str] = []
            for seed in itertools.count():
                outcomes = await clients(run.stack.base_url, MODELS, count=12, at_once=6, seed=seed)
                # A stream whose engine was stopped by hand may end in an error; so may one that met two such engines.
                answered = [o for o in outcomes if o.right or (o.first_byte and o.error == "engine_died")]
                wrong += [str(outcome) for outcome in outcomes if outcome not in answered]
                if done.is_set():
                    return wrong
            raise AssertionError

        await clients(run.stack.base_url, MODELS, count=12, at_once=6, seed=100)
        loading = asyncio.create_task(load())
        for _ in range(20):
            await asyncio.sleep(rng.uniform(0.2, 1.0))
            container = await run.container(rng.choice(MODELS))
            if container is not None:
                await (container.start() if rng.random() < 0.5 else container.stop(t=1))
        done.set()
        assert await loading == []
        await run.stack.settled()
        outcomes = await clients(run.stack.base_url, MODELS, count=6, at_once=6, seed=101)
        assert [o for o in outcomes if not o.right] == []
        await run.stack.settled()
        assert sum((await run.containers()).values()) == 1
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{run.stack.orchestrator_port}/metrics") as metrics,
        ):
            told = (await metrics.text()).splitlines()
        assert [
            line for line in told if line.startswith("modelswap_foreign_starts_total{") and not line.endswith(" 0.0")
        ]
