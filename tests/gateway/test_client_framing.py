"""What clients may send, how it is split, and how long they may take."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelswap.gateway.http1 import Client
from modelswap.gateway.upstream import Upstream
from modelswap.gateway.worker import Worker
from modelswap.protocol.messages import Catalog, Epoch, Limits, Open
from modelswap.spec.config import Config
from modelswap.testing.waiting import until
from tests.gateway.rig import MODEL, Request, Rig, ask, chunk, post, replies, response
from tests.gateway.transports import RecordingTransport


def chunked(body: bytes, *sizes: int, more: str = "") -> bytes:
    """Return a request with a chunked body."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n{more}\r\n".encode()
    out = b""
    for size in sizes:
        out += chunk(body[:size])
        body = body[size:]
    return head + out + (chunk(body) if body else b"") + b"0\r\n\r\n"


async def echo(request: Request) -> None:
    """Answer with what was asked."""
    request.connection.write(response(request.body))


async def test_chunked_request_arrives_whole(rig: Rig) -> None:
    """The engine gets a length, whatever the client's framing."""
    await rig.start()
    engine = await rig.engine(echo)
    body = ask(text="x" * 1000)
    assert (await rig.call(chunked(body, 1, 7, 300, more="Trailer: x\r\n"))).body == body
    assert engine.requests[0].header("content-length") == str(len(body))
    assert engine.requests[0].header("transfer-encoding") is None
    assert engine.requests[0].header("trailer") is None


async def test_pipelined_requests_are_answered_in_order(rig: Rig) -> None:
    """Requests sent all at once, of all kinds, get their answers one after the other."""
    await rig.start()
    engine = await rig.engine(echo)
    bodies = [ask(n=n, text="x" * 100 * n) for n in range(6)]
    wire = await rig.wire()
    await wire.send(
        post(bodies[0])
        + b"\r\n\r\n"
        + chunked(bodies[1], 5)
        + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
        + post(bodies[2])
        + post(b"{")
        + b"".join(map(post, bodies[3:]))
    )
    assert (await wire.response()).body == bodies[0]
    assert (await wire.response()).body == bodies[1]
    assert (await wire.response()).json()["status"] == "ok"
    assert (await wire.response()).body == bodies[2]
    assert (await wire.response()).status == 400
    for body in bodies[3:]:
        assert (await wire.response()).body == body
    assert len(engine.connections) == 1


async def test_much_pipelining_is_held_back(rig: Rig) -> None:
    """More requests than are read ahead wait in the sockets, and all are answered."""
    await rig.start()
    await rig.engine(echo)
    bodies = [ask(n=n, text="x" * 10_000) for n in range(100)]
    wire = await rig.wire()
    sending = asyncio.create_task(wire.send(b"".join(map(post, bodies))))
    for body in bodies:
        assert (await wire.response()).body == body
    await sending


async def test_many_local_answers_in_one_packet(rig: Rig) -> None:
    """Thousands of small requests at once are no recursion."""
    await rig.start()
    wire = await rig.wire()
    sending = asyncio.create_task(wire.send(b"GET /nothing HTTP/1.1\r\n\r\n" * 3000))
    for _ in range(3000):
        assert (await wire.response()).status == 404
    await sending


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_split_of_reads_gives_the_same(data: st.DataObject) -> None:
    """However requests and answers are cut into reads, both sides get the same bytes."""
    body = ask(text=data.draw(st.text(max_size=50)))
    raw = data.draw(st.sampled_from([post(body), chunked(body, 3, 10), post(body, path="/chat/completions")]))
    answers = {
        "length": response(b"answer" * 20),
        "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunk(b"ab")
        + chunk(b"c" * 30)
        + b"0\r\n\r\n",
        "close": b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nuntil the end",
    }
    kind = data.draw(st.sampled_from(sorted(answers)))
    asked, answered = _cut(data, raw * 2), _cut(data, answers[kind])
    got = asyncio.run(_exchange(asked, answered, kind))
    expected = asyncio.run(_exchange([raw * 2], [answers[kind]], kind))
    assert got == expected


def _cut(data: st.DataObject, raw: bytes) -> list[bytes]:
    places = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    return [piece for a, b in zip([0, *places], [*places, len(raw)], strict=True) if (piece := raw[a:b])]


