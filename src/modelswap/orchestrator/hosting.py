"""What runs now, and what the executors of effects work with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import aiohttp
import structlog

from modelswap.core.events import Event
from modelswap.devices.base import Device
from modelswap.engines.base import Address, Engine
from modelswap.orchestrator import hostmemory
from modelswap.orchestrator.budget import Ranking
from modelswap.orchestrator.journal import Journal
from modelswap.orchestrator.measurements import Measurements
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import Exit, Running, Runtime
from modelswap.spec.config import Model

SHOWN_LINES: Final = 10
"""How many of an engine's last log lines go into a message for clients."""

FIRST_PAUSE: Final = 0.002
FAST_PAUSE: Final = 0.05
SLOW_PAUSE: Final = 0.25
SLOW_AFTER: Final = 10.0

LOST_PAUSE: Final = 1.0
"""How long to wait before asking again a runtime that can't tell whether an instance runs, in seconds."""

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Hosted:
    """An instance from its `BringIn` (or adoption) until nothing of it runs."""

    instance: str
    model: str
    definition: str
    spec: Model
    engine: Engine
    address: Address | None = None
    running: Running | None = None
    slots: int = 0
    ready: bool = False
    job: asyncio.Task[None] | None = None
    """Its bringing-in, falling asleep or waking, while that goes on."""
    watch: asyncio.Task[None] | None = None
    leaving: bool = False
    """It is being put out: what it does now is no news."""
    canary_seconds: float = 0.0
    """What proving its answers took, the last time that it came in."""
    held: int | None = None
    """Bytes that it took of the device while awake, as far as that could be read."""
    asleep: int = 0
    """The level that it sleeps at, 0 while it is awake; also while it falls asleep or wakes."""
    residue: int = 0
    """Bytes that it holds on the device while asleep."""
    host_bytes: int = 0
    """Host memory that counts against the budget for it: reserved before its first sleep, and kept until it ends."""
    levels: set[int] = field(default_factory=set)
    """The levels that it has slept at and woken from, if only under an earlier orchestrator."""
    given_up: bool = False
    """The scheduler has been asked to stop it in its sleep."""


@dataclass(slots=True, eq=False)
class Preparing:
    """A model that is being made ready ahead of time, and how far that is; ``began`` on the scheduler's clock."""

    model: str
    definition: str
    began: float
    stage: str = ""
    fraction: float | None = None
    job: asyncio.Task[None] | None = None


@dataclass(slots=True, kw_only=True)
class HostMemory:
    """What may be spent on sleepers and standbys; see `hostmemory.spare`. Bytes."""

    budget: Callable[[], int | None] = lambda: None
    """The config's; None: whatever is safe."""
    available: Callable[[], int] = hostmemory.available
    total: int = field(default_factory=hostmemory.total)
    standbys: Callable[[], int] = lambda: 0
    """What standbys take now."""


@dataclass(slots=True, eq=False)
class Outside:
    """The outside world, as executors see it. ``post`` gives the scheduler an event; ``clock`` is its clock."""

    runtime: Runtime
    device: Device
    http: aiohttp.ClientSession
    journal: Journal
    measurements: Measurements
    post: Callable[[Event], None]
    clock: Callable[[], float]
    memory: HostMemory = field(default_factory=HostMemory)
    ranking: Ranking = field(default_factory=Ranking)
    weights: dict[str, int] = field(default_factory=dict)
    """The bytes of models' weights by their definition, where they are known."""
    hosted: dict[str, Hosted] = field(default_factory=dict)
    free_when_empty: int | None = None
    """Bytes that were free on the device when it was last verified with nothing of ours on it."""
    preparing: dict[str, Preparing] = field(default_factory=dict)
    """By model, while it goes on."""
    told: dict[str, Model] = field(default_factory=dict)
    """By definition, somebody else's containers as models with the same command and environment (`abilities`)."""
    suspects: dict[tuple[str, str], str] = field(default_factory=dict)
    """By model and definition, why its last start from a standby failed; the next one is cold (`trust`)."""
    without_standby: set[str] = field(default_factory=set)
    """Models that are to be started cold, though a standby may wait for them."""
    turning_away: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """Stops of instances that others have started; no start may begin meanwhile."""

    async def ended(self, running: Running) -> Exit:
        """Return when the instance has ended; a runtime that can't tell for now is asked again."""
        told = False
        while True:
            try:
                return await self.runtime.wait(running)
            except ModelswapError as error:
                if not told:
                    told = True
                    _log.warning("can't be watched", model=running.model, instance=running.instance, reason=str(error))
                await asyncio.sleep(LOST_PAUSE)

    async def listening(self, running: Running) -> bool:
        """Return whether the very instance listens, as far as its runtime can tell for now."""
        try:
            return await self.runtime.listening(running)
        except ModelswapError as error:
            _log.warning("can't be watched", model=running.model, instance=running.instance, reason=str(error))
            return False

    async def last_lines(self, hosted: Hosted, lines: int = SHOWN_LINES) -> list[str]:
        """Return an instance's last log lines, without the model's API key; none if they can't be read."""
        try:
            tail = await self.runtime.log_tail(hosted.model, lines, hosted.instance)
        except Exception as error:  # noqa: BLE001 - they only explain what must be told in any case
            _log.warning("log can't be read", model=hosted.model, instance=hosted.instance, error=repr(error))
            return []
        return redacted(tail, hosted.spec)


def pause(elapsed: float) -> float:
    """Return how long to wait before looking again, after ``elapsed`` seconds: about 3 % of them."""
    if elapsed < SLOW_AFTER:
        return min(FAST_PAUSE, max(FIRST_PAUSE, elapsed * 0.03))
    return min(SLOW_PAUSE, elapsed * 0.01)


def redacted(lines: list[str], model: Model) -> list[str]:
    """Return log lines without the model's API key, which some engines print with their arguments."""
    key = model.api_key.get_secret_value() if model.api_key is not None else ""
    return [line.replace(key, "***") for line in lines] if key else lines


def told(reason: str, lines: list[str]) -> str:
    """Return a message for clients: the reason, then the engine's last log lines."""
    return f"{reason}\nIts last log lines:\n" + "\n".join(lines) if lines else reason


def engine_session() -> aiohttp.ClientSession:
    """Return a session for talking to engines: a fresh connection each time, no limits, no proxies, no cookies.

    An engine's address may be another engine's a moment later, so no connection is ever kept.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(force_close=True, limit=0, enable_cleanup_closed=False),
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
    )
