"""Which requests run: so many at once, and none while the engine sleeps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from modelswap.testing.engine.stats import Stats

Mode = Literal["abort", "wait", "keep"]


class Admission:
    """Counts running and waiting requests into ``stats``; closed, it lets requests queue silently, as vLLM does."""

    def __init__(self, slots: int, stats: Stats) -> None:
        self._slots = asyncio.Semaphore(slots)
        self._stats = stats
        self._opened = asyncio.Event()
        self._opened.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._aborting = False
        self._keeping = False

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Wait for a slot, and hold it."""
        self._stats.waiting += 1
        waiting = True
        try:
            async with self._slots:
                await self._opened.wait()
                self._stats.waiting -= 1
                waiting = False
                self._enter()
                try:
                    yield
                finally:
                    self._leave()
        finally:
            if waiting:
                self._stats.waiting -= 1

    async def may_go_on(self) -> bool:
        """Return, before each token, whether a running request goes on (True) or is aborted; wait while it is kept."""
        if self._opened.is_set():
            return True
        if self._aborting:
            return False
        if self._keeping:
            await self._opened.wait()
        return True

    async def close(self, mode: Mode) -> None:
        """Admit no more; return when nothing runs any more, or at once with mode ``keep``."""
        self._opened.clear()
        self._aborting = mode == "abort"
        self._keeping = mode == "keep"
        if not self._keeping:
            await self._idle.wait()

    def open(self) -> None:
        """Admit again."""
        self._opened.set()

    def _enter(self) -> None:
        self._idle.clear()
        self._stats.running += 1
        self._stats.peak_running = max(self._stats.peak_running, self._stats.running)

    def _leave(self) -> None:
        self._stats.running -= 1
        if self._stats.running == 0:
            self._idle.set()