async def _exchange(asked: list[bytes], answered: list[bytes], kind: str) -> tuple[list[bytes], bytes]:
    """Feed reads to a worker's protocols directly, and return what each side was sent."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Config(models={}), 0, "http://127.0.0.1:9", "", Path(folder))
        limits = Limits(queue_timeout_ms=1000, queue_requests=9, queue_bytes=1 << 20)
        worker.admission.receive(Catalog(generation=1, term_ms=10**6, limits=limits, models=(MODEL,)), 0.0)
        worker.admission.receive(Open(model="mistral", epoch=Epoch(1, 1), host="127.0.0.1", port=1, slots=1), 0.0)
        worker.pump()
        worker.request_prefix = b"id-"
        pool = worker.pool(worker.admission.leases[0])
        to_engine: list[bytes] = []
        client = Client(worker)
        to_client = RecordingTransport(client)
        waiting: list[Upstream] = []

        def fresh() -> None:
            upstream = Upstream(pool)
            to_engine.append(b"")
            transport = RecordingTransport(upstream)
            upstream.idle_until = 1e18
            pool.idle.append(upstream)
            waiting.append(upstream)
            transports.append(transport)

        transports: list[RecordingTransport] = []
        fresh()
        fresh()

        def answer() -> None:
            """Answer on every connection that has been sent a request."""
            for upstream, transport in zip(waiting, transports, strict=True):
                if transport.take_request():
                    for piece in answered:
                        if not transport.is_closing():
                            upstream.data_received(piece)
                    if kind == "close":
                        transport.lose()

        for piece in asked:
            if not to_client.is_closing():
                client.data_received(piece)
                answer()
        answer()
        sent = sorted(b"".join(transport.written) for transport in transports)
        client.connection_lost(None)
        worker.metrics.close()
        return sent, b"".join(to_client.written)


async def test_expecting_client_is_told_to_go_on(rig: Rig) -> None:
    """100-continue is answered before the body, and not passed on."""
    await rig.start()
    engine = await rig.engine(echo)
    head, _, body = post(ask(), more="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    wire = await rig.wire()
    await wire.send(head + b"\r\n\r\n")
    assert (await wire.head())[0] == 100
    await wire.send(body)
    assert (await wire.response()).body == body
    assert engine.requests[0].header("expect") is None


async def test_expecting_client_is_spared_a_body_too_large(rig: Rig) -> None:
    """A client that asks first gets its 413 at once."""
    await rig.start(max_body=1000)
    wire = await rig.wire()
    await wire.send(b"POST /v1/completions HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1001\r\n\r\n")
    got = await wire.response()
    assert (got.status, got.code, got.header("connection")) == (413, "body_too_large", "close")


@pytest.mark.parametrize("size", [1001, 10_000_000])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_body_too_large(rig: Rig, size: int, framing: str) -> None:
    """413 reaches a client that is still sending, and the connection ends."""
    await rig.start(max_body=1000)
    body = ask(text="x" * size)
    wire = await rig.wire()
    sending = asyncio.create_task(wire.send(post(body) if framing == "length" else chunked(body, *[5000] * 3)))
    got = await wire.response()
    assert (got.status, got.code) == (413, "body_too_large")
    assert await wire.rest() == b""
    await wire.close()
    await asyncio.gather(sending, return_exceptions=True)


@pytest.mark.parametrize("whole", [True, False])
async def test_headers_too_large(rig: Rig, whole: bool) -> None:
    """431, whether the head ever ends or not."""
    await rig.start(max_headers=2000)
    wire = await rig.wire()
    await wire.send(b"POST /v1/completions HTTP/1.1\r\nX: " + b"x" * 3000 + (b"\r\n\r\n" if whole else b""))
    got = await wire.response()
    assert (got.status, got.code) == (431, "headers_too_large")
    assert await wire.rest() == b""


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00",
        b"hello\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n",
        b"POST /v1/completions HTTP/1.1\r\nX: y\r\n z\r\n\r\n",
    ],
)
async def test_requests_that_could_be_smuggled_end_the_connection(rig: Rig, raw: bytes) -> None:
    """What isn't clearly framed gets 400, and nothing after it is read."""
    await rig.start()
    engine = await rig.engine()
    wire = await rig.wire()
    await wire.send(raw + post(ask()))
    got = await wire.response()
    assert (got.status, got.code, got.header("connection")) == (400, "bad_request", "close")
    assert await wire.rest() == b""
    assert engine.requests == []


