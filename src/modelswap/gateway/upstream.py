"""Connections to engines: one request at a time goes out, its response is passed on."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Final, cast

from modelswap.core.held import LeaseState
from modelswap.gateway.chunked import BadChunk, ChunkScanner
from modelswap.gateway.headers import CHUNKED, LENGTHS, BadHead, Likeness, ResponseHead, likeness, number, read_response

if TYPE_CHECKING:
    from modelswap.gateway.exchange import Exchange
    from modelswap.gateway.pool import Pool

MAX_RESPONSE_HEAD: Final = 256 * 1024


# Where a connection is in its response. Plain integers: members of an enum take 50 ns to name.
_IDLE: Final = 0
_HEAD: Final = 1
_LENGTH: Final = 2
_CHUNKED: Final = 3
_UNTIL_CLOSE: Final = 4

_OPEN: Final = LeaseState.OPEN


class Upstream(asyncio.Protocol):
    """One connection to an engine; carries one exchange at a time."""

    __slots__ = (
        "_buffer",
        "_chunks",
        "_exchange",
        "_keep",
        "_large",
        "_left",
        "_like",
        "_like_head",
        "_mode",
        "_paused",
        "_pool",
        "_raw",
        "fresh",
        "idle_until",
        "lost",
        "transport",
    )

    transport: asyncio.Transport
    _like_head: ResponseHead

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._exchange: Exchange | None = None
        self._mode = _IDLE
        self._buffer = b""
        self._chunks = ChunkScanner()
        self._left = 0
        self._like: Likeness | None = None
        self._keep: float | None = None
        self._raw: Callable[[bytes], None] | None = None
        self._paused = False
        self._large = False
        self.fresh = True
        self.lost = False
        self.idle_until = 0.0

    # ── the exchange's side ──────────────────────────────────────────────────────────────────────────────

    def send(self, exchange: Exchange, request: bytes, rest: bytes = b"") -> None:
        """Send a request, in one piece or two, and hand its response to ``exchange``."""
        self._exchange = exchange
        self._mode = _HEAD
        if rest:
            self._large = True
            self.transport.writelines((request, rest))
        else:
            self.transport.write(request)

    def pause(self) -> None:
        """Read no more from the engine until `resume`: the client doesn't take it."""
        if not self._paused and not self.lost:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._paused:
            self._paused = False
            if not self.lost:
                self.transport.resume_reading()

    def release(self, keep: float | None, now: float) -> None:
        """Keep the connection for another request for ``keep`` seconds, if that can be; else close it.

        It must have been given its whole response.
        """
        self._exchange = None
        self._mode = _IDLE
        self._raw = None
        if self._paused:
            self.resume()
        if self._large:
            self._large = False
            if self.transport.get_write_buffer_size():
                keep = None  # it answered without having taken the whole request
        pool = self._pool
        if keep is not None and pool.lease.state is _OPEN and not self.lost:
            self.fresh = False
            self.idle_until = now + keep
            pool.idle.append(self)
        else:
            self.drop()

    def drop(self) -> None:
        """Close at once; nothing is heard of this connection any more."""
        self._exchange = None
        self._mode = _IDLE
        if not self.lost:
            hang_up(self.transport)

    def splice(self, text: bytes) -> bytes | None:
        """Return what adds ``text`` to the broken-off response, without ending it, if that can be."""
        if self._mode == _CHUNKED:
            return self._chunks.splice(text)
        return text if self._mode == _UNTIL_CLOSE else None

    # ── asyncio's side ───────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Pass a response on."""
        mode = self._mode
        if mode == _CHUNKED:
            raw = self._raw
            if raw is None:
                self._decode(data)
                return
            try:
                end = self._chunks.scan(data)
            except BadChunk as error:
                self._break(f"bad response from the engine: {error}")
                return
            if end < 0:
                raw(data)
            elif end == len(data):
                raw(data)
                self._finish(monotonic())
            else:
                raw(data[:end])
                self._keep = None
                self._finish(monotonic())
        elif mode == _LENGTH:
            left = self._left = self._left - len(data)
            if left < 0:
                data = data[:left]
                self._keep = None
            self._pass(data)
            if left <= 0:
                self._finish(monotonic())
        elif mode == _HEAD:
            self._head(data)
        elif mode == _UNTIL_CLOSE:
            self._pass(data)
        else:
            # Nothing was asked: an engine that says 408 to an idle connection, or one that answers too long.
            self._pool.forget(self)
            self.drop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the exchange, if there is one, what this means for it."""
        self.lost = True
        exchange = self._exchange
        self._exchange = None
        mode = self._mode
        if exchange is None:
            self._pool.forget(self)
        elif mode == _HEAD:
            reason = f"connection lost before the response: {exc or 'closed by the engine'}"
            exchange.failed(reason, reused=not self.fresh and not self._buffer)
        elif mode == _UNTIL_CLOSE and exc is None:
            self._mode = _IDLE
            exchange.complete(monotonic())
        else:
            exchange.broken(f"the engine's connection broke off: {exc or 'closed by the engine'}", self)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────

    def _head(self, data: bytes) -> None:
        if self._like is not None and not self._buffer:
            prefix, at, stop, suffix, suffix_size = self._like
            if data.startswith(prefix) and (
                data.startswith(suffix, stop) or data.startswith(suffix, stop := data.find(b"\r", at, at + 19))
            ):
                digits = data[at:stop]
                length = LENGTHS.get(digits) or number(digits)
                if length >= 0:
                    head = self._like_head
                    rest = data[stop + suffix_size :]
                    exchange = self._exchange
                    if len(rest) != length or exchange is None or not exchange.whole(head, rest, self):
                        self._begin(head, length, rest)
                    return
        if self._buffer:
            data = self._buffer + data
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            self._buffer = data
            if len(data) > MAX_RESPONSE_HEAD:
                self._refuse("the engine's response head is too large")
            return
        self._buffer = b""
        try:
            head, length = read_response(data[:end])
        except BadHead as error:
            self._refuse(str(error))
            return
        if head.status < 200:
            if head.status == 101:
                self._refuse("the engine switched protocols")
            elif len(data) > end:
                self._head(data[end:])
            return
        if length >= 0 and head.status == 200:
            self._like = likeness(data[:end])
            self._like_head = head
        self._begin(head, length, data[end:])

    def _begin(self, head: ResponseHead, length: int, rest: bytes) -> None:
        exchange = self._exchange
        assert exchange is not None  # noqa: S101 - for the type checker: a head implies it
        self._keep = head.reusable
        out = exchange.begin(head, length)
        if out is None:
            self._raw = None
            self._mode = _CHUNKED if length == CHUNKED else _LENGTH if length >= 0 else _UNTIL_CLOSE
            self._left = length
            if length == CHUNKED:
                self._chunks = ChunkScanner()
            if rest or length == 0:
                self.data_received(rest)
            return
        # The response's head and what came with it go out in one write.
        raw = exchange.client.transport.write
        if length >= 0:
            left = length - len(rest)
            if left == 0:
                raw(out + rest)
                self._finish(exchange.first_byte)
                return
            self._mode = _LENGTH
            self._left = left
            self._raw = raw
            if left < 0:
                rest = rest[:left]
                self._keep = None
            raw(out + rest)
            if left < 0:
                self._finish(monotonic())
            return
        self._raw = raw
        if length == CHUNKED:
            self._mode = _CHUNKED
            chunks = self._chunks = ChunkScanner()
            try:
                ended = chunks.scan(rest)
            except BadChunk as error:
                raw(out)
                self._break(f"bad response from the engine: {error}")
                return
            if ended < 0:
                raw(out + rest)
                return
            if ended < len(rest):
                rest = rest[:ended]
                self._keep = None
            raw(out + rest)
            self._finish(monotonic())
        else:
            self._mode = _UNTIL_CLOSE
            raw(out + rest)

    def _decode(self, data: bytes) -> None:
        payload: list[bytes] = []
        try:
            end = self._chunks.scan(data, payload)
        except BadChunk as error:
            self._break(f"bad response from the engine: {error}")
            return
        exchange = self._exchange
        if payload and exchange is not None:
            exchange.payload(b"".join(payload))
        if end >= 0 and self._exchange is not None:
            if end < len(data):
                self._keep = None
            self._finish(monotonic())

    def _pass(self, data: bytes) -> None:
        if self._raw is not None:
            self._raw(data)
        elif data and self._exchange is not None:
            self._exchange.payload(data)

    def _finish(self, now: float) -> None:
        exchange = self._exchange
        if exchange is not None:
            self.release(self._keep, now)
            exchange.complete(now)

    def _refuse(self, reason: str) -> None:
        exchange = self._exchange
        self.drop()
        if exchange is not None:
            exchange.failed(reason, reused=False)

    def _break(self, reason: str) -> None:
        exchange = self._exchange
        self.drop()
        if exchange is not None:
            exchange.broken(reason, None)  # its framing can't be trusted any more


def hang_up(transport: asyncio.BaseTransport, *, reset: bool = False) -> None:
    """Close a connection at once, without sending what is still buffered; ``reset`` says so to the other side.

    The event loop would close the socket only in its next round, and the lease protocol promises more than that.
    """
    handle = transport.get_extra_info("socket")
    if handle is not None and handle.fileno() >= 0:
        # uvloop hands out a stand-in that has no shutdown.
        real = socket.socket(fileno=handle.fileno())
        with contextlib.suppress(OSError):
            if reset:
                real.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                real.shutdown(socket.SHUT_RDWR)
        real.detach()
    if not transport.is_closing():
        cast("asyncio.Transport", transport).abort()
