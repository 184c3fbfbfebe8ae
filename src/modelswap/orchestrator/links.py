"""The orchestrator's ends of the connections to gateways: a WebSocket endpoint that speaks the lease protocol."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import msgspec
import structlog
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from modelswap.core import events
from modelswap.orchestrator.tasks import cancel
from modelswap.protocol.codec import decode_from_gateway, encode
from modelswap.protocol.messages import PROTOCOL_VERSION, GatewayMessage, Hello, OrchestratorMessage

QUEUED: Final = 10_000
"""Messages that may wait for a gateway to read them; with one more its connection is closed."""
HELLO_WITHIN: Final = 10.0
LONGEST_NAME: Final = 200

POLICY_VIOLATION: Final = 1008
UNREADABLE: Final = 1007
TRY_AGAIN: Final = 1013
REPLACED: Final = 4001
SILENT: Final = 4002
WRONG_VERSION: Final = 4003

_log = structlog.get_logger(__name__)


class Post(Protocol):
    """`Shell.post`."""

    def __call__(self, event: events.Event, still: Callable[[], bool] | None = None) -> None:
        """Queue an event; it is dropped if ``still`` says no when its turn has come."""
        ...


class _BadFrame(Exception):
    """A gateway said something that it may not; ``code`` is the WebSocket's close code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Link:
    """One connection of one gateway: what is still to be sent, and how it is to end."""

    def __init__(self, gateway: str) -> None:
        self.gateway = gateway
        self.wake = asyncio.Event()
        self.ended: tuple[int, str] | None = None
        self._out: deque[OrchestratorMessage] = deque()

    def say(self, message: OrchestratorMessage) -> None:
        """Queue a message."""
        if self.ended is not None:
            return
        if len(self._out) >= QUEUED:
            self.end(TRY_AGAIN, f"{QUEUED} messages were not read")
            return
        self._out.append(message)
        self.wake.set()

    def end(self, code: int, reason: str) -> None:
        """Close the connection, without sending what is still queued."""
        if self.ended is None:
            self.ended = (code, reason)
            self._out.clear()
            self.wake.set()

    def take(self) -> list[OrchestratorMessage]:
        """Return all that is to be sent now."""
        messages = list(self._out)
        self._out.clear()
        self.wake.clear()
        return messages


