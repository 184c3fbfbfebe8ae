"""The connections to engines that belong to one lease."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from modelswap.core.held import Lease
from modelswap.gateway.metrics import CONNECTS
from modelswap.gateway.upstream import Upstream

if TYPE_CHECKING:
    from modelswap.gateway.worker import Worker

CONNECT_SECONDS: Final = 10.0
"""How long a connection to an engine may take to be made."""


class Pool:
    """The connections of one lease. Addresses get reused, so no connection outlives its lease."""

    __slots__ = ("_connects", "idle", "lease", "prefixes", "worker")

    def __init__(self, worker: Worker, lease: Lease) -> None:
        self.worker = worker
        self.lease = lease
        self.prefixes: dict[bytes, bytes] = {}
        self.idle: list[Upstream] = []
        self._connects = worker.metrics.number(CONNECTS, (("model", lease.model),))

    def prefix(self, target: bytes) -> bytes:
        """Return the first lines of every request for ``target``: request line, host, the engine's key."""
        host, port = self.lease.address
        name = f"[{host}]" if ":" in host else host
        key = f"authorization: Bearer {self.lease.api_key}\r\n" if self.lease.api_key else ""
        prefix = b"POST %b HTTP/1.1\r\n" % target + f"host: {name}:{port}\r\n{key}".encode()
        if len(self.prefixes) < 64:
            self.prefixes[target] = prefix
        return prefix

    def take(self, now: float) -> Upstream | None:
        """Return the idle connection that was used last, if one is still good."""
        idle = self.idle
        while idle:
            upstream = idle.pop()
            if upstream.idle_until > now and not upstream.lost:
                return upstream
            upstream.drop()
        return None

    def forget(self, upstream: Upstream) -> None:
        """Drop a connection from the idle ones: it has been closed."""
        with contextlib.suppress(ValueError):
            self.idle.remove(upstream)

    def sweep(self, now: float) -> None:
        """Close the connections that were idle for too long."""
        if self.idle and self.idle[0].idle_until <= now:
            good = [upstream for upstream in self.idle if upstream.idle_until > now]
            old = [upstream for upstream in self.idle if upstream.idle_until <= now]
            self.idle = good
            for upstream in old:
                upstream.drop()

    def close_idle(self) -> None:
        """Close every idle connection before this returns."""
        idle, self.idle = self.idle, []
        for upstream in idle:
            upstream.drop()

    async def connect(self) -> Upstream:
        """Return a new connection. Raises `OSError` or `TimeoutError`."""
        self._connects.add()
        host, port = self.lease.address
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_SECONDS):
            _, upstream = await loop.create_connection(lambda: Upstream(self), host, port)
        return upstream
