"""The main job through the front door: the official client, many models, one device."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.system.load import ask, clients
from tests.system.stack import MODELS, Stack

REQUESTS = 500
AT_ONCE = 16


async def one(client: openai.AsyncOpenAI, model: str, *, stream: bool) -> str:
    """Ask through the asynchronous client; return the answer's text."""
    messages: Any = [{"role": "user", "content": "who are you?"}]
    if not stream:
        answer = await client.chat.completions.create(model=model, messages=messages)
        return answer.choices[0].message.content or ""
    text = ""
    async for chunk in await client.chat.completions.create(model=model, messages=messages, stream=True):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
    return text


def one_sync(client: openai.OpenAI, model: str, *, stream: bool) -> str:
    """Ask through the synchronous client; return the answer's text."""
    messages: Any = [{"role": "user", "content": "who are you?"}]
    if not stream:
        answer = client.chat.completions.create(model=model, messages=messages)
        return answer.choices[0].message.content or ""
    text = ""
    for chunk in client.chat.completions.create(model=model, messages=messages, stream=True):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
    return text


@pytest.mark.long
@pytest.mark.parametrize("same_address", [False, True], ids=["fresh-addresses", "reused-address"])
async def test_openai_clients_through_three_models(tmp_path: Path, *, same_address: bool) -> None:
    """500 requests of OpenAI's clients, 16 at a time, no retries: each is answered by the model it named.

    Half through the synchronous client, half through the asynchronous one, half streamed; also when every engine
    is started at the very address that another one just left.
    """
    rng = random.Random(7)
    orders = [(rng.choice(MODELS), rng.random() < 0.5) for _ in range(REQUESTS)]
    ports: dict[str, Any] = {"orchestrator": {"engine_ports": "31999-31999"}} if same_address else {}
    async with Stack(tmp_path, workers=2, **ports) as stack:
        answers: list[tuple[str, str]] = []
        asynchronous = openai.AsyncOpenAI(base_url=stack.base_url, api_key="none", max_retries=0)
        synchronous = openai.OpenAI(base_url=stack.base_url, api_key="none", max_retries=0)

        async def client(*, use_async: bool) -> None:
            while orders:
                model, stream = orders.pop()
                if use_async:
                    answers.append((model, await one(asynchronous, model, stream=stream)))
                else:
                    answers.append((model, await asyncio.to_thread(one_sync, synchronous, model, stream=stream)))

        async with asyncio.TaskGroup() as group:
            for number in range(AT_ONCE):
                group.create_task(client(use_async=number % 2 == 0))
        await asynchronous.close()
        synchronous.close()
        assert len(answers) == REQUESTS
        assert [(model, text) for model, text in answers if f"model={model} " not in text] == []
        stack.assert_never_overlapped()
        await stack.settled()


async def test_slots_bound_what_an_engine_runs(tmp_path: Path) -> None:
    """An engine never runs more requests at once than its slots, whatever arrives through how many workers."""
    async with Stack(tmp_path, workers=2) as stack:
        outcomes = await clients(
            stack.base_url, ("mistral",), count=60, at_once=30, seed=1, sim={"first_token_seconds": 0.02}
        )
        assert all(outcome.right for outcome in outcomes), [o for o in outcomes if not o.right][:3]
        status = await stack.status()
        [instance] = [i for i in status["instances"] if i["model"] == "mistral"]
        url = f"http://{instance['host']}:{instance['port']}/sim/stats"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            stats = await answer.json()
        assert stats["stats"]["peak_running"] <= 4


async def test_resident_model_needs_no_orchestrator(tmp_path: Path) -> None:
    """While the orchestrator is away, the resident model is served and others' requests wait for its return."""
    async with Stack(tmp_path) as stack, aiohttp.ClientSession() as session:
        assert (await ask(session, stack.base_url, "mistral", stream=False)).right
        [orchestrator] = stack.orchestrators()
        orchestrator.suspend()
        waiting = asyncio.create_task(ask(session, stack.base_url, "coder", stream=False))
        for stream in (True, False):
            assert (await ask(session, stack.base_url, "mistral", stream=stream)).right
        assert not waiting.done()
        orchestrator.resume()
        assert (await waiting).right