class Links:
    """The current connection of each gateway.

    A gateway that comes back may do so while its old connection still lingers. What counts is the connection whose
    `Hello` the scheduler saw last: it is made current right before the scheduler handles that, so that nothing meant
    for the old one is said on the new one, and whatever still comes from an old one is dropped.
    """

    def __init__(
        self,
        post: Post,
        *,
        token: str,
        clock: Callable[[], float],
        term: Callable[[], float],
        on_change: Callable[[str, bool], None] = lambda _gateway, _connected: None,
    ) -> None:
        self._post = post
        self._token = token.encode()
        self._clock = clock
        self._term = term
        self._on_change = on_change
        self._current: dict[str, Link] = {}
        self._open: set[Link] = set()
        self._closing = False

    @property
    def connected(self) -> int:
        """How many gateways are connected."""
        return len(self._current)

    def say(self, gateway: str, message: OrchestratorMessage) -> None:
        """Send a message on the gateway's current connection, if it has one."""
        link = self._current.get(gateway)
        if link is not None:
            link.say(message)

    def disconnect(self, gateway: str, reason: str) -> None:
        """Close the gateway's current connection; the scheduler has forgotten it already."""
        link = self._current.pop(gateway, None)
        if link is not None:
            _log.warning("gateway disconnected", gateway=gateway, reason=reason)
            self._on_change(gateway, False)
            link.end(SILENT, reason)

    def close(self) -> None:
        """Close all connections, and accept no more; gateways keep what they hold and come back."""
        self._closing = True
        for link in list(self._open):
            link.end(1001, "the orchestrator is going away")

    async def serve(self, socket: WebSocket) -> None:
        """Serve one connection, from its handshake to its end."""
        if not self._authorized(socket):
            await socket.close(POLICY_VIOLATION)
            return
        await socket.accept()
        try:
            link = await self._greet(socket)
        except (_BadFrame, WebSocketDisconnect, TimeoutError) as error:
            code = error.code if isinstance(error, _BadFrame) else POLICY_VIOLATION
            _log.warning("gateway refused", reason=str(error) or "no hello")
            await _close(socket, code, str(error) or "no hello came")
            return
        reader = asyncio.create_task(self._read(socket, link), name=f"read {link.gateway}")
        writer = asyncio.create_task(self._write(socket, link), name=f"write {link.gateway}")
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._open.discard(link)
            self._post(events.GatewayLost(at=self._clock(), gateway=link.gateway), still=lambda: self._retire(link))
            await cancel(reader)
            await cancel(writer)
        for task in (reader, writer):
            failure = None if task.cancelled() else task.exception()
            if failure is not None and not isinstance(failure, WebSocketDisconnect):
                _log.error("connection failed", gateway=link.gateway, exc_info=failure)
        if link.ended is not None:
            await _close(socket, *link.ended)

    def _authorized(self, socket: WebSocket) -> bool:
        scheme, _, given = socket.headers.get("authorization", "").partition(" ")
        known = hmac.compare_digest(given.strip().encode(), self._token)
        return known and scheme.lower() == "bearer" and not self._closing

    async def _greet(self, socket: WebSocket) -> Link:
        async with asyncio.timeout(HELLO_WITHIN):
            hello = await _receive(socket)
        if not isinstance(hello, Hello):
            raise _BadFrame(POLICY_VIOLATION, f"the first message must be hello, not {type(hello).__name__}")
        if hello.version != PROTOCOL_VERSION:
            raise _BadFrame(
                WRONG_VERSION,
                f"it speaks version {hello.version} of the lease protocol, this orchestrator {PROTOCOL_VERSION}; "
                "install the same version of modelswap for both",
            )
        if not hello.gateway or len(hello.gateway) > LONGEST_NAME:
            raise _BadFrame(POLICY_VIOLATION, "a gateway needs a name, and not too long a one")
        link = Link(hello.gateway)
        self._open.add(link)
        self._said(link, hello, still=lambda: self._install(link))
        return link

    def _install(self, link: Link) -> bool:
        if link not in self._open or link.ended is not None:
            return False
        before = self._current.get(link.gateway)
        self._current[link.gateway] = link
        if before is not None:
            before.end(REPLACED, "the gateway has made a new connection")
        self._on_change(link.gateway, True)
        return True

    def _retire(self, link: Link) -> bool:
        # When it is we who end, the gateway goes on with what it holds, and the next orchestrator must expect it.
        if self._closing or self._current.get(link.gateway) is not link:
            return False
        del self._current[link.gateway]
        self._on_change(link.gateway, False)
        return True

    def _said(self, link: Link, message: GatewayMessage, still: Callable[[], bool]) -> None:
        self._post(events.GatewaySaid(at=self._clock(), gateway=link.gateway, message=message), still=still)

    async def _read(self, socket: WebSocket, link: Link) -> None:
        while True:
            try:
                message = await _receive(socket)
                if isinstance(message, Hello):
                    raise _BadFrame(POLICY_VIOLATION, "hello was said already; make a new connection")
            except _BadFrame as bad:
                _log.error("bad frame", gateway=link.gateway, reason=str(bad))
                link.end(bad.code, str(bad))
                return
            self._said(link, message, still=lambda: self._current.get(link.gateway) is link)

    async def _write(self, socket: WebSocket, link: Link) -> None:
        while link.ended is None:
            await link.wake.wait()
            for message in link.take():
                # Blocks while the gateway doesn't read: it hangs, or is stopped, or its machine has gone.
                try:
                    async with asyncio.timeout(self._term()):
                        await socket.send_text(encode(message).decode())
                except TimeoutError:
                    _log.error("gateway does not read; closing its connection", gateway=link.gateway)
                    return


async def _receive(socket: WebSocket) -> GatewayMessage:
    frame = await socket.receive()
    if frame["type"] != "websocket.receive":
        raise WebSocketDisconnect(frame.get("code", 1005), frame.get("reason"))
    data = frame.get("text")
    try:
        return decode_from_gateway(data if data is not None else frame["bytes"])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _BadFrame(UNREADABLE, f"not a message of the lease protocol: {error}") from error


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    if socket.client_state is WebSocketState.DISCONNECTED:
        return
    # Limited, because a gateway that doesn't read makes even this block; the server then drops the connection.
    with contextlib.suppress(TimeoutError, RuntimeError, WebSocketDisconnect):
        async with asyncio.timeout(1.0):
            await socket.close(code, reason.encode()[:120].decode(errors="ignore"))
