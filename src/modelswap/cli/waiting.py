"""Waiting for one of several things."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any


async def first(*coroutines: Coroutine[Any, Any, Any]) -> int:
    """Run them together until one ends, cancel the others, and return its index (the lowest, if several ended).

    What it raised is raised again.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended = [task.done() for task in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    index = ended.index(True)
    tasks[index].result()
    return index


async def within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for ``event``, at most ``seconds``; return whether it is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
