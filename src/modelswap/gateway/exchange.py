"""One relayed request: from being let through or queued, over its engine's response, to its end, whatever that is."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Final

from modelswap.core.held import Lease, LeaseState
from modelswap.gateway import chunked, headers, progress
from modelswap.gateway.body import replace_model
from modelswap.gateway.headers import CHUNKED, RequestHead, ResponseHead
from modelswap.gateway.metrics import FAULTS, QUEUE_WAIT, RETRIES
from modelswap.gateway.pool import Pool
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
_REQUEST: Final = b"%b%bcontent-length: %d\r\nx-request-id: %b\r\n\r\n%b"
_RESPONSE: Final = b"%bcontent-length: %d\r\nx-request-id: %b\r\n\r\n%b"
_COPIED: Final = 32768
"""A body smaller than this many bytes is copied behind its head, so that both go out in one piece."""
_CONNECTION_CLOSE: Final = b"connection: close\r\n"


# How far an exchange is. Plain integers: members of an enum take 50 ns to name.
_BEFORE: Final = 0
"""The client has been sent nothing of a response."""
_RAW: Final = 1
"""The engine's bytes are passed on as they come."""
_PLAIN: Final = 2
"""The client speaks HTTP/1.0: what the chunks carry is passed on, and the connection's end is the response's."""
_EVENTS: Final = 3
"""The client has been sent a 200 and progress; its engine's response has not begun."""
_EVENTS_STREAM: Final = 4
"""… and now its engine's events are passed on in our own chunks."""
_EVENTS_COLLECT: Final = 5
"""… but its engine answered with something else, which will be made an event of."""
_OVER: Final = 6


class _Turn:
    """What a request has while it waits for its turn."""

    __slots__ = ("since", "ticket", "timer", "told", "told_at")

    def __init__(self, ticket: int, since: float) -> None:
        self.ticket = ticket
        self.since = since
        self.timer: asyncio.TimerHandle | None = None
        self.told = b""
        self.told_at = 0.0


