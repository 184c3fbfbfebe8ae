"""The whole of modelswap on one machine: one orchestrator and the gateway's workers, started and ended in order."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiohttp

from modelswap.cli import addresses
from modelswap.cli.client import AdminClient
from modelswap.cli.failure import ExitCode, Failure
from modelswap.cli.supervisor import Service, Supervisor
from modelswap.cli.waiting import first
from modelswap.engines.registry import engine_for
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.hosts import hosts_of
from modelswap.spec.config import Config

_ORCHESTRATOR: Final = "orchestrator"
_READY_WITHIN: Final = 60.0
_LOOK_EVERY: Final = 0.1
_TELL_EVERY: Final = 2.0
_PORTS_FREE_WITHIN: Final = 15.0
_SERVICE_GRACE: Final = 15.0
_AWAY_FOR_LONG: Final = 20.0
_FAILING_FOR_LONG: Final = 3.0
_STATUS_EVERY: Final = 0.5
_HEALTH_EVERY: Final = 5.0
_HEALTH_WITHIN: Final = 10.0
_HEALTH_FAILURES: Final = 3
_HURRIED_STOP: Final = 8.0

Say = Callable[[str], None]


async def check_addresses(config: Config, say: Say) -> None:
    """Raise `Failure` if an address that the services need can't be had.

    The services of an earlier supervisor that was killed are about to end: they are waited for.
    """
    wanted = {
        "gateway.port": (config.gateway.host, config.gateway.port),
        "orchestrator.port": (config.orchestrator.host, config.orchestrator.port),
    }
    for key, (_, port) in wanted.items():
        if port == 0:
            raise Failure(f"{key} is 0, which no client could find", f"name a port in {key}", ExitCode.USAGE)
    deadline = time.monotonic() + _PORTS_FREE_WITHIN
    for key, (host, port) in wanted.items():
        told = False
        while (found := addresses.unusable(host, port)) is not None:
            leaving = found.holder is not None and found.holder.leaving
            if not leaving or time.monotonic() > deadline:
                raise _unusable(key, found)
            if not told:
                say(f"waiting for {found.holder} of an earlier run to end and free port {port}")
                told = True
            await asyncio.sleep(_LOOK_EVERY)


def _unusable(key: str, found: addresses.Unusable) -> Failure:
    if not found.in_use:
        host_key = key.replace("port", "host")
        return Failure(found.reason, f"change {key} or {host_key} in the config file", ExitCode.FAILED)
    return Failure(found.reason, f"stop that, or give another {key} in the config file", ExitCode.FAILED)


class Stack:
    """Runs the services of ``config`` (read from ``path``) under ``supervisor``; ``say`` tells the user in one line."""

    def __init__(self, config: Config, path: Path, supervisor: Supervisor, say: Say) -> None:
        self.config = config
        self.gateway_url = addresses.url(config.gateway.host, config.gateway.port)
        self.orchestrator_url = addresses.url(config.orchestrator.host, config.orchestrator.port)
        self._path = path.absolute()
        self._supervisor = supervisor
        self._say = say
        self._gateways = [f"gateway-{worker}" for worker in range(config.gateway.workers)]

    def start(self) -> None:
        """Start all services."""
        command = (sys.executable, "-m", "modelswap.cli.main")
        tail = ("--config", str(self._path))
        self._supervisor.start(Service(_ORCHESTRATOR, (*command, "orchestrator", *tail)))
        for worker, name in enumerate(self._gateways):
            self._supervisor.start(Service(name, (*command, "gateway", "--worker", str(worker), *tail)))

    def reload(self) -> None:
        """Have the config file read again; gateways hear of what changed from the orchestrator."""
        self._supervisor.signal(_ORCHESTRATOR, signal.SIGHUP)

    async def ready(self) -> None:
        """Return when both services say that they are well; raises `Failure` if they don't within a minute."""
        began = told = time.monotonic()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as http:
            for what, url in (("orchestrator", self.orchestrator_url), ("gateway", self.gateway_url)):
                while not await _healthy(http, f"{url}/health"):
                    now = time.monotonic()
                    if now - began > _READY_WITHIN:
                        raise Failure(f"the {what} did not come up within {_READY_WITHIN:g} s", "see its log")
                    if now - told > _TELL_EVERY:
                        self._say(f"waiting for the {what} at {url} ({now - began:.0f} s)")
                        told = now
                    await asyncio.sleep(_LOOK_EVERY)
        self._supervisor.proven()

    async def stop(self, hurry: asyncio.Event) -> None:
        """Let running requests finish, stop every engine, then end the services; with ``hurry`` set, all at once."""
        if hurry.is_set() or await first(self._stop_in_order(), hurry.wait()) == 1:
            self._say("stopping at once")
            await self._shut_down_now()
            # The gateways first: so the orchestrator sees that they have gone, and the next one needn't wait for them.
            await self._supervisor.end(self._gateways, 0.5)
            await self._supervisor.end([_ORCHESTRATOR], 0.5)
        await self.sweep()

    async def end_services(self) -> None:
        """End the services and leave the engines as they are."""
        # The gateways first: they have nothing left to send when their engines have stopped.
        killed = await self._supervisor.end(self._gateways, _SERVICE_GRACE)
        killed += await self._supervisor.end([_ORCHESTRATOR], _SERVICE_GRACE)
        for name in killed:
            self._say(f"{name} did not end within {_SERVICE_GRACE:g} s and was killed")

    async def sweep(self) -> None:
        """End what is left of engines, also in containers; there is nothing left after an orderly stop."""
        from modelswap.orchestrator.facts import Configured
        from modelswap.orchestrator.state import state_dir

        async with hosts_of(state_dir(self.config), lambda: self.config) as hosts:
            try:
                await hosts.configure(Configured.of(self.config, engine_for).known())
            except ModelswapError as away:
                self._say(f"containers can't be looked after: {away}")
            for left in await hosts.sweep(set()):
                self._say(f"killed {left}")
            for running in await hosts.instances():  # others have started them; nothing would put them out now
                await hosts.stop(running, 0)
                self._say(f"killed container {running.container[:12]} of {running.model}")

    async def watch(self, every: float = _HEALTH_EVERY) -> None:
        """Kill an orchestrator that says that it can't decide any more, or says nothing: the next one takes over.

        Neither engines nor streams notice. It is asked ``every`` so many seconds, until we are cancelled.
        """
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_HEALTH_WITHIN)) as http:
            failures = 0
            while True:
                await asyncio.sleep(every)
                pid = self._supervisor.pids().get(_ORCHESTRATOR)
                if pid is None or await _healthy(http, f"{self.orchestrator_url}/health"):
                    failures = 0
                    continue
                failures += 1
                if failures == _HEALTH_FAILURES and self._supervisor.pids().get(_ORCHESTRATOR) == pid:
                    self._say(f"orchestrator (pid {pid}) failed {failures} health checks and is killed")
                    self._supervisor.signal(_ORCHESTRATOR, signal.SIGKILL)
                    failures = 0

    async def _stop_in_order(self) -> None:
        await first(self._ask_to_shut_down(), self._watch_draining())
        await self.end_services()

    async def _ask_to_shut_down(self) -> None:
        """Return when the orchestrator says that all engines have stopped, or has been away for too long to hope."""
        away_since: float | None = None
        async with AdminClient(self.orchestrator_url) as admin:
            while True:
                try:
                    await admin.post("/shutdown", {"now": False}, timeout=None)
                except Failure as failure:
                    if failure.code != ExitCode.UNREACHABLE:
                        self._say(f"the orchestrator can't stop the engines: {failure}")
                        return
                    # It died, and is being started again: the next one finds the engines and can be asked as well.
                    away_since = away_since or time.monotonic()
                    if time.monotonic() - away_since > _AWAY_FOR_LONG:
                        self._say("the orchestrator is away: ending the engines without it")
                        return
                    await asyncio.sleep(_LOOK_EVERY)
                else:
                    return

    async def _watch_draining(self) -> None:
        """Tell what is waited for; return when the orchestrator has said for a while that it can't decide any more."""
        told = ""
        failing_since: float | None = None
        async with AdminClient(self.orchestrator_url) as admin:
            while True:
                await asyncio.sleep(_STATUS_EVERY)
                try:
                    found = await admin.status()
                except Failure:  # it is on its way out, or coming back
                    continue
                if not found.get("problems"):
                    failing_since = None
                elif failing_since is None:
                    failing_since = time.monotonic()
                elif time.monotonic() - failing_since > _FAILING_FOR_LONG:
                    self._say(f"ending the engines without the orchestrator: {found['problems'][0]}")
                    return
                line = what_drains(found)
                if line and line != told:
                    self._say(f"{line}; press Ctrl-C again to stop at once")
                    told = line

    async def _shut_down_now(self) -> None:
        async with AdminClient(self.orchestrator_url) as admin:
            try:
                await admin.post("/shutdown", {"now": True}, timeout=_HURRIED_STOP)
            except Failure as failure:
                self._say(f"{failure}: killing what is left")


def what_drains(status: dict[str, Any]) -> str:
    """Return in words which requests and engines a stop waits for; empty if none."""
    models = status.get("models", [])
    running = [(int(model.get("in_flight", 0)), str(model.get("name"))) for model in models]
    busy = [f"{count} request{'s' * (count != 1)} of {name}" for count, name in running if count]
    if busy:
        return f"draining {' and '.join(busy)}"
    stopping = [str(found.get("model")) for found in status.get("instances", []) if found.get("state") == "stopping"]
    return f"stopping {' and '.join(stopping)}" if stopping else ""


async def _healthy(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(url) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False
