"""An owner for what the runtime does on its own, beside its callers."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

_T = TypeVar("_T")

_log = structlog.get_logger(__name__)


class Chores:
    """Owns tasks until they have ended; one that fails is logged, and `close` ends the rest."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, _T], name: str) -> asyncio.Task[_T]:
        """Run ``work`` as a task called ``name``."""
        task = self.start_awaited(work, name)
        task.add_done_callback(_tell)
        return task

    def start_awaited(self, work: Coroutine[Any, Any, _T], name: str) -> asyncio.Task[_T]:
        """Run ``work`` as a task whose failure is told to whoever awaits it, not to the log."""
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def close(self) -> None:
        """Cancel what still runs, and wait for it."""
        while self._running:
            running = list(self._running)
            for task in running:
                task.cancel()
            await asyncio.wait(running)
            self._running.difference_update(running)


def _tell(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("failed", task=task.get_name(), exc_info=error)
