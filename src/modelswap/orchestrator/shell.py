"""The one task that owns the scheduler."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import structlog

from modelswap.core import effects, events
from modelswap.core.snapshot import Snapshot

BEAT: Final = 1.0
STUCK_AFTER: Final = 5.0
"""The scheduler's loop counts as stuck when it hasn't come round for this many seconds."""
_BATCH: Final = 256
_LEAST_PAUSE: Final = 0.001

_log = structlog.get_logger(__name__)


class Decides(Protocol):
    """The scheduler, as the shell sees it."""

    def handle(self, event: events.Event) -> list[effects.Effect]:
        """Take in what happened; returns what is to be done, in order."""
        ...

    def next_deadline(self) -> float | None:
        """Return when a `Tick` is wanted, on the clock of events."""
        ...

    def snapshot(self, now: float) -> Snapshot:
        """Return the state as plain data."""
        ...


class Shell:
    """Feeds the scheduler events, one at a time, and has its effects carried out in order.

    ``carry`` must return at once. ``lag`` is told how long each event waited for its turn, in seconds. A failure in
    the scheduler or in ``carry`` is logged and makes the shell unhealthy for good, but the next event is still handled:
    what is resident goes on being served, and a restart adopts it.
    """

    def __init__(
        self,
        scheduler: Decides,
        carry: Callable[[effects.Effect], None],
        *,
        clock: Callable[[], float],
        lag: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.scheduler = scheduler
        self.failures = 0
        self._carry = carry
        self._clock = clock
        self._lag = lag
        self._queue: deque[tuple[events.Event, Callable[[], bool] | None]] = deque()
        self._wake = asyncio.Event()
        self._beat = clock()
        self._failure = ""
        self._running = False
        self._frozen = False

    def post(self, event: events.Event, still: Callable[[], bool] | None = None) -> None:
        """Queue an event. ``still`` is asked right before its turn, and if it says no the event is dropped."""
        if not self._frozen:
            self._queue.append((event, still))
            self._wake.set()

    def freeze(self) -> None:
        """Decide nothing more: what happens from now on (our own connections close) is not for this scheduler."""
        self._frozen = True
        self._queue.clear()
        self._wake.set()

    def snapshot(self) -> Snapshot:
        """Return the scheduler's state as plain data."""
        return self.scheduler.snapshot(self._clock())

    def problems(self) -> list[str]:
        """Return what is wrong with the scheduler's loop, in words; empty if nothing is."""
        found = []
        if not self._running:
            found.append("the scheduler's loop has ended")
        elif (late := self._clock() - self._beat) > STUCK_AFTER:
            found.append(f"the scheduler's loop has been stuck for {late:.0f} s")
        if self._failure:
            found.append(f"the scheduler failed {self.failures} times, last with {self._failure}; restart it")
        return found

    async def run(self) -> None:
        """Go on until cancelled or frozen."""
        self._running = True
        try:
            while not self._frozen:
                self._beat = self._clock()
                for _ in range(_BATCH):
                    if not self._queue:
                        break
                    event, still = self._queue.popleft()
                    self._handle(event, still)
                await self._pause(self._tick())
        finally:
            self._running = False

    def _tick(self) -> float:
        """Say `Tick` if it is time; returns how long nothing will be to do, in seconds."""
        for last in (False, True):
            try:
                deadline = self.scheduler.next_deadline()
            except Exception as error:  # noqa: BLE001 - see the class: it must not silently die
                self._failed(error, "next_deadline")
                return BEAT
            if deadline is None:
                return BEAT
            now = self._clock()
            if deadline > now:
                return min(BEAT, deadline - now)
            if last:
                break
            self._handle(events.Tick(at=now), None)
        return 0.0

    async def _pause(self, seconds: float) -> None:
        if self._queue:
            await asyncio.sleep(0)  # let others have their turn, too
            return
        self._wake.clear()
        try:
            async with asyncio.timeout(max(seconds, _LEAST_PAUSE)):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _handle(self, event: events.Event, still: Callable[[], bool] | None) -> None:
        try:
            if still is not None and not still():
                return
            self._lag(max(0.0, self._clock() - event.at))
            wanted = self.scheduler.handle(event)
        except Exception as error:  # noqa: BLE001 - see the class: it must not silently die
            self._failed(error, repr(event))
            return
        for effect in wanted:
            try:
                self._carry(effect)
            except Exception as error:  # noqa: BLE001 - the effects after it must be carried out all the same
                self._failed(error, repr(effect))

    def _failed(self, error: Exception, during: str) -> None:
        self.failures += 1
        self._failure = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        _log.error("scheduler failed", during=during, story=str(error), exc_info=error)
