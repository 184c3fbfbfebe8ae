"""An owner for tasks that start and end on their own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

_log = structlog.get_logger(__name__)


class Tasks:
    """Owns tasks until they have ended: an unexpected failure is logged and counted, and `close` awaits the rest."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self.failures = 0

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run ``work`` as a task called ``name``."""
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Cancel what still runs, and wait for it."""
        while self._running:
            running = list(self._running)
            for task in running:
                task.cancel()
            await asyncio.wait(running)
            self._running.difference_update(running)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures += 1
            _log.error("task failed", task=task.get_name(), exc_info=error)


async def cancel(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and wait until it has ended; its failure is its owner's to tell."""
    if task is None or task.done():
        return
    task.cancel()
    await asyncio.wait([task])
