"""A clock that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from itertools import count


class Timer:
    """One call to come at ``when`` (seconds on its clock); `cancel` may be called at any time."""

    __slots__ = ("_call", "when")

    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when = when
        self._call: Callable[[], None] | None = call

    @property
    def pending(self) -> bool:
        """Whether it is still to come."""
        return self._call is not None

    def cancel(self) -> None:
        """Let it not come; nothing happens if it has already."""
        self._call = None

    def fire(self) -> None:
        """Make the call now, once."""
        call, self._call = self._call, None
        if call is not None:
            call()


class FakeClock:
    """Virtual seconds from ``start``; timers fire in order of their times, ties in order of their making."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = count()

    def now(self) -> float:
        """Return the time in seconds."""
        return self._now

    __call__ = now

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        """Have ``call`` made when the clock reaches ``when``; a time that has passed is due at the next advance."""
        timer = Timer(when, call)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def call_later(self, delay: float, call: Callable[[], None]) -> Timer:
        """Have ``call`` made ``delay`` seconds from now."""
        return self.call_at(self._now + delay, call)

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock has moved on by ``seconds``."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        reached = asyncio.get_running_loop().create_future()
        timer = self.call_later(seconds, lambda: None if reached.done() else reached.set_result(None))
        try:
            await reached
        finally:
            timer.cancel()

    def next_timer(self) -> float | None:
        """Return when the next timer is due; None if there is none."""
        while self._timers and not self._timers[0][2].pending:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def advance(self, seconds: float) -> None:
        """Move on by ``seconds``, firing every timer on the way at its own time, those made on the way included."""
        end = self._now + seconds
        while (due := self.next_timer()) is not None and due <= end:
            self._fire(due)
        self._now = end

    async def run(self, seconds: float) -> None:
        """Move on like `advance`, letting the event loop do what each timer woke before the next one fires."""
        end = self._now + seconds
        await _settle()
        while (due := self.next_timer()) is not None and due <= end:
            self._fire(due)
            await _settle()
        self._now = end

    def _fire(self, due: float) -> None:
        _, _, timer = heapq.heappop(self._timers)
        self._now = max(self._now, due)
        timer.fire()


async def _settle() -> None:
    # A woken task may wake another one; chains in tests are far shorter than this.
    for _ in range(20):
        await asyncio.sleep(0)
