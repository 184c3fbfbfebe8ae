"""One relayed request: from being let through or queued, over its engine's response, to its end, whatever that is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import IntEnum
from time import monotonic
from typing import TYPE_CHECKING, Final

from modelswap.core.admission import Lease, LeaseState
from modelswap.gateway import chunked, headers, progress
from modelswap.gateway.body import replace_model
from modelswap.gateway.headers import CHUNKED, RequestHead, ResponseHead
from modelswap.gateway.metrics import FAULTS, QUEUE_WAIT, RETRIES
from modelswap.gateway.routes import Route
from modelswap.gateway.upstream import Upstream, hang_up
from modelswap.protocol.errors import OUTCOMES, Code
from modelswap.protocol.messages import CatalogModel, Refuse

if TYPE_CHECKING:
    from modelswap.gateway.http1 import Client
    from modelswap.gateway.worker import Worker

TELL_SECONDS: Final = 5.0
"""How often a waiting client hears of us, even if nothing has changed."""
CLIENT_GONE: Final = 499
"""The status under which a request is counted whose client left before its response began."""
MAX_ENGINE_ERROR: Final = 1024 * 1024
"""How much of an engine's response is kept to be made an event of."""
_ATTEMPTS: Final = 2
_CONNECTION_CLOSE: Final = b"connection: close\r\n"


class _Phase(IntEnum):
    BEFORE = 0
    """The client has been sent nothing of a response."""
    RAW = 1
    """The engine's bytes are passed on as they come."""
    PLAIN = 2
    """The client speaks HTTP/1.0: what the chunks carry is passed on, and the connection's end is the response's."""
    EVENTS = 3
    """The client has been sent a 200 and progress; its engine's response has not begun."""
    EVENTS_STREAM = 4
    """… and now its engine's events are passed on in our own chunks."""
    EVENTS_COLLECT = 5
    """… but its engine answered with something else, which will be made an event of."""
    OVER = 6


