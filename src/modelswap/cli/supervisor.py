"""Keeps services running as child processes: starts them, starts again those that die, ends them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Final, Self

from modelswap.cli.failure import ExitCode
from modelswap.cli.parent import PARENT
from modelswap.cli.waiting import within
from modelswap.runtimes.reaper import become_subreaper, reap_orphans

_DELAYS: Final = (0.0, 0.25, 0.5, 1.0, 2.0, 5.0)
_SETTLED_AFTER: Final = 10.0


@dataclass(frozen=True, slots=True)
class Service:
    """One child process to keep running; ``env`` comes on top of ours."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Backoff:
    """How long to wait before a service is started again: not at all at first, then longer, at most 5 s."""

    deaths: int = 0

    def after(self, lived: float) -> float:
        """Return the seconds to wait after it lived ``lived`` seconds; one that lived a while starts afresh."""
        if lived >= _SETTLED_AFTER:
            self.deaths = 0
        delay = _DELAYS[min(self.deaths, len(_DELAYS) - 1)]
        self.deaths += 1
        return delay


@dataclass(slots=True)
class _Kept:
    service: Service
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0


class Supervisor:
    """Owns its services from `start` until they ended; used as ``async with``, and leaving it kills what still runs.

    ``report`` is told in one line what happened. ``output`` is where the services' stdout and stderr go (None: where
    ours go). ``misconfigured`` is set when a service ended because its configuration can't be used, before any of
    its kind ever worked (see `proven`): then starting it again would not help.

    While in use this process takes in its descendants' orphans (Linux), so that no engine is left as a zombie.
    """

    def __init__(self, report: Callable[[str], None], *, output: IO[bytes] | None = None) -> None:
        self.misconfigured = asyncio.Event()
        self._report = report
        self._output = output
        self._kept: dict[str, _Kept] = {}
        self._proven = False
        self._spawning = 0
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        if become_subreaper():
            asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for kept in self._kept.values():
            kept.ending.set()
            _send(kept, signal.SIGKILL)
        if not isinstance(error, asyncio.CancelledError):
            kind = error = trace = None  # what went wrong outside is no business of the group, which would wrap it
        try:
            await self._group.__aexit__(kind, error, trace)
        finally:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)

    def start(self, service: Service) -> None:
        """Start it, and keep it running."""
        kept = self._kept[service.name] = _Kept(service)
        self._group.create_task(self._keep(kept), name=f"keep {service.name}")

    def proven(self) -> None:
        """Say that the services' configuration has been seen to work; from now on every death is worth a restart."""
        self._proven = True

    def pids(self) -> dict[str, int]:
        """Return the PIDs of the services that run now, by name."""
        return {
            name: kept.process.pid
            for name, kept in self._kept.items()
            if kept.process is not None and kept.process.returncode is None
        }

    def restarts(self, name: str) -> int:
        """Return how often the service was started again."""
        return self._kept[name].restarts

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to the service, if it runs."""
        _send(self._kept[name], number)

    async def end(self, names: list[str], grace: float) -> list[str]:
        """Send SIGTERM to these services, SIGKILL after ``grace`` seconds; return whom that had to be, once all ended.

        None of them is started again.
        """
        these = [self._kept[name] for name in names]
        for kept in these:
            kept.ending.set()
            _send(kept, signal.SIGTERM)
        deadline = time.monotonic() + grace
        killed = []
        for kept in these:
            if not await within(kept.ended, max(0.0, deadline - time.monotonic())):
                _send(kept, signal.SIGKILL)
                killed.append(kept.service.name)
        for kept in these:
            await kept.ended.wait()
        return killed

    async def _keep(self, kept: _Kept) -> None:
        backoff = Backoff()
        try:
            while not kept.ending.is_set():
                began = time.monotonic()
                how = await self._live(kept)
                if kept.ending.is_set():
                    return
                if how is None:
                    self.misconfigured.set()
                    return
                delay = backoff.after(time.monotonic() - began)
                again = f"starting it again in {delay:g} s" if delay else "starting it again"
                self._report(f"{kept.service.name} {how}; {again}")
                await within(kept.ending, delay)
                kept.restarts += 1
        finally:
            kept.ended.set()

    async def _live(self, kept: _Kept) -> str | None:
        """Start the service and wait for its end; return how it ended, None if its configuration can't be used."""
        service = kept.service
        self._spawning += 1
        try:
            kept.process = process = await asyncio.create_subprocess_exec(
                *service.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                env={**os.environ, **service.env, PARENT: str(os.getpid())},
                # Ctrl-C in the terminal is for us alone: we end the services in their order.
                process_group=0,
            )
        except OSError as error:
            return f"could not be started: {error.strerror}"
        finally:
            self._spawning -= 1
        try:
            if kept.ending.is_set():  # told to end while it was being started
                _send(kept, signal.SIGTERM)
            status = await process.wait()
        finally:
            if process.returncode is None:
                _send(kept, signal.SIGKILL)
                await process.wait()
            self._reap()
        if status == ExitCode.USAGE and not self._proven:
            return None
        return f"(pid {process.pid}) was killed by signal {-status}" if status < 0 else f"exited with status {status}"

    def _reap(self) -> None:
        # A child that asyncio has started but not yet shown to us must not be taken for an orphan.
        if not self._spawning:
            reap_orphans(list(self.pids().values()))


def _send(kept: _Kept, number: signal.Signals) -> None:
    if kept.process is not None and kept.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            kept.process.send_signal(number)
