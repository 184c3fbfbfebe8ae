"""Clients that note what became of each request."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(slots=True)
class Outcome:
    """One request's end. ``first_byte``: a response began; ``complete``: it ended as it should."""

    model: str
    stream: bool
    status: int = 0
    first_byte: bool = False
    complete: bool = False
    text: str = ""
    error: str = ""

    @property
    def right(self) -> bool:
        """Whether it was answered in full by the model that it named."""
        return self.status == 200 and self.complete and f"model={self.model} " in self.text + " "


async def ask(
    session: aiohttp.ClientSession, base_url: str, model: str, *, stream: bool, sim: dict[str, Any] | None = None
) -> Outcome:
    """Send one chat request and read its answer to the end."""
    outcome = Outcome(model, stream)
    body: dict[str, Any] = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "hi"}]}
    if sim is not None:
        body["sim"] = sim
    try:
        async with session.post(f"{base_url}/chat/completions", json=body) as response:
            outcome.status = response.status
            if not stream:
                outcome.first_byte = True
                answer = await response.json()
                if response.status == 200:
                    outcome.text = answer["choices"][0]["message"]["content"]
                    outcome.complete = True
                else:
                    outcome.error = answer["error"]["code"]
                return outcome
            outcome.first_byte = True
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                data = line[6:].strip()
                if data == b"[DONE]":
                    outcome.complete = True
                    continue
                event = json.loads(data)
                if "error" in event:
                    outcome.error = event["error"]["code"]
                elif event.get("choices"):
                    outcome.text += event["choices"][0]["delta"].get("content") or ""
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def clients(
    base_url: str, models: tuple[str, ...], *, count: int, at_once: int, seed: int, sim: dict[str, Any] | None = None
) -> list[Outcome]:
    """Send ``count`` requests, ``at_once`` at a time, to random models, streamed or not."""
    rng = random.Random(seed)
    orders = [(rng.choice(models), rng.random() < 0.5) for _ in range(count)]
    outcomes: list[Outcome] = []
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def client() -> None:
            while orders:
                model, stream = orders.pop()
                outcomes.append(await ask(session, base_url, model, stream=stream, sim=sim))

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(client())
    return outcomes