@pytest.mark.parametrize(
    "sent", [b"P", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n", post(ask())[:-3], chunked(ask())[:-3]]
)
async def test_slow_clients_get_408(rig: Rig, sent: bytes) -> None:
    """A head or body that takes too long to arrive is answered, and its connection ends."""
    await rig.start(header_timeout=0.1)
    wire = await rig.wire()
    await wire.send(sent)
    got = await wire.response()
    assert (got.status, got.code, got.header("connection")) == (408, "request_timeout", "close")
    assert await wire.rest() == b""


async def test_steady_upload_may_take_longer(rig: Rig) -> None:
    """A large body that keeps coming isn't cut at the header timeout: its bytes buy it time."""
    await rig.start(header_timeout=0.2)
    await rig.engine(replies(b"{}"))
    raw = post(ask(text="x" * 600_000))
    wire = await rig.wire()
    await wire.send(raw[:300_000])
    await asyncio.sleep(0.8)
    await wire.send(raw[300_000:])
    assert (await wire.response()).status == 200


async def test_idle_connection_is_closed(rig: Rig) -> None:
    """Connections that are not used end without a word, before and after a request."""
    await rig.start(idle_timeout=0.1)
    await rig.engine()
    first, second = await rig.wire(), await rig.wire()
    await second.send(post(ask()))
    assert (await second.response()).status == 200
    assert await first.rest() == b""
    assert await second.rest() == b""


async def test_slow_engine_is_no_reason_to_close(rig: Rig) -> None:
    """No limit on clients applies while their request runs."""
    await rig.start(idle_timeout=0.05, header_timeout=0.05)
    go = asyncio.Event()

    async def script(request: Request) -> None:
        await go.wait()
        request.connection.write(response(b"{}"))

    engine = await rig.engine(script)
    wire = await rig.wire()
    await wire.send(post(ask()))
    await engine.request()
    await asyncio.sleep(0.4)
    go.set()
    assert (await wire.response()).status == 200


async def test_old_clients_get_plain_bytes(rig: Rig) -> None:
    """An HTTP/1.0 client gets what the chunks carry, ended by the connection's end."""
    await rig.start()

    async def script(request: Request) -> None:
        request.connection.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"ab"))
        await asyncio.sleep(0)
        request.connection.write(chunk(b"cd") + b"0\r\n\r\n")

    await rig.engine(script)
    wire = await rig.wire()
    await wire.send(post(ask(), version="1.0"))
    got = await wire.response()
    assert (got.body, got.header("transfer-encoding"), got.header("connection")) == (b"abcd", None, "close")


@pytest.mark.parametrize("more", ["", "Connection: keep-alive\r\n"])
async def test_old_clients_with_a_length(rig: Rig, more: str) -> None:
    """HTTP/1.0 works with plain answers and errors, too, and ends each time."""
    await rig.start()
    await rig.engine()
    for body, status in ((ask(), 200), (b"{", 400)):
        wire = await rig.wire()
        await wire.send(post(body, version="1.0", more=more))
        got = await wire.response()
        assert (got.status, got.header("connection")) == (status, "close")
        assert await wire.rest() == b""


async def test_client_that_asks_for_it_is_closed(rig: Rig) -> None:
    """Connection: close is honoured, and said."""
    await rig.start()
    await rig.engine()
    wire = await rig.wire()
    await wire.send(post(ask(), more="Connection: close\r\n"))
    assert (await wire.response()).header("connection") == "close"
    assert await wire.rest() == b""


async def test_upgrade_is_ignored(rig: Rig) -> None:
    """An offer of HTTP/2 (some Java clients make it) is passed over, and the connection goes on."""
    await rig.start()
    engine = await rig.engine(echo)
    wire = await rig.wire()
    for _ in range(2):
        more = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAM\r\n"
        await wire.send(post(ask(), more=more))
        assert (await wire.response()).body == ask()
    await wire.send(b"GET /health HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + post(ask()))
    assert (await wire.response()).status == 200
    assert (await wire.response()).status == 200
    assert engine.requests[0].header("upgrade") is None


async def test_clients_come_and_go(rig: Rig) -> None:
    """Connections that end at any point leave nothing behind."""
    await rig.start()
    await rig.engine()
    raw = post(ask())
    for length in range(0, len(raw), 9):
        wire = await rig.wire()
        await wire.send(raw[:length])
        await wire.close()
    await until(lambda: not rig.worker.clients and rig.in_flight() == 0)
    assert (await rig.call(raw)).status == 200