class Exchange:
    """One request that is relayed, and its response. Owned by its `Client`."""

    __slots__ = (
        "_attempts",
        "_body",
        "_collected",
        "_connecting",
        "_head",
        "_name",
        "_phase",
        "_response",
        "_route",
        "_streams",
        "_turn",
        "_upstream",
        "_worker",
        "client",
        "first_byte",
        "lease",
        "model",
        "request_id",
        "since",
        "status",
    )

    def __init__(
        self,
        client: Client,
        worker: Worker,
        head: RequestHead,
        route: Route,
        request_id: bytes,
        name: str,
        streams: bool,
        body: bytes,
        since: float,
    ) -> None:
        self.client = client
        self._worker = worker
        self._head = head
        self._route = route
        self._name = name
        self._streams = streams
        self._body = body
        self.since = since
        self._phase = _BEFORE
        self._attempts = 0
        self._upstream: Upstream | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._response: ResponseHead | None = None
        self.first_byte = 0.0
        self._turn: _Turn | None = None
        self.request_id = request_id
        self.model: CatalogModel | None = None
        self.lease: Lease | None = None
        self.status = 0

    def __repr__(self) -> str:
        return f"<Exchange {self._name} phase={self._phase} lease={self.lease}>"

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
        if model is not None and not worker.stopping:
            lease = admission.enter(model.name, self.since)
            if lease is not None:
                self._send(lease, self.since)
            else:
                self._queue(first=False)
        elif worker.stopping:
            self.fail(Code.SHUTTING_DOWN, "This gateway is shutting down")
        elif admission.catalog is not None:
            self.fail(Code.MODEL_NOT_FOUND, admission.unknown(self._name))
        elif worker.waiting_room(len(self._body)):
            self._queue(first=False)
        else:
            self.fail(Code.QUEUE_FULL, "Too many requests wait already; come back later")

    def admitted(self, lease: Lease) -> None:
        """Go on: the request has its turn."""
        turn = self._end_wait()
        now = monotonic()
        if turn is not None:
            self._worker.metrics.histogram(QUEUE_WAIT, (("model", lease.model),)).observe(now - turn.since)
        self._send(lease, now)

    def rejected(self, refusal: Refuse) -> None:
        """Answer with the refusal; its ticket is void."""
        self._end_wait()
        self._answer_error(
            refusal.status,
            refusal.code,
            refusal.message,
            refusal.retry_after_ms,
            refusal.should_retry,
        )

    def rerouted(self) -> None:
        """Look the model up again, now that there is a catalog; its ticket is void."""
        self._end_wait()
        self.start()

    def refuse_waiting(self, code: Code, message: str) -> None:
        """Take the request out of the queue and answer it with an error."""
        turn = self._end_wait()
        if turn is not None:
            self._worker.admission.forget(turn.ticket, monotonic())
        self.fail(code, message)

    def tell(self, now: float) -> None:
        """Tell a client that was promised it how its request gets on, if that is news or the last word is old."""
        turn = self._turn
        if turn is None or self._phase != _EVENTS or self.client.write_paused:
            return
        told = progress.comment(*self._worker.admission.progress(turn.ticket))
        if told != turn.told or now - turn.told_at >= TELL_SECONDS:
            turn.told = told
            turn.told_at = now
            self._write_event(told)

    def _queue(self, *, first: bool) -> None:
        worker = self._worker
        now = monotonic()
        outcome = worker.admission.wait(self._name, self.since, now, len(self._body), first=first)
        if isinstance(outcome, Refuse):
            self.rejected(outcome)
        else:
            turn = self._turn = _Turn(outcome, now)
            worker.waiting[outcome] = self
            after = worker.progress_after
            if self._streams and after > 0:
                turn.timer = worker.loop.call_later(max(0.0, self.since + after - now), self._begin_progress)
        worker.pump()

    def _end_wait(self) -> _Turn | None:
        turn, self._turn = self._turn, None
        if turn is not None:
            self._worker.waiting.pop(turn.ticket, None)
            if turn.timer is not None:
                turn.timer.cancel()
        return turn

    def _begin_progress(self) -> None:
        if self._phase == _BEFORE:
            self._phase = _EVENTS
            self.status = 200
            client = self.client
            client.write(progress.stream_head(self.request_id, http10=self._head.http10, keep_alive=client.keep_alive))
        self.tell(monotonic())

    # ── sending ──────────────────────────────────────────────────────────────────────────────────────────

    def _send(self, lease: Lease, now: float) -> None:
        self.lease = lease
        worker = self._worker
        pool = worker.pools.get(lease) or worker.pool(lease)
        idle = pool.idle
        if idle and idle[-1].idle_until > now:
            self._send_on(idle.pop(), pool)
            return
        upstream = pool.take(now)
        if upstream is not None:
            self._send_on(upstream, pool)
        else:
            self._connecting = worker.spawn(self._connect(pool))

    def _send_on(self, upstream: Upstream, pool: Pool) -> None:
        self._upstream = upstream
        head = self._head
        prefix = pool.prefixes.get(self._route.target) or pool.prefix(self._route.target)
        kept = head.kept
        if self._phase != _BEFORE:
            kept = b"".join(line + b"\r\n" for line in headers.without(head.lines, b"accept-encoding"))
        body = self._body
        model = self.model
        if model is not None and model.upstream_name is not None and self._name not in model.adapters:
            body = replace_model(body, model.upstream_name)
        size = len(body)
        if size < _COPIED:
            upstream.send(self, _REQUEST % (prefix, kept, size, self.request_id, body))
        else:
            upstream.send(self, _REQUEST % (prefix, kept, size, self.request_id, b""), body)
        if self.client.write_paused:
            upstream.pause()

    async def _connect(self, pool: Pool) -> None:
        try:
            upstream = await pool.connect()
        except (OSError, TimeoutError) as error:
            self._connecting = None
            self.failed(f"no connection: {str(error) or type(error).__name__}", reused=False)
            return
        self._connecting = None
        if upstream.lost:
            self.failed("connection closed at once", reused=False)
        else:
            self._send_on(upstream, pool)

    def failed(self, reason: str, *, reused: bool) -> None:
        """Try again: the connection ended before the response began. A ``reused`` one counts for nothing."""
        worker = self._worker
        self._upstream = None
        lease = self.lease
        assert lease is not None  # noqa: S101 - for the type checker: it is admitted
        labels = (("model", lease.model),)
        if reused:
            worker.metrics.number(RETRIES, labels).add()
            self._connecting = worker.spawn(self._connect(worker.pool(lease)))
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

    def begin(self, head: ResponseHead, length: int) -> bytes | None:
        """Take in the response's head and its body's length (see `HeadReader.response`).

        Returns the head to send before the body's bytes, which then go out as they come; or None if `payload` is to be
        called with what the body carries.
        """
        self._response = head
        self.first_byte = monotonic()
        if self._phase == _EVENTS:
            if 200 <= head.status < 300 and head.is_event_stream:
                self._phase = _EVENTS_STREAM
            else:
                self._phase = _EVENTS_COLLECT
                self._collected: list[bytes] = []
            return None
        client = self.client
        status = self.status = head.status
        self._phase = _RAW
        if length >= 0 and client.keep_alive and status != 204:
            return _RESPONSE % (head.kept, length, self.request_id, b"")
        framing = b""
        if length >= 0:
            framing = b"" if status == 204 else b"content-length: %d\r\n" % length
        elif length == CHUNKED and not self._head.http10:
            framing = b"transfer-encoding: chunked\r\n"
        else:
            client.keep_alive = False
            if length == CHUNKED:
                self._phase = _PLAIN
        connection = b"" if client.keep_alive else _CONNECTION_CLOSE
        out = b"%b%bx-request-id: %b\r\n%b\r\n" % (head.kept, framing, self.request_id, connection)
        if self._phase == _RAW:
            return out
        client.write(out)
        return None

    def whole(self, head: ResponseHead, body: bytes, upstream: Upstream) -> bool:
        """Pass on a response that has come all at once, and finish; False if it is not as simple as that.

        The usual end of a request that isn't streamed, in one step instead of `begin` and `complete`.
        """
        client = self.client
        lease = self.lease
        if self._phase != _BEFORE or not client.keep_alive or lease is None:
            return False
        now = monotonic()
        client.transport.write(_RESPONSE % (head.kept, len(body), self.request_id, body))
        self._upstream = None
        self._phase = _OVER
        upstream.release(head.reusable, now)
        self.lease = None
        worker = self._worker
        admission = worker.admission
        admission.leave(lease, now)
        seconds = now - self.since
        worker.metrics.series(lease.model, self._route.label).relayed(head.status, seconds, seconds)
        if admission.pending:
            worker.pump()
        client.over(now)
        return True

    def payload(self, data: bytes) -> None:
        """Pass on what the response's body carries."""
        if self._phase == _EVENTS_STREAM:
            self._write_event(data)
        elif self._phase == _PLAIN:
            self.client.write(data)
        elif self._phase == _EVENTS_COLLECT:
            self._collected.append(data)
            if sum(map(len, self._collected)) > MAX_ENGINE_ERROR:
                self._drop_upstream()
                self._leave()
                self.fail(Code.INTERNAL, "The engine's answer was no event stream, and too long to be made one")

    def complete(self, now: float) -> None:
        """Finish: the response has ended as it should, and its connection is free or closed."""
        self._upstream = None
        phase = self._phase
        if phase >= _EVENTS:
            good = True
            if phase == _EVENTS_COLLECT:
                head = self._response
                assert head is not None  # noqa: S101 - for the type checker: it was collected
                event, good = progress.answer_event(head, b"".join(self._collected))
                self._write_event(event)
            self._end_events(good=good)
        self._phase = _OVER
        worker = self._worker
        admission = worker.admission
        lease = self.lease
        if lease is not None:
            self.lease = None
            admission.leave(lease, now)
            since = self.since
            series = worker.metrics.series(lease.model, self._route.label)
            series.relayed(self.status, self.first_byte - since, now - since)
        if admission.pending:
            worker.pump()
        self.client.over(now)

    def broken(self, reason: str, upstream: Upstream | None, code: Code = Code.ENGINE_DIED) -> None:
        """Finish: the response has broken off. The client is told in its event stream, or sees it cut off."""
        self._upstream = None
        phase = self._phase
        response = self._response
        message = f"The response of '{self._name}' broke off: {reason}"
        if phase >= _EVENTS:
            if upstream is not None:
                upstream.drop()
            self._leave()
            self.fail(code, message)
            return
        event = b"\n\n" + progress.code_event(code, message)
        last: bytes | None = None
        if response is not None and response.is_event_stream:
            last = event if phase == _PLAIN else upstream.splice(event) if upstream is not None else None
        if upstream is not None:
            upstream.drop()
        self._leave()
        if last is None:
            hang_up(self.client.transport, reset=True)
        else:
            self.client.write(last)
        self.client.keep_alive = False
        self._over()

    def abort(self, code: Code, message: str) -> None:
        """End it now, with an error: what it runs under has to end."""
        if self._phase in (_RAW, _PLAIN):
            self.broken(message, self._upstream, code)
        else:
            self._drop_upstream()
            self._leave()
            self.fail(code, message)

    def abandon(self) -> None:
        """Free everything at once: the client has gone."""
        if self._phase == _OVER:
            return
        if self._phase == _BEFORE:
            self.status = CLIENT_GONE
        self._drop_upstream()
        turn = self._end_wait()
        if turn is not None:
            self._worker.admission.forget(turn.ticket, monotonic())
        self._leave()
        self._count()
        self._phase = _OVER
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
        if self._phase == _BEFORE:
            self.status = status
            self.client.answer_error(self.request_id, status, code, message, retry_after_ms, should_retry)
            self._over()
            return
        event = progress.error_event(status, code, message, retry_after_ms=retry_after_ms, should_retry=should_retry)
        self._write_event(event)
        self._end_events(good=False)
        self._over()

    def _end_events(self, *, good: bool) -> None:
        """End our own event stream. Behind an error the connection ends instead, so that nobody takes it for whole."""
        if not good:
            self.client.keep_alive = False
        elif not self._head.http10:
            self.client.write(chunked.END)

    def _write_event(self, data: bytes) -> None:
        self.client.write(data if self._head.http10 else chunked.chunk(data))

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
        duration = monotonic() - self.since
        if self._response is not None:
            series.relayed(self.status, self.first_byte - self.since, duration)
        else:
            series.ended(self.status, duration)

    def _over(self) -> None:
        self._count()
        self._phase = _OVER
        if self._worker.admission.pending:
            self._worker.pump()
        self.client.over(monotonic())
