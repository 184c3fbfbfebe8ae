"""Requests of the admin API that wait for the scheduler's answer."""

from __future__ import annotations

import asyncio

from modelswap.core.effects import Answer


class Answers:
    """Numbers requests and hands each its `Answer`."""

    def __init__(self) -> None:
        self._last = 0
        self._waiting: dict[int, asyncio.Future[Answer]] = {}

    def number(self) -> int:
        """Return a number for a request whose answer nobody waits for."""
        self._last += 1
        return self._last

    def expect(self) -> tuple[int, asyncio.Future[Answer]]:
        """Return a number for a request, and where its answer will be; `forget` it in the end."""
        number = self.number()
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        return number, future

    def forget(self, number: int) -> bool:
        """Give up a request; returns whether it had not been answered yet."""
        future = self._waiting.pop(number, None)
        return future is not None and not future.done()

    def give(self, answer: Answer) -> None:
        """Hand an answer to whoever waits for it."""
        future = self._waiting.get(answer.request)
        if future is not None and not future.done():
            future.set_result(answer)
