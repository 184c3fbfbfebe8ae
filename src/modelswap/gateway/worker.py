"""One gateway worker: what its connections share, and the loop that keeps it all going."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable, Coroutine
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any, Final

import structlog

from modelswap.core.admission import TICK, Admission
from modelswap.core.held import Lease
from modelswap.core.outgoing import Abort, Admit, CloseIdle, Outgoing, Reconnect, Reject, Reroute, Say, Told
from modelswap.gateway.exchange import Exchange
from modelswap.gateway.http1 import Client
from modelswap.gateway.link import Link
from modelswap.gateway.metrics import CONNECTED, CONNECTIONS, IN_FLIGHT, LOOP_LAG, WAITING, Metrics
from modelswap.gateway.pool import Pool
from modelswap.gateway.upstream import hang_up
from modelswap.protocol.errors import Code
from modelswap.protocol.messages import Catalog, OrchestratorMessage
from modelswap.spec.config import Config

BACKLOG: Final = 4096
AWAY_SECONDS: Final = 30.0
"""How long a request waits for an orchestrator that has never been there."""
COMMON_PATHS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")

_log = structlog.get_logger(__name__)


class Worker:
    """Owns a worker's admission, pools and clients; executes what admission wants done."""

    def __init__(self, config: Config, worker: int, orchestrator_url: str, token: str, metrics_folder: Path) -> None:
        gateway = config.gateway
        self.config = config
        self.loop = asyncio.get_running_loop()
        # The same for the next process in this place: its hello ends all doubt about what this one may still send.
        self.admission = Admission(f"{socket.gethostname()}:{gateway.port}:{worker}")
        self.metrics = Metrics(metrics_folder)
        self.max_body = int(gateway.max_body)
        self.max_headers = int(gateway.max_headers)
        self.header_timeout = gateway.header_timeout
        self.idle_timeout = gateway.idle_timeout
        self.progress_after = gateway.progress_after
        self.started = int(time.time())
        self.stopping = False
        self.clients: set[Client] = set()
        self.waiting: dict[int, Exchange] = {}
        self.link = Link(
            orchestrator_url,
            token,
            connected=self._connected,
            received=self._received,
            disconnected=self.admission.disconnect,
        )
        self.pools: dict[Lease, Pool] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pumping = False
        self._heard_at = 0.0
        self._term_changed = asyncio.Event()
        self._empty = asyncio.Event()
        self.request_prefix = f"req-{secrets.token_hex(6)}-".encode()
        self.request_numbers = count()
        self._lag = self.metrics.histogram(LOOP_LAG)
        self._gauged: set[str] = set()
        self.metrics.prepare(config.models, COMMON_PATHS)
        self.publish_gauges()

    # ── what connections and exchanges use ───────────────────────────────────────────────────────────────

    def new_request_id(self) -> bytes:
        """Return an id for a request whose client gave it none."""
        return b"%b%x" % (self.request_prefix, next(self.request_numbers))

    def pool(self, lease: Lease) -> Pool:
        """Return the connections of ``lease``."""
        pool = self.pools.get(lease)
        if pool is None:
            pool = self.pools[lease] = Pool(self, lease)
        return pool

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task that this worker owns and awaits."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def waiting_room(self, size: int) -> bool:
        """Whether one more request may wait while there is no catalog, which would say so itself."""
        limits = self.config.scheduling
        held = sum(exchange.size for exchange in self.waiting.values())
        return len(self.waiting) < limits.queue_requests and held + size <= limits.queue_bytes

    def lost(self, client: Client) -> None:
        """Forget a client's connection, which is closed."""
        self.clients.discard(client)
        if not self.clients:
            self._empty.set()

    def pump(self) -> None:
        """Do what admission wants done, in its order."""
        if self._pumping:
            return  # the call that is at it will see to the rest
        self._pumping = True
        try:
            while effects := self.admission.take():
                for effect in effects:
                    self._execute(effect)
        finally:
            self._pumping = False

    def publish_gauges(self) -> None:
        """Write down what is true now."""
        running: dict[str, int] = {}
        waiting: dict[str, int] = {}
        for lease in self.admission.leases:
            running[lease.model] = running.get(lease.model, 0) + lease.in_flight
        for exchange in self.waiting.values():
            if exchange.model is not None:
                waiting[exchange.model.name] = waiting.get(exchange.model.name, 0) + 1
        self._gauged |= running.keys() | waiting.keys()
        for model in self._gauged:
            labels = (("model", model),)
            self.metrics.number(IN_FLIGHT, labels).set(running.get(model, 0))
            self.metrics.number(WAITING, labels).set(waiting.get(model, 0))
        self.metrics.write_down()
        self.metrics.number(CONNECTIONS).set(len(self.clients))
        self.metrics.number(CONNECTED).set(int(self.admission.connected))

    # ── the worker's life ────────────────────────────────────────────────────────────────────────────────

    async def run(self, sock: socket.socket, ready: Callable[[int], None] | None, stop: asyncio.Event) -> None:
        """Serve on ``sock`` until ``stop`` is set and what runs has finished (or the drain limit is over)."""
        server = await self.loop.create_server(lambda: Client(self), sock=sock, backlog=BACKLOG)
        background = [self.loop.create_task(self.link.run()), self.loop.create_task(self._tick())]
        stopped = self.loop.create_task(_wait(stop))
        try:
            if ready is not None:
                ready(sock.getsockname()[1])
            await asyncio.wait([stopped, *background], return_when=asyncio.FIRST_COMPLETED)
            for task in background:
                if task.done():
                    task.result()
            server.close()
            await self._drain()
        finally:
            server.close()
            for client in list(self.clients):
                hang_up(client.transport)
            for task in [stopped, *background, *self._tasks]:
                task.cancel()
            await asyncio.gather(stopped, *background, *self._tasks, return_exceptions=True)
            for pool in self.pools.values():
                pool.close_idle()
            await server.wait_closed()
            await self._all_gone()
            self.metrics.close()

    async def _drain(self) -> None:
        self.stopping = True
        for exchange in list(self.waiting.values()):
            exchange.refuse_waiting(Code.SHUTTING_DOWN, "This gateway is shutting down")
        self.pump()
        for client in list(self.clients):
            client.close_if_idle()
        try:
            async with asyncio.timeout(self.config.scheduling.drain_timeout):
                await self._all_gone()
        except TimeoutError:
            _log.warning("drain_timeout", still_running=len(self.clients))
            for client in list(self.clients):
                if client.exchange is not None:
                    client.exchange.abort(Code.DRAIN_ABORTED, "the gateway is shutting down")

    async def _all_gone(self) -> None:
        while self.clients:
            self._empty.clear()
            await self._empty.wait()

    async def _tick(self) -> None:
        while True:
            interval = TICK
            if self.admission.catalog is not None:
                interval = min(interval, self.admission.catalog.term_ms / 3000)
            interval = min(interval, max(0.02, min(self.header_timeout, self.idle_timeout) / 4))
            due = monotonic() + interval
            try:
                async with asyncio.timeout(interval):
                    await self._term_changed.wait()
            except TimeoutError:
                self._lag.observe(max(0.0, monotonic() - due))
            else:
                self._term_changed.clear()
            now = monotonic()
            self.admission.tick(now)
            self.pump()
            self._check_link(now)
            for pool in self.pools.values():
                pool.sweep(now)
            for client in list(self.clients):
                client.expire(now)
            self._see_to_waiting(now)
            self.publish_gauges()

    def _check_link(self, now: float) -> None:
        catalog = self.admission.catalog
        if catalog is not None and self.admission.connected and now - self._heard_at > catalog.term_ms / 1000:
            _log.warning("orchestrator_silent", seconds=round(now - self._heard_at, 1))
            self._heard_at = now
            self.link.reconnect()

    def _see_to_waiting(self, now: float) -> None:
        bound = min(AWAY_SECONDS, self.config.scheduling.queue_timeout)
        for exchange in list(self.waiting.values()):
            if self.admission.catalog is None and now - exchange.since >= bound:
                exchange.refuse_waiting(Code.ORCHESTRATOR_AWAY, "The orchestrator cannot be reached; is it running?")
            else:
                exchange.tell(now)

    # ── the orchestrator ─────────────────────────────────────────────────────────────────────────────────

    def _connected(self) -> None:
        self._heard_at = monotonic()
        self.admission.connect(self._heard_at)
        self.pump()

    def _received(self, message: OrchestratorMessage) -> None:
        self._heard_at = monotonic()
        self.admission.receive(message, self._heard_at)
        if isinstance(message, Catalog):
            self._term_changed.set()
            names = [model.name for model in message.models]
            self._gauged.update(names)
            self.metrics.prepare(names, COMMON_PATHS)
        self.pump()

    def _execute(self, effect: Outgoing) -> None:
        match effect:
            case Say():
                self.link.say(effect.message)
            case Admit():
                exchange = self.waiting.get(effect.ticket)
                if exchange is not None:
                    exchange.admitted(effect.lease)
                else:  # it went while the effects before this one were executed
                    self.admission.leave(effect.lease, monotonic())
            case Reject():
                exchange = self.waiting.get(effect.ticket)
                if exchange is not None:
                    exchange.rejected(effect.refusal)
            case Reroute():
                exchange = self.waiting.get(effect.ticket)
                if exchange is not None:
                    exchange.rerouted()
            case CloseIdle():
                pool = self.pools.get(effect.lease)
                if pool is not None:
                    pool.close_idle()
                    if effect.lease.in_flight == 0:
                        del self.pools[effect.lease]
            case Abort():
                for client in list(self.clients):
                    running = client.exchange
                    if running is not None and running.lease is effect.lease:
                        running.abort(Code.DRAIN_ABORTED, "the model's engine has to stop now")
            case Reconnect():
                _log.warning("paused_too_long", remedy="leases are confirmed anew")
                self.link.reconnect()
            case Told():
                now = monotonic()
                for waiting in list(self.waiting.values()):
                    if waiting.model is not None and waiting.model.name == effect.model:
                        waiting.tell(now)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("task_failed", exc_info=error)


async def serve(
    config: Config,
    *,
    worker: int,
    orchestrator_url: str,
    token: str,
    sock: socket.socket | None = None,
    ready: Callable[[int], None] | None = None,
    stop: asyncio.Event,
    metrics_folder: Path | None = None,
) -> None:
    """Run one gateway worker until ``stop`` is set, then let running requests finish.

    It listens on ``sock``, or on the configured address together with the other workers; ``ready`` is told the port.
    Workers that share ``metrics_folder`` (default: in the state folder) are summed in each other's ``/metrics``.
    Raises `OSError` if the address can't be had.
    """
    folder = metrics_folder or state_dir(config) / "gateway-metrics"
    own = sock if sock is not None else listen(config.gateway.host, config.gateway.port)
    await Worker(config, worker, orchestrator_url, token, folder).run(own, ready, stop)


def state_dir(config: Config) -> Path:
    """Return where a configuration's state is kept."""
    if config.orchestrator.state_dir is not None:
        return config.orchestrator.state_dir
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "modelswap"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address, which other workers may share."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
