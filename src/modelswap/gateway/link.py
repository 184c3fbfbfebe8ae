"""The connection to the orchestrator: what `Admission` says goes out in order, what it is told comes in."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import msgspec
import structlog
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from modelswap.protocol.codec import decode_from_orchestrator, encode
from modelswap.protocol.messages import GatewayMessage, OrchestratorMessage

FIRST_DELAY: Final = 0.005
LONGEST_DELAY: Final = 1.0
GROWTH: Final = 1.7
OPEN_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 0.5
MAX_FRAME: Final = 16 * 1024 * 1024

_log = structlog.get_logger(__name__)


class Link:
    """Keeps one connection to the orchestrator, making a new one whenever it is lost.

    ``connected`` and ``disconnected`` are called as it comes and goes, ``received`` for each message.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        connected: Callable[[], None],
        received: Callable[[OrchestratorMessage], None],
        disconnected: Callable[[], None],
    ) -> None:
        self._url = gateway_url(url)
        self._token = token
        self._connected = connected
        self._received = received
        self._disconnected = disconnected
        self._outgoing: deque[GatewayMessage] = deque()
        self._something = asyncio.Event()
        self._again = asyncio.Event()
        self._up = False

    def say(self, message: GatewayMessage) -> None:
        """Send a message after those before it; it is lost if the connection is."""
        if self._up:
            self._outgoing.append(message)
            self._something.set()

    def reconnect(self) -> None:
        """Close the connection; nothing more is sent or received on it. A new one is made at once."""
        self._up = False
        self._outgoing.clear()
        self._again.set()

    async def run(self) -> None:
        """Stay connected until cancelled."""
        delay = FIRST_DELAY
        while True:
            try:
                connection = await connect(
                    self._url,
                    additional_headers={"Authorization": f"Bearer {self._token}"},
                    compression=None,
                    proxy=None,
                    ping_interval=None,  # the protocol has heartbeats
                    open_timeout=OPEN_SECONDS,
                    close_timeout=CLOSE_SECONDS,
                    max_size=MAX_FRAME,
                )
            except (OSError, TimeoutError, WebSocketException, EOFError) as error:
                # A server that goes away at the wrong moment is told as `ConnectionClosed`: not even that may end us.
                if delay >= LONGEST_DELAY:
                    _log.warning("orchestrator_away", url=self._url, error=str(error) or type(error).__name__)
            else:
                delay = FIRST_DELAY
                await self._talk(connection)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            delay = min(LONGEST_DELAY, delay * GROWTH)

    async def _talk(self, connection: ClientConnection) -> None:
        self._outgoing.clear()
        self._something.clear()
        self._again.clear()
        tasks: list[asyncio.Task[None]] = []
        self._up = True
        try:
            self._connected()
            tasks = [
                asyncio.create_task(self._send(connection)),
                asyncio.create_task(self._receive(connection)),
                asyncio.create_task(self._wait_for_reconnect()),
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._up = False
            self._outgoing.clear()
            self._disconnected()
            with contextlib.suppress(OSError, TimeoutError):
                await connection.close()

    async def _wait_for_reconnect(self) -> None:
        await self._again.wait()

    async def _send(self, connection: ClientConnection) -> None:
        outgoing = self._outgoing
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self._something.wait()
                self._something.clear()
                while outgoing:
                    await connection.send(encode(outgoing.popleft()), text=True)

    async def _receive(self, connection: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                frame = await connection.recv()
                if not self._up:
                    return
                try:
                    message = decode_from_orchestrator(frame)
                except msgspec.DecodeError as error:
                    # A newer orchestrator may say things that we don't know.
                    _log.warning("message_not_understood", error=str(error), frame=frame[:200])
                    continue
                self._received(message)


def gateway_url(url: str) -> str:
    """Return the WebSocket address for the orchestrator's address, given as ``http``, ``https``, ``ws`` or ``wss``."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    scheme = {"https": "wss", "wss": "wss"}.get(parts.scheme, "ws")
    return urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") or "/gateway", "", ""))
