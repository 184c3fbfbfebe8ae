"""Drives a `System` through time: latencies, load and service times, arrivals."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from modelswap.simulator.links import Link
from modelswap.simulator.setup import Setup
from modelswap.simulator.system import System
from modelswap.simulator.tasks import Kind, Task
from modelswap.simulator.traffic import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long things take, in seconds; called anew each time, so that they can be drawn from distributions."""

    service: Callable[[Request], float]
    load: Callable[[str], float]
    stop: Callable[[str], float] = lambda model: 0.0
    release: Callable[[str], float] = lambda device: 0.0
    prepare: Callable[[str], float] = lambda model: 0.0
    sleep: Callable[[str], float] = lambda model: 0.0
    wake: Callable[[str], float] = lambda model: 0.0
    latency: Callable[[], float] = lambda: 0.0002


class Timed:
    """A system with its agenda."""

    def __init__(self, setup: Setup, timing: Timing) -> None:
        self._timing = timing
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._last: dict[tuple[int, bool], float] = {}
        self._on_end: list[Callable[[Request], None]] = []
        self._tick_at: float | None = None
        self._now = 0.0
        self.system = System(setup, self)
        for name in setup.gateways:
            self.system.connect(name)
            self.after(0.0, self._ticker(name))

    # ── for the caller ───────────────────────────────────────────────────────────────────────────────────

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Have something done later."""
        self._sequence += 1
        heapq.heappush(self._agenda, (self._now + seconds, self._sequence, do))

    def on_end(self, do: Callable[[Request], None]) -> None:
        """Have something done whenever a request has its outcome."""
        self._on_end.append(do)

    def run(self, until: float) -> None:
        """Let everything happen up to a time."""
        while True:
            deadline = self.system.scheduler.next_deadline() if self.system.scheduler is not None else None
            following = self._agenda[0][0] if self._agenda else until
            if deadline is not None and max(deadline, self._now) < min(following, until):
                self._set(max(deadline, self._now))
                self.system.tick()
            elif following < until:
                at, _, do = heapq.heappop(self._agenda)
                self._set(at)
                do()
            else:
                self._set(until)
                return

    # ── what the system tells ────────────────────────────────────────────────────────────────────────────

    def said(self, link: Link, *, up: bool) -> None:
        """Deliver it after the latency, in order."""
        at = max(self._now + self._timing.latency(), self._last.get((link.id, up), 0.0))
        self._last[link.id, up] = at
        self.after(at - self._now, lambda: self._deliver(link, up))

    def began(self, task: Task) -> None:
        """Complete it when its time has come, unless it was cancelled."""
        match task.kind:
            case Kind.BRING_IN:
                seconds = self._timing.load(task.model)
            case Kind.PREPARE:
                seconds = self._timing.prepare(task.model)
            case Kind.PUT_OUT | Kind.TURN_AWAY:
                seconds = self._timing.stop(task.model)
            case Kind.SLEEP:
                seconds = self._timing.sleep(task.model)
            case Kind.WAKE:
                seconds = self._timing.wake(task.model)
            case Kind.VERIFY:
                seconds = self._timing.release(task.subject)
            case _:
                seconds = self._timing.latency()
        self.after(seconds, lambda: self._complete(task))

    def sent(self, request: Request) -> None:
        """Finish it when it has been served."""
        sent = request.sent
        self.after(self._timing.service(request), lambda: self._finish(request, sent))

    def ended(self, request: Request) -> None:
        """Tell whoever waits, once what is going on now is done."""
        for do in self._on_end:
            self.after(0.0, lambda do=do: do(request))  # type: ignore[misc]

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────

    def _set(self, now: float) -> None:
        self._now = self.system.now = now

    def _deliver(self, link: Link, up: bool) -> None:
        if up:
            if link.up and link in self.system.arriving:
                self.system.deliver_up(link)
        elif link.down and self.system.gateways[link.gateway].link is link:
            self.system.deliver_down(link.gateway)

    def _complete(self, task: Task) -> None:
        if task.id in self.system.tasks:
            self.system.complete(task)

    def _finish(self, request: Request, sent: float | None) -> None:
        if request.outcome is None and request.sent == sent and self.system.running_on(request.id) is not None:
            self.system.finish(request)

    def _ticker(self, name: str) -> Callable[[], None]:
        def tick() -> None:
            gateway = self.system.gateways[name]
            gateway.tick(self._now)
            self.after(gateway.next_tick - self._now, tick)

        return tick
