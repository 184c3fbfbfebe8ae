"""Carries out `effects.ReadAhead`: one reading at a time for each device, ended at once by the next.

Nothing waits for it and nothing fails by it: whatever goes wrong, the engine reads its weights itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from modelswap.core import effects
from modelswap.orchestrator import hostmemory
from modelswap.orchestrator.facts import Configured
from modelswap.orchestrator.hosting import Outside
from modelswap.orchestrator.metrics import Metrics
from modelswap.orchestrator.pagecache import Outcome, Tally, read_ahead
from modelswap.orchestrator.preparing import Weights
from modelswap.orchestrator.tasks import Tasks, cancel
from modelswap.spec.config import Model

LEAVE: Final = 1.0
"""How long one that is given up is waited for, in seconds: a disk may keep its thread for longer."""

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Ahead:
    """A reading under way; ``began`` on the scheduler's clock."""

    model: str
    began: float
    tally: Tally = field(default_factory=Tally)


class ReadingAhead:
    """Reads weights into the page cache, where they are files that we see and host memory has room for them.

    ``configured`` returns the config that the scheduler was told last.
    """

    def __init__(
        self, outside: Outside, weights: Weights, metrics: Metrics, tasks: Tasks, configured: Callable[[], Configured]
    ) -> None:
        self._outside = outside
        self._weights = weights
        self._metrics = metrics
        self._tasks = tasks
        self._configured = configured
        self._jobs: dict[str, asyncio.Task[None]] = {}
        """The last reading of each device, which may have ended."""
        self._under_way: dict[str, _Ahead] = {}

    def turn_to(self, effect: effects.ReadAhead) -> None:
        """Give up what is being read for a device, and begin with another model's weights if there is one."""
        before = self._jobs.get(effect.device)
        if before is not None:
            before.cancel()
        configured = self._configured()
        rate = int(configured.config.device.read_ahead)
        spec = configured.config.models.get(effect.model) if effect.model is not None else None
        if (
            effect.model is None
            or spec is None
            or configured.definitions[effect.model] != effect.definition
            or not rate
        ):
            return
        work = self._read(effect.device, effect.model, spec, rate, before)
        self._jobs[effect.device] = self._tasks.start(work, f"read ahead {effect.model}")

    def told(self, device: str) -> dict[str, Any] | None:
        """Return how far the reading for a device is, as ``GET /status`` shows it; None if nothing is being read."""
        ahead = self._under_way.get(device)
        if ahead is None:
            return None
        tally = ahead.tally
        return {
            "model": ahead.model,
            "bytes": tally.read,
            "cached_bytes": tally.cached,
            "total_bytes": tally.total,
            "seconds": self._outside.clock() - ahead.began,
        }

    async def _read(self, device: str, model: str, spec: Model, rate: int, before: asyncio.Task[None] | None) -> None:
        await cancel(before)
        try:
            files = await self._weights.files(model, spec)
        except OSError as error:
            _log.debug("can't be read ahead", model=model, error=str(error))
            return
        if not files:
            return
        ahead = self._under_way[device] = _Ahead(model, self._outside.clock())
        outcome = Outcome.STOPPED
        try:
            outcome = await beside(lambda stop: self._read_files(files, ahead.tally, rate, stop), f"read ahead {model}")
        finally:
            del self._under_way[device]
            self._ended(ahead, outcome)

    def _read_files(self, files: list[Path], tally: Tally, rate: int, stop: threading.Event) -> Outcome:
        return read_ahead(files, tally, rate=rate, room=self._room, pause=stop.wait)

    def _room(self) -> int:
        # What is cached can be had again, so it counts as available, and reading doesn't make that less.
        memory = self._outside.memory
        return hostmemory.spare(None, 0, memory.available(), memory.total)

    def _ended(self, ahead: _Ahead, outcome: Outcome) -> None:
        seconds, tally = self._outside.clock() - ahead.began, ahead.tally
        self._metrics.read_ahead(ahead.model, tally.read, tally.cached, seconds)
        _log.info(
            "read ahead",
            model=ahead.model,
            outcome=str(outcome),
            bytes=tally.read,
            cached_bytes=tally.cached,
            total_bytes=tally.total,
            seconds=round(seconds, 3),
        )


async def beside(work: Callable[[threading.Event], _T], name: str) -> _T:
    """Run ``work`` in a thread of its own, and return what it returns.

    When cancelled it sets the event that ``work`` is given, and waits for the thread's end for `LEAVE` seconds at most.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[_T] = loop.create_future()
    stop = threading.Event()

    def run() -> None:
        try:
            result = work(stop)
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is awaited
            _tell(loop, ended.set_exception, error)
        else:
            _tell(loop, ended.set_result, result)

    # A daemon, so that a disk that doesn't answer can't keep the process.
    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        return await asyncio.shield(ended)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([ended], timeout=LEAVE)
        raise


def _tell(loop: asyncio.AbstractEventLoop, tell: Callable[[Any], None], what: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and whoever waited
        loop.call_soon_threadsafe(tell, what)
