"""Sleeping and waking, as vLLM's development endpoints do it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from modelswap.testing.engine.admission import Admission, Mode
from modelswap.testing.engine.behaviour import Behaviour
from modelswap.testing.engine.memory import DeviceMemory
from modelswap.testing.engine.options import Options


class Slumber:
    """How deep the engine sleeps.

    ``level`` is 0 awake, 1 (weights kept in host memory) or 2 (weights dropped). ``garbage`` is True when the weights
    in use are not the model's, because nobody reloaded them after level 2.
    """

    def __init__(self, options: Options, memory: DeviceMemory, admission: Admission) -> None:
        self.level = 0
        self.garbage = False
        self._options = options
        self._memory = memory
        self._admission = admission
        self._weights = True
        self._kv_cache = True
        # One transition at a time, as in an engine's own loop.
        self._turn = asyncio.Lock()

    async def sleep(self, level: int, mode: Mode, behaviour: Behaviour, crash: Callable[[], Awaitable[None]]) -> None:
        """Let running requests end as ``mode`` says, then give memory back."""
        async with self._turn:
            await self._admission.close(mode)
            if behaviour.crash == "sleep":
                await crash()
            await asyncio.sleep(self._options.sleep_seconds)
            self._memory.sleep(behaviour)
            self.level = level
            self.garbage = self.garbage or level == 2
            self._weights = self._kv_cache = False

    async def wake(self, tags: list[str], behaviour: Behaviour, crash: Callable[[], Awaitable[None]]) -> None:
        """Take back what ``tags`` say (``weights``, ``kv_cache``; none: both).

        Raises `modelswap.testing.ledger.OutOfDeviceMemory`; it then sleeps on, and can be woken once memory is free.
        """
        async with self._turn:
            if not self.level:
                return
            if behaviour.crash == "wake":
                await crash()
            await asyncio.sleep(self._options.wake_seconds)
            weights = self._weights or not tags or "weights" in tags
            kv_cache = self._kv_cache or not tags or "kv_cache" in tags
            self._memory.wake(behaviour, weights=weights, kv_cache=kv_cache)
            self._weights, self._kv_cache = weights, kv_cache
            if weights and kv_cache:
                self.level = 0
                self._admission.open()

    def reload_weights(self) -> bool:
        """Read the weights from disk again; returns False if there is no memory for them, because they sleep."""
        if self._weights:
            self.garbage = False
        return self._weights
