"""Sleeping and waking, as vLLM's development endpoints do it, and SGLang's release and resume."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from modelswap.testing.engine.admission import Admission, Mode
from modelswap.testing.engine.behaviour import Behaviour
from modelswap.testing.engine.memory import DeviceMemory
from modelswap.testing.engine.options import Options
from modelswap.testing.ledger import OutOfDeviceMemory

Crash = Callable[[], Awaitable[None]]


class Disturbed(Exception):
    """Sleep or wake was told to fail."""


class Slumber:
    """How deep the engine sleeps.

    ``level`` is 0 awake, 1 (weights kept in host memory) or 2 (weights dropped). ``garbage`` is True when the weights
    in use are not the model's: nobody reloaded them after level 2, or it was told so. ``later`` runs what goes on after
    an answer.
    """

    def __init__(
        self,
        options: Options,
        memory: DeviceMemory,
        admission: Admission,
        later: Callable[[asyncio._CoroutineLike[None]], Any],
    ) -> None:
        self.level = 0
        self._dropped = False
        self._garbled = False
        self._slept_at = 0
        self._options = options
        self._memory = memory
        self._admission = admission
        self._later = later
        self._weights = True
        self._kv_cache = True
        self._sleeps = 0
        self._wakes = 0
        # One transition at a time, as in an engine's own loop.
        self._turn = asyncio.Lock()

    @property
    def garbage(self) -> bool:
        """Whether its answers are gibberish."""
        return self._dropped or self._garbled

    async def sleep(self, level: int, mode: Mode, behaviour: Behaviour, crash: Crash) -> None:
        """Let running requests end as ``mode`` says, then give memory back; raises `Disturbed` if told to."""
        self._sleeps += 1
        behaviour = _now(behaviour, self._sleeps)
        async with self._turn:
            if behaviour.sleep == "fail":
                raise Disturbed("simulated failure to sleep")
            if behaviour.sleep == "ignore":
                return
            await self._admission.close(mode)
            await _strike("sleep", behaviour, crash)
            self.level = self._slept_at = level
            self._dropped = self._dropped or level == 2
            if behaviour.early_sleep is not None:
                self._later(self._give_back_late(behaviour.early_sleep, behaviour))
                return
            await asyncio.sleep(self._options.sleep_seconds)
            self._give_back(behaviour)

    async def wake(self, tags: list[str], behaviour: Behaviour, crash: Crash) -> None:
        """Take back what ``tags`` say (``weights``, ``kv_cache``; none: both).

        Raises `modelswap.testing.ledger.OutOfDeviceMemory`; it then sleeps on, and can be woken once memory is free.
        Raises `Disturbed` if told to.
        """
        async with self._turn:
            if not self.level:
                return
            self._wakes += 1
            behaviour = _now(behaviour, self._wakes)
            await _strike("wake", behaviour, crash)
            if behaviour.wake == "fail":
                raise Disturbed("simulated failure to wake")
            if behaviour.wake == "oom":
                raise OutOfDeviceMemory(self._options.gpu_bytes, 0, self._options.gpu_bytes)
            await asyncio.sleep(self._options.wake_seconds)
            weights = self._weights or not tags or "weights" in tags
            kv_cache = self._kv_cache or not tags or "kv_cache" in tags
            self._memory.wake(behaviour, weights=weights, kv_cache=kv_cache)
            self._weights, self._kv_cache = weights, kv_cache
            self._garbled = self._garbled or behaviour.garbled == self._slept_at
            if weights and kv_cache:
                self.level = 0
                self._admission.open()

    def reload_weights(self) -> bool:
        """Read the weights from disk again; returns False if there is no memory for them, because they sleep."""
        if self._weights:
            self._dropped = False
        return self._weights

    async def _give_back_late(self, seconds: float, behaviour: Behaviour) -> None:
        async with self._turn:
            await asyncio.sleep(seconds)
            self._give_back(behaviour)

    def _give_back(self, behaviour: Behaviour) -> None:
        self._memory.sleep(behaviour)
        self._weights = self._kv_cache = False


def _now(behaviour: Behaviour, count: int) -> Behaviour:
    """Return ``behaviour`` as it is at the ``count``-th sleep or wake."""
    if behaviour.nth is None or behaviour.nth == count:
        return behaviour
    return msgspec.structs.replace(
        behaviour, sleep=None, wake=None, early_sleep=None, no_rollback=False, garbled=None, hang=None, crash=None
    )


async def _strike(where: str, behaviour: Behaviour, crash: Crash) -> None:
    if behaviour.crash == where:
        await crash()
    if behaviour.hang == where:
        await asyncio.get_running_loop().create_future()
