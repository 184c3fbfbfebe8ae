"""Waiting for what can't be awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object], *, patience: float = 60.0) -> None:
    """Return when ``condition()`` is true; raises `TimeoutError` after ``patience`` seconds."""
    async with asyncio.timeout(patience):
        # The condition is other code's state, and often another process's: there is no event to wait on.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)
