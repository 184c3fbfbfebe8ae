"""Waiting for what an engine says in its log."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from modelswap.runtimes.base import Running, Runtime

DEADLINE: Final = 30.0


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return when the condition holds; fails after `DEADLINE` seconds."""
    async with asyncio.timeout(DEADLINE):
        while not await condition():  # noqa: ASYNC110 - what is looked at are other processes
            await asyncio.sleep(0.005)


async def says(runtime: Runtime, running: Running, word: str) -> list[str]:
    """Return the log's words after ``word``, once the engine has said it."""
    found: list[str] = []

    async def said() -> bool:
        lines = await runtime.log_tail(running.model, 100, running.instance)
        found[:] = next((line.split()[1:] for line in lines if line.split()[:1] == [word]), [])
        return any(line.split()[:1] == [word] for line in lines)

    await until(said)
    return found