class Exchange:
    """One request that is relayed, and its response. Owned by its `Client`."""

    __slots__ = (
        "_attempts",
        "_body",
        "_client",
        "_collected",
        "_collected_head",
        "_connecting",
        "_head",
        "_name",
        "_phase",
        "_queued_at",
        "_response",
        "_route",
        "_streams",
        "_told",
        "_told_at",
        "_upstream",
        "_worker",
        "head_bytes",
        "lease",
        "model",
        "request_id",
        "since",
        "status",
        "ticket",
        "timer",
    )

    def __init__(
        self,
        client: Client,
        worker: Worker,
        head: RequestHead,
        route: Route,
        request_id: bytes,
        *,
        name: str,
        streams: bool,
        body: bytes,
        since: float,
    ) -> None:
        self._client = client
        self._worker = worker
        self._head = head
        self._route = route
        self._name = name
        self._streams = streams
        self._body = body
        self.since = since
        self._phase: _Phase = _Phase.BEFORE
        self._attempts = 0
        self._upstream: Upstream | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._response: ResponseHead | None = None
        self._queued_at = 0.0
        self._told = b""
        self._told_at = 0.0
        self.request_id = request_id
        self.model: CatalogModel | None = None
        self.lease: Lease | None = None
        self.ticket = 0
        self.timer: asyncio.TimerHandle | None = None
        self.status = 0
        self.head_bytes = b""

    def __repr__(self) -> str:
        return f"<Exchange {self._name} {self._phase.name} ticket={self.ticket} lease={self.lease}>"

    @property
    def size(self) -> int:
        """What holding this request costs: its body's bytes."""
        return len(self._body)

    # ── being let through ────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Send the request if there is room, else queue it or refuse it."""
        worker = self._worker
        admission = worker.admission
        model = self.model = admission.model_for(self._name)
        if worker.stopping:
            self.fail(Code.SHUTTING_DOWN, "This gateway is shutting down")
        elif model is not None:
            lease = admission.enter(model.name, monotonic())
            if lease is None:
                self._queue(first=False)
            else:
                self._send(lease)
        elif admission.catalog is not None:
            self.fail(Code.MODEL_NOT_FOUND, admission.unknown(self._name))
        elif worker.waiting_room(len(self._body)):
            self._queue(first=False)
        else:
            self.fail(Code.QUEUE_FULL, "Too many requests wait already; come back later")

    def admitted(self, lease: Lease) -> None:
        """Go on: the request has its turn."""
        self._dequeued()
        now = monotonic()
        self._worker.metrics.histogram(QUEUE_WAIT, (("model", lease.model),)).observe(now - self._queued_at)
        self._send(lease)

    def rejected(self, refusal: Refuse) -> None:
        """Answer with the refusal; its ticket is void."""
        self._dequeued()
        self._answer_error(
            refusal.status,
            refusal.code,
            refusal.message,
            refusal.retry_after_ms,
            refusal.should_retry,
        )

    def rerouted(self) -> None:
        """Look the model up again, now that there is a catalog; its ticket is void."""
        self._dequeued()
        self.start()

    def refuse_waiting(self, code: Code, message: str) -> None:
        """Take the request out of the queue and answer it with an error."""
        self._worker.admission.forget(self.ticket, monotonic())
        self._dequeued()
        self.fail(code, message)

    def tell(self, now: float) -> None:
        """Tell a client that was promised it how its request gets on, if that is news or the last word is old."""
        if self._phase != _Phase.EVENTS or self._client.write_paused:
            return
        told = progress.comment(*self._worker.admission.progress(self.ticket))
        if told != self._told or now - self._told_at >= TELL_SECONDS:
            self._told = told
            self._told_at = now
            self._write_event(told)

    def _queue(self, *, first: bool) -> None:
        worker = self._worker
        now = self._queued_at = monotonic()
        outcome = worker.admission.wait(self._name, self.since, now, len(self._body), first=first)
        if isinstance(outcome, Refuse):
            self.rejected(outcome)
        else:
            self.ticket = outcome
            worker.waiting[outcome] = self
            after = worker.progress_after
            if self._streams and after > 0:
                self.timer = worker.loop.call_later(max(0.0, self.since + after - now), self._begin_progress)
        worker.pump()

    def _dequeued(self) -> None:
        self._worker.waiting.pop(self.ticket, None)
        self.ticket = 0
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _begin_progress(self) -> None:
        self.timer = None
        if self._phase == _Phase.BEFORE:
            self._phase = _Phase.EVENTS
            self.status = 200
            client = self._client
            framing = b"" if self._head.http10 else b"transfer-encoding: chunked\r\n"
            connection = b"" if client.keep_alive else _CONNECTION_CLOSE
            client.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
                b"x-accel-buffering: no\r\nx-request-id: %b\r\n%b%b\r\n" % (self.request_id, framing, connection)
            )
        self._told = b""
        self._told_at = 0.0
        self.tell(monotonic())

    # ── sending ──────────────────────────────────────────────────────────────────────────────────────────

    def _send(self, lease: Lease) -> None:
        self.lease = lease
        pool = self._worker.pool(lease)
        upstream = pool.take(monotonic())
        if upstream is None:
            self._connecting = self._worker.spawn(self._connect())
        else:
            self._send_on(upstream)

    def _send_on(self, upstream: Upstream) -> None:
        self._upstream = upstream
        lease = self.lease
        assert lease is not None  # noqa: S101 - for the type checker: it is admitted
        target = self._route.target
        pool = self._worker.pool(lease)
        prefix = pool.prefixes.get(target) or pool.prefix(target)
        lines = self._head.lines
        if self._phase != _Phase.BEFORE:
            lines = headers.without(lines, b"accept-encoding")
        body = self._body
        model = self.model
        if model is not None and model.upstream_name is not None and self._name not in model.adapters:
            body = replace_model(body, model.upstream_name)
        tail = b"content-length: %d\r\nx-request-id: %b\r\n\r\n" % (len(body), self.request_id)
        upstream.send(self, prefix + b"\r\n".join([*lines, tail]), body)
        if self._client.write_paused:
            upstream.pause()

    async def _connect(self) -> None:
        lease = self.lease
        assert lease is not None  # noqa: S101 - for the type checker: it is admitted
        try:
            upstream = await self._worker.pool(lease).connect()
        except (OSError, TimeoutError) as error:
            self._connecting = None
            self.failed(f"no connection: {str(error) or type(error).__name__}", reused=False)
            return
        self._connecting = None
        if upstream.lost:
            self.failed("connection closed at once", reused=False)
        else:
            self._send_on(upstream)

    def failed(self, reason: str, *, reused: bool) -> None:
        """Try again: the connection ended before the response began. A ``reused`` one counts for nothing."""
        worker = self._worker
        self._upstream = None
        lease = self.lease
        assert lease is not None  # noqa: S101 - for the type checker: it is admitted
        labels = (("model", lease.model),)
        if reused:
            worker.metrics.number(RETRIES, labels).add()
            self._connecting = worker.spawn(self._connect())
            return
        self.lease = None
        if lease.state is not LeaseState.CLOSING:  # else it is being stopped, and no wonder
            self._attempts += 1
            worker.metrics.number(FAULTS, labels).add()
        worker.admission.fault(lease, reason, monotonic())
        if self._attempts >= _ATTEMPTS:
            self.fail(Code.ENGINE_DIED, f"The engine of '{lease.model}' died twice before it answered: {reason}")
            worker.pump()
        elif worker.stopping:
            self.fail(Code.SHUTTING_DOWN, "This gateway is shutting down")
            worker.pump()
        else:
            self._queue(first=True)

    # ── the response ─────────────────────────────────────────────────────────────────────────────────────

    def begin(self, head: ResponseHead) -> Callable[[bytes], None] | None:
        """Take in the response's head; return where its bytes go as they are, or None if `payload` wants them.

        In the first case `head_bytes` must go before them.
        """
        self._response = head
        request = self._head
        model = self.model
        worker = self._worker
        series = worker.metrics.series(model.name if model is not None else "", self._route.label)
        series.first_byte.observe(monotonic() - self.since)
        if self._phase == _Phase.EVENTS:
            events = head.content_type.startswith(b"text/event-stream")
            if 200 <= head.status < 300 and events and not head.encoded:
                self._phase = _Phase.EVENTS_STREAM
            else:
                self._phase = _Phase.EVENTS_COLLECT
                self._collected: list[bytes] = []
                self._collected_head = head
            return None
        client = self._client
        status = self.status = head.status
        length = head.length
        self._phase = _Phase.RAW
        if length >= 0:
            framing = b"" if status == 204 else b"content-length: %d\r\n" % length
        elif length == CHUNKED and not request.http10:
            framing = b"transfer-encoding: chunked\r\n"
        else:
            framing = b""
            client.keep_alive = False
            if length == CHUNKED:
                self._phase = _Phase.PLAIN
        connection = b"" if client.keep_alive else _CONNECTION_CLOSE
        tail = b"%bx-request-id: %b\r\n%b\r\n" % (framing, self.request_id, connection)
        self.head_bytes = b"HTTP/1.1 " + b"\r\n".join([head.start, *head.lines, tail])
        if self._phase == _Phase.RAW:
            return client.transport.write
        client.write(self.head_bytes)
        return None

    def payload(self, data: bytes) -> None:
        """Pass on what the response's body carries."""
        if self._phase == _Phase.EVENTS_STREAM:
            self._write_event(data)
        elif self._phase == _Phase.PLAIN:
            self._client.write(data)
        elif self._phase == _Phase.EVENTS_COLLECT:
            self._collected.append(data)
            if sum(map(len, self._collected)) > MAX_ENGINE_ERROR:
                self._drop_upstream()
                self._leave()
                self.fail(Code.INTERNAL, "The engine's answer was no event stream, and too long to be made one")

    def complete(self) -> None:
        """Finish: the response has ended as it should, and its connection is free or closed."""
        self._upstream = None
        phase = self._phase
        if phase >= _Phase.EVENTS:
            if phase == _Phase.EVENTS_COLLECT:
                self._write_event(self._collected_event())
            if not self._head.http10:
                self._client.write(chunked.END)
        self._leave()
        self._over()

    def broken(self, reason: str, upstream: Upstream | None, code: Code = Code.ENGINE_DIED) -> None:
        """Finish: the response has broken off. The client is told in its event stream, or sees it cut off."""
        self._upstream = None
        phase = self._phase
        response = self._response
        message = f"The response of '{self._name}' broke off: {reason}"
        if phase >= _Phase.EVENTS:
            if upstream is not None:
                upstream.drop()
            self._leave()
            self.fail(code, message)
            return
        outcome = OUTCOMES[code]
        event = b"\n\n" + progress.error_event(
            outcome.status,
            code,
            message,
            retry_after_ms=outcome.retry_after_ms,
            should_retry=outcome.should_retry,
        )
        last: bytes | None = None
        if response is not None and response.content_type.startswith(b"text/event-stream") and not response.encoded:
            last = event if phase == _Phase.PLAIN else upstream.splice(event) if upstream is not None else None
        if upstream is not None:
            upstream.drop()
        self._leave()
        if last is None:
            hang_up(self._client.transport, reset=True)
        else:
            self._client.write(last)
        self._client.keep_alive = False
        self._over()

    def abort(self, code: Code, message: str) -> None:
        """End it now, with an error: what it runs under has to end."""
        if self._phase in (_Phase.RAW, _Phase.PLAIN):
            self.broken(message, self._upstream, code)
        else:
            self._drop_upstream()
            self._leave()
            self.fail(code, message)

    def abandon(self) -> None:
        """Free everything at once: the client has gone."""
        if self._phase == _Phase.OVER:
            return
        if self._phase == _Phase.BEFORE:
            self.status = CLIENT_GONE
        self._drop_upstream()
        if self.ticket:
            self._worker.admission.forget(self.ticket, monotonic())
            self._dequeued()
        self._leave()
        self._count()
        self._phase = _Phase.OVER
        self._worker.pump()

    def fail(self, code: Code, message: str) -> None:
        """Answer with an error from the table."""
        outcome = OUTCOMES[code]
        self._answer_error(outcome.status, code, message, outcome.retry_after_ms, outcome.should_retry)

    def pause(self) -> None:
        """Read no more from the engine: the client doesn't keep up."""
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        """Read on from the engine."""
        if self._upstream is not None:
            self._upstream.resume()

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────────

    def _answer_error(
        self, status: int, code: str, message: str, retry_after_ms: int | None, should_retry: bool | None
    ) -> None:
        if self._phase == _Phase.BEFORE:
            self.status = status
            self._client.answer_error(self.request_id, status, code, message, retry_after_ms, should_retry)
            self._over()
            return
        event = progress.error_event(status, code, message, retry_after_ms=retry_after_ms, should_retry=should_retry)
        self._write_event(event)
        if not self._head.http10:
            self._client.write(chunked.END)
        self._client.keep_alive = False
        self._over()

    def _collected_event(self) -> bytes:
        head = self._collected_head
        body = b"".join(self._collected)
        if head.encoded:
            return progress.error_event(502, Code.INTERNAL, "The engine sent a compressed answer unasked")
        if 200 <= head.status < 300:
            return progress.data_event(body)
        return progress.engine_error_event(head.status, body, headers.find(b"\r\n".join(head.lines), b"retry-after"))

    def _write_event(self, data: bytes) -> None:
        self._client.write(data if self._head.http10 else chunked.chunk(data))

    def _drop_upstream(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.drop()

    def _leave(self) -> None:
        lease = self.lease
        if lease is not None:
            self.lease = None
            self._worker.admission.leave(lease, monotonic())

    def _count(self) -> None:
        model = self.model
        series = self._worker.metrics.series(model.name if model is not None else "", self._route.label)
        series.status(self.status).add()
        series.duration.observe(monotonic() - self.since)

    def _over(self) -> None:
        self._count()
        self._phase = _Phase.OVER
        if self._worker.admission.pending:
            self._worker.pump()
        self._client.over()
