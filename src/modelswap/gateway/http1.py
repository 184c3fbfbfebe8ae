"""The client's side: HTTP/1.1 requests come in, one at a time, in order; answers go out."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Final, cast

import msgspec

from modelswap.gateway import answers, headers, routes
from modelswap.gateway import body as bodies
from modelswap.gateway.chunked import BadChunk, ChunkScanner
from modelswap.gateway.exchange import Exchange
from modelswap.gateway.headers import LENGTHS, BadHead, Likeness, RequestHead, likeness, number, read_request
from modelswap.gateway.local import answer_locally
from modelswap.gateway.routes import Route
from modelswap.gateway.upstream import hang_up
from modelswap.protocol import errors
from modelswap.protocol.errors import OUTCOMES, Code, ModelswapError

if TYPE_CHECKING:
    from modelswap.gateway.worker import Worker

SLOWEST_UPLOAD: Final = 65536
"""Bytes a second above which a body may take longer than `gateway.header_timeout` to arrive."""
LINGER_SECONDS: Final = 2.0
"""How long the rest of a refused request is read and thrown away, so that its sender gets to read the answer."""
MAX_PIPELINED: Final = 65536
"""Bytes of further requests that are read while one is being answered."""


# What a connection is doing, in this order. Plain integers: members of an enum take 50 ns to name.
_IDLE: Final = 0
_HEAD: Final = 1
_BODY: Final = 2
_RUNNING: Final = 3
_LINGERING: Final = 4
_CLOSED: Final = 5


class Client(asyncio.Protocol):
    """One client's connection."""

    __slots__ = (
        "_buffer",
        "_chunks",
        "_consuming",
        "_exchange",
        "_head",
        "_like",
        "_like_head",
        "_missing",
        "_parts",
        "_reading_paused",
        "_received",
        "_request_id",
        "_route",
        "_state",
        "_until",
        "_worker",
        "keep_alive",
        "transport",
        "write_paused",
    )

    transport: asyncio.Transport
    _head: RequestHead
    _like_head: RequestHead
    _route: Route

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._state = _IDLE
        self._buffer = b""
        self._exchange: Exchange | None = None
        self._consuming = False
        self._chunks: ChunkScanner | None = None
        self._parts: list[bytes] = []
        self._like: Likeness | None = None
        self._missing = 0
        self._received = 0
        self._until = 0.0
        self._request_id = b""
        self._reading_paused = False
        self.keep_alive = True
        self.write_paused = False

    @property
    def exchange(self) -> Exchange | None:
        """What is being relayed for this client, if anything is."""
        return self._exchange

    @property
    def idle(self) -> bool:
        """Whether no request has begun."""
        return self._state == _IDLE

    # ── asyncio's side ───────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)
        self._until = monotonic() + self._worker.idle_timeout
        self._worker.clients.add(self)

    def data_received(self, data: bytes) -> None:
        """Take in what the client sends."""
        state = self._state
        if state == _IDLE and not self.write_paused:
            if self._like is not None:
                prefix, at, stop, suffix, suffix_size = self._like
                if data.startswith(prefix) and (
                    data.startswith(suffix, stop) or data.startswith(suffix, stop := data.find(b"\r", at, at + 19))
                ):
                    digits = data[at:stop]
                    length = LENGTHS.get(digits) or number(digits)
                    start = stop + suffix_size
                    worker = self._worker
                    if start + length == len(data) and 0 <= length <= worker.max_body:
                        head = self._like_head
                        self._request_id = b"%b%x" % (worker.request_prefix, next(worker.request_numbers))
                        self.keep_alive = head.keep_alive
                        self._relay(head, data[start:])
                        return
            self._consume(data)
        elif state == _RUNNING or self.write_paused:
            self._buffer += data
            if len(self._buffer) > MAX_PIPELINED and not self._reading_paused:
                self._reading_paused = True
                self.transport.pause_reading()
        elif state < _RUNNING:
            self._consume(data)

    def eof_received(self) -> None:
        """Free what was taken for this client: it will not read its answer."""
        self._gone()

    def connection_lost(self, exc: Exception | None) -> None:
        """Free what was taken for this client."""
        self._gone()
        self._worker.lost(self)

    def pause_writing(self) -> None:
        """Have the engine wait: the client doesn't keep up."""
        self.write_paused = True
        self._until = monotonic() + self._worker.idle_timeout
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        """Go on."""
        self.write_paused = False
        if self._exchange is not None:
            self._exchange.resume()
        elif self._state == _IDLE:
            self._until = monotonic() + self._worker.idle_timeout
            self._go_on()

    # ── answering ────────────────────────────────────────────────────────────────────────────────────────

    def write(self, data: bytes) -> None:
        """Send bytes of a response."""
        self.transport.write(data)

    def answer_error(
        self,
        request_id: bytes,
        status: int,
        code: str,
        message: str,
        retry_after_ms: int | None,
        should_retry: bool | None,
    ) -> None:
        """Send an error in OpenAI's shape, with the headers that say whether and when to come back."""
        if self._worker.stopping:
            self.keep_alive = False
        extra = errors.retry_headers(retry_after_ms, should_retry)
        body = errors.body(code, message)
        self.transport.write(answers.render(status, body, request_id, keep_alive=self.keep_alive, extra=extra))

    def over(self, now: float) -> None:
        """Go on to the next request: the exchange has ended."""
        self._exchange = None
        if self._state != _RUNNING:
            return
        worker = self._worker
        if not self.keep_alive or worker.stopping:
            self._close()
            return
        self._state = _IDLE
        self._until = now + worker.idle_timeout
        if self._buffer and not self._consuming:
            self._go_on()

    def close_if_idle(self) -> None:
        """Close the connection unless a request is under way."""
        if self._state == _IDLE:
            self._close()

    def expire(self, now: float) -> None:
        """Act on whatever has taken too long by ``now``: idling, sending a request, or taking its answer."""
        state = self._state
        if state == _RUNNING:
            if self.write_paused and now > self._until:
                hang_up(self.transport, reset=True)
        elif state in (_HEAD, _BODY):
            if now > self._until + self._received / SLOWEST_UPLOAD:
                self._refuse(Code.REQUEST_TIMEOUT, "The request took too long to arrive")
        elif now > self._until:
            if state == _IDLE and not self.write_paused:
                self._close()
            else:
                hang_up(self.transport)

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────

    def _gone(self) -> None:
        self._state = _CLOSED
        self._buffer = b""
        self._parts = []
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.abandon()

    def _close(self) -> None:
        if self._state != _CLOSED:
            self._state = _CLOSED
            self.transport.close()

    def _go_on(self) -> None:
        data, self._buffer = self._buffer, b""
        if self._reading_paused:
            self._reading_paused = False
            self.transport.resume_reading()
        if data:
            self._consume(data)

    def _consume(self, data: bytes) -> None:
        self._consuming = True
        while data:
            state = self._state
            if state == _BODY:
                data = self._take_body(data)
            elif state < _BODY and not self.write_paused:
                data = self._take_head(data)
            else:
                break
        self._consuming = False
        if data and self._state <= _RUNNING:
            self._buffer = data

    def _take_head(self, data: bytes) -> bytes:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        end = data.find(b"\r\n\r\n") + 4
        worker = self._worker
        if end < 4 or data[0] < 32:
            data = data.lstrip(b"\r\n")
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                self._part_of_head(data)
                return b""
        if end > worker.max_headers:
            self._refuse(Code.HEADERS_TOO_LARGE, _too_large("The request's headers", worker.max_headers, "max_headers"))
            return b""
        try:
            head, length = read_request(data[:end])
        except BadHead as error:
            self._refuse(Code.BAD_REQUEST, f"Not a valid HTTP/1.1 request: {error}")
            return b""
        self._request_id = head.request_id or worker.new_request_id()
        self.keep_alive = head.keep_alive
        route = head.route
        if route is None:
            return self._answer_locally(head, length, data, end)
        if length > worker.max_body:
            self._refuse(Code.BODY_TOO_LARGE, _too_large("The request's body", worker.max_body, "max_body"), route)
            return b""
        if length > 0 and head.request_id is None:
            self._like = likeness(data[:end])
            self._like_head = head
        if length >= 0:
            stop = end + length
            size = len(data)
            if size >= stop:
                self._relay(head, data[end:stop])
                return data[stop:] if size > stop else b""
            self._missing = length
            self._chunks = None
        else:
            self._missing = 0
            self._chunks = ChunkScanner()
        if self._state == _IDLE:
            self._until = monotonic() + worker.header_timeout
            self._received = 0
        self._head = head
        self._route = route
        self._state = _BODY
        if head.expects and len(data) == end:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return data[end:]

    def _part_of_head(self, data: bytes) -> None:
        if not data:
            return
        worker = self._worker
        if len(data) > worker.max_headers:
            self._refuse(Code.HEADERS_TOO_LARGE, _too_large("The request's headers", worker.max_headers, "max_headers"))
            return
        if not 65 <= data[0] <= 90:
            self._refuse(Code.BAD_REQUEST, "Not an HTTP/1.1 request (HTTPS is not spoken here)")
            return
        if self._state == _IDLE:
            self._state = _HEAD
            self._received = 0
            self._until = monotonic() + worker.header_timeout
        self._buffer = data

    def _take_body(self, data: bytes) -> bytes:
        self._received += len(data)
        chunks = self._chunks
        if chunks is None:
            missing = self._missing
            self._parts.append(data if len(data) <= missing else data[:missing])
            self._missing = missing - len(data)
            if self._missing > 0:
                return b""
            rest = data[missing:]
        else:
            before = len(self._parts)
            try:
                end = chunks.scan(data, self._parts)
            except BadChunk as error:
                self._refuse(Code.BAD_REQUEST, f"Not a valid chunked body: {error}")
                return b""
            self._missing += sum(map(len, self._parts[before:]))  # counts up, for chunked bodies
            limit = self._worker.max_body
            if self._missing > limit:
                self._refuse(Code.BODY_TOO_LARGE, _too_large("The request's body", limit, "max_body"), self._route)
                return b""
            if end < 0:
                return b""
            rest = data[end:]
        body = b"".join(self._parts)
        self._parts = []
        self._chunks = None
        self._missing = 0
        self._relay(self._head, body)
        return rest

    def _relay(self, head: RequestHead, body: bytes) -> None:
        self._state = _RUNNING
        route = head.route
        assert route is not None  # noqa: S101 - for the type checker: only such requests get here
        try:
            call = bodies.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            try:
                call = bodies.read(body)
            except ModelswapError as error:
                if headers.find(head.lines, b"content-encoding") is not None:
                    self._fail(Code.UNSUPPORTED_MEDIA_TYPE, "Compressed request bodies are not taken", route)
                else:
                    self._fail(error.code, str(error), route)
                return
        name = call.model
        if type(name) is not str or not name:
            self._fail(Code.MISSING_MODEL, "The request's body names no model (a string)", route)
            return
        exchange = self._exchange = Exchange(
            self, self._worker, head, route, self._request_id, name, call.stream is True, body, monotonic()
        )
        exchange.start()

    def _answer_locally(self, head: RequestHead, length: int, data: bytes, end: int) -> bytes:
        self._state = _RUNNING
        whole = 0 <= length <= len(data) - end
        if not whole:
            self.keep_alive = False  # its body is not worth waiting for
        label, status, body, content_type, extra = answer_locally(self._worker, head.method, head.target)
        self.transport.write(
            answers.render(
                status,
                body,
                self._request_id,
                keep_alive=self.keep_alive,
                content_type=content_type,
                extra=extra,
                with_body=head.method != b"HEAD",
            )
        )
        self._worker.metrics.series("", label).count(status)
        if not whole:
            self._linger()
            return b""
        self.over(monotonic())
        return data[end + length :]

    def _fail(self, code: Code, message: str, route: Route | None) -> None:
        outcome = OUTCOMES[code]
        self.answer_error(self._request_id, outcome.status, code, message, outcome.retry_after_ms, outcome.should_retry)
        self._worker.metrics.series("", route.label if route else routes.OTHER).count(outcome.status)
        self.over(monotonic())

    def _refuse(self, code: Code, message: str, route: Route | None = None) -> None:
        """Answer a request that has not come in whole; nothing after it on this connection can be read."""
        self.keep_alive = False
        self._state = _LINGERING
        if not self._request_id:
            self._request_id = self._worker.new_request_id()
        self._fail(code, message, route)
        self._linger()

    def _linger(self) -> None:
        # A socket closed with unread bytes in it resets the connection, and the answer may be lost with it.
        self._state = _LINGERING
        self._parts = []
        self._buffer = b""
        self._until = monotonic() + LINGER_SECONDS
        if self.transport.can_write_eof():
            self.transport.write_eof()


def _too_large(what: str, limit: int, key: str) -> str:
    return f"{what} may have {limit} bytes at most (gateway.{key})"
