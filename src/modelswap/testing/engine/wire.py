"""Just enough of HTTP/1.1 to be an engine that may misbehave on the wire."""

# The callbacks' names and meanings are asyncio's and httptools'.
# ruff: noqa: D102

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Final, Literal, cast
from urllib.parse import parse_qs, unquote

import httptools

Framing = Literal["length", "chunked", "close"]
Header = tuple[bytes, bytes]

_PIECES: Final = 16
"""In how many writes a slow head goes out."""


class Request:
    """One request as it came: ``headers`` in order and case, ``body`` whole, ``nth`` on its connection (from 0)."""

    __slots__ = ("body", "headers", "keep_alive", "method", "nth", "path", "query", "target", "version")

    def __init__(self, nth: int) -> None:
        self.nth = nth
        self.method = ""
        self.target = b""
        self.path = ""
        self.query: dict[str, list[str]] = {}
        self.version = "1.1"
        self.headers: list[Header] = []
        self.body = b""
        self.keep_alive = True

    def header(self, name: bytes) -> bytes | None:
        """Return the first value of header ``name`` (lower case); None if there is none."""
        return next((value for found, value in self.headers if found.lower() == name), None)


class Connection(asyncio.Protocol):
    """One client's connection; answers its requests one after the other.

    ``handle`` is called with the request and this connection, which it answers through. Its task is cancelled as soon
    as the client leaves, and then ``left`` is True. ``status`` is that of the present answer, 0 before it begins.
    """

    def __init__(
        self,
        handle: Callable[[Request, Connection], Awaitable[None]],
        open_connections: set[Connection],
        keep_alive: float,
    ) -> None:
        self._handle = handle
        self._open = open_connections
        self.idle_timeout = keep_alive
        self.left = False
        self._ended_by_us = False
        self.status = 0
        self.task: asyncio.Task[None] | None = None
        self._waiting: deque[Request] = deque()
        self._parser = httptools.HttpRequestParser(self)
        self._request = Request(0)
        self._seen = 0
        self._chunked = False
        self._close = False
        self._body_chunks: list[bytes] = []
        self._writable = asyncio.Event()
        self._writable.set()
        self._idle: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport
        self.peer = ""

    # ── what the event loop says ──

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asyncio.Transport by name on uvloop, but in all that it does.
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.peer = f"{peer[0]}:{peer[1]}" if peer else ""
        self._open.add(self)

    def data_received(self, data: bytes) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(b"501 Not Implemented")
        except httptools.HttpParserError:
            self._refuse(b"400 Bad Request")

    def connection_lost(self, exc: Exception | None) -> None:
        self.left = not self._ended_by_us
        self._open.discard(self)
        if self._idle is not None:
            self._idle.cancel()
        if self.task is not None:
            self.task.cancel()

    def eof_received(self) -> bool | None:
        # A client that sends no more has left; what it did not read is of no use to it.
        if self.task is not None:
            self._transport.abort()
        return None

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # ── what the parser says ──

    def on_message_begin(self) -> None:
        self._request = Request(self._seen)
        self._seen += 1
        self._body_chunks = []

    def on_url(self, url: bytes) -> None:
        self._request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._request.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if (self._request.header(b"expect") or b"").lower() == b"100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_chunks.append(body)

    def on_message_complete(self) -> None:
        request = self._request
        request.method = self._parser.get_method().decode("latin-1")
        request.version = self._parser.get_http_version()
        request.keep_alive = self._parser.should_keep_alive()
        path, _, query = request.target.decode("latin-1").partition("?")
        request.path = unquote(path)
        request.query = parse_qs(query) if query else {}
        request.body = b"".join(self._body_chunks)
        self._waiting.append(request)
        if self.task is None:
            self.task = asyncio.get_running_loop().create_task(self._answer())

    # ── what answers are made with ──

    async def start(
        self,
        status: int,
        headers: Iterable[tuple[str, str]] = (),
        *,
        framing: Framing = "length",
        length: int = 0,
        close: bool = False,
        trickle: float | None = None,
    ) -> None:
        """Send the head; ``close`` announces the connection's end, ``trickle`` spreads the head over seconds."""
        self.status = status
        self._chunked = framing == "chunked"
        self._close = self._close or close or framing == "close"
        head = [f"HTTP/1.1 {status} {_phrase(status)}"]
        head += [f"{name}: {value}" for name, value in headers]
        if framing == "chunked":
            head.append("transfer-encoding: chunked")
        elif framing == "length":
            head.append(f"content-length: {length}")
        if self._close:
            head.append("connection: close")
        raw = ("\r\n".join(head) + "\r\n\r\n").encode("latin-1")
        if trickle:
            step = -(-len(raw) // _PIECES)
            for begin in range(0, len(raw), step):
                self._transport.write(raw[begin : begin + step])
                await asyncio.sleep(trickle / _PIECES)
        else:
            self._transport.write(raw)

    async def send(self, data: bytes) -> None:
        """Send a part of the body, when the client has read enough of the earlier ones."""
        if not self._writable.is_set():
            await self._writable.wait()
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def finish(self) -> None:
        """End the body."""
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")

    def abort(self) -> None:
        """Close at once, with a reset, whatever was under way."""
        self._ended_by_us = True
        self._transport.abort()

    def hang_up(self) -> None:
        """Close after what was written has gone out."""
        self._ended_by_us = True
        self._transport.close()

    # ── in between ──

    async def _answer(self) -> None:
        try:
            while self._waiting and not self._transport.is_closing():
                request = self._waiting.popleft()
                self._close = not request.keep_alive
                self.status = 0
                await self._handle(request, self)
                if self._close:
                    self.hang_up()
            if not self._transport.is_closing():
                self._expire()
        except BaseException as error:
            # Cancelled because the client left or the engine ends, or a mistake in this program: no half answers.
            self.abort()
            if not isinstance(error, asyncio.CancelledError):
                raise
        finally:
            self.task = None

    def _expire(self) -> None:
        if self.idle_timeout <= 0:
            self.hang_up()
        else:
            self._idle = asyncio.get_running_loop().call_later(self.idle_timeout, self.hang_up)

    def _refuse(self, status: bytes) -> None:
        self._transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self.hang_up()


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
