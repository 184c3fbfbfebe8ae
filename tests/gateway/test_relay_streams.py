"""Streams: events as they come, backpressure, clients that leave, engines that die."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import msgspec
import pytest

from modelswap.gateway import metrics
from modelswap.protocol.messages import Fault
from modelswap.testing.waiting import until
from tests.gateway.rig import SSE_HEAD, Request, Rig, ask, chunk, post, response

EVENT = b'data: {"choices":[]}\n\n'


async def test_events_pass_as_they_come(rig: Rig) -> None:
    """Each event is with the client before the engine sends the next, in the engine's own chunks."""
    await rig.start()
    go = asyncio.Semaphore(0)

    async def script(request: Request) -> None:
        request.connection.write(SSE_HEAD)
        for n in range(5):
            await go.acquire()
            request.connection.write(chunk(b"data: %d\n\n" % n))
        request.connection.write(b"0\r\n\r\n")

    engine = await rig.engine(script)
    wire = await rig.wire()
    for _ in range(2):
        await wire.send(post(ask(stream=True)))
        status, headers = await wire.head()
        assert (status, dict(headers)["content-type"]) == (200, "text/event-stream")
        for n in range(5):
            go.release()
            assert await wire.chunk() == b"data: %d\n\n" % n
        assert await wire.chunk() == b""
    assert len(engine.connections) == 1
    await until(lambda: rig.in_flight() == 0)


async def test_slow_client_holds_its_engine_back(rig: Rig) -> None:
    """An engine that is faster than its client is not read from meanwhile, and nothing is lost."""
    await rig.start()
    piece = b"Q" * 65536
    sent = 0

    async def script(request: Request) -> None:
        nonlocal sent
        request.connection.write(SSE_HEAD)
        for _ in range(1000):
            await request.connection.drained.wait()
            request.connection.write(chunk(piece))
            sent += 1
        request.connection.write(b"0\r\n\r\n")

    engine = await rig.engine(script)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.setblocking(False)
    with sock:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", rig.port))
        await loop.sock_sendall(sock, post(ask(stream=True)))
        await engine.request()
        await until(lambda: not engine.connections[0].drained.is_set())
        held = sent
        assert held < 1000
        got = 0
        tail = b""
        while not tail.endswith(b"0\r\n\r\n"):
            data = await asyncio.wait_for(loop.sock_recv(sock, 1 << 20), 30)
            got += data.count(b"Q")
            tail = (tail + data)[-5:]
        assert got == 1000 * len(piece)
    await until(lambda: rig.in_flight() == 0)


async def test_client_that_never_reads_is_cut(rig: Rig) -> None:
    """A client that takes nothing of its answer for the idle timeout gives its slot back."""
    await rig.start(idle_timeout=0.2)

    async def script(request: Request) -> None:
        request.connection.write(SSE_HEAD)
        while not request.connection.closed.is_set():
            await request.connection.drained.wait()
            request.connection.write(chunk(b"x" * 65536))
            await asyncio.sleep(0)

    engine = await rig.engine(script)
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setblocking(False)
    with sock:
        await loop.sock_connect(sock, ("127.0.0.1", rig.port))
        await loop.sock_sendall(sock, post(ask(stream=True)))
        await engine.request()
        await asyncio.wait_for(engine.connections[0].closed.wait(), 30)
    await until(lambda: rig.in_flight() == 0)


@pytest.mark.parametrize("begun", [False, True])
async def test_client_that_leaves_frees_its_engine(rig: Rig, begun: bool) -> None:
    """The engine's connection ends at once, also while the engine is silent."""
    await rig.start()

    async def script(request: Request) -> None:
        if begun:
            request.connection.write(SSE_HEAD + chunk(EVENT))

    engine = await rig.engine(script, slots=1)
    wire = await rig.wire()
    await wire.send(post(ask(stream=True)))
    request = await engine.request()
    if begun:
        await wire.head()
    await wire.close()
    await asyncio.wait_for(request.connection.closed.wait(), 30)
    await until(lambda: rig.in_flight() == 0)
    assert not rig.orchestrator.heard(Fault)
    status = "200" if begun else "499"
    labels = (("model", "mistral"), ("path", "/v1/chat/completions"), ("status", status))
    assert rig.worker.metrics.read()[metrics.REQUESTS][labels] == [1]


async def test_client_that_leaves_while_connecting_frees_its_slot(rig: Rig) -> None:
    """A client that goes before its engine has even accepted leaves nothing behind."""
    await rig.start()
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    blockers = [socket.socket() for _ in range(4)]
    for blocker in blockers:
        blocker.setblocking(False)
        blocker.connect_ex(full.getsockname())
    engine = await rig.engine(lease=False)
    engine.port = full.getsockname()[1]
    await rig.lease(engine)
    wire = await rig.wire()
    await wire.send(post(ask()))
    await until(lambda: rig.in_flight() == 1)
    await wire.close()
    await until(lambda: rig.in_flight() == 0)
    assert not rig.orchestrator.heard(Fault)
    for each in (full, *blockers):
        each.close()


def errors(stream: bytes) -> list[dict[str, object]]:
    """Return the errors among a stream's events; the one that broke off may hold anything."""
    found = []
    for event in stream.split(b"\n\n"):
        with contextlib.suppress(msgspec.DecodeError):
            data = msgspec.json.decode(event.strip().removeprefix(b"data: "))
            if "error" in data:
                found.append(data["error"])
    return found


@pytest.mark.parametrize(
    "last",
    [
        b"",
        chunk(EVENT)[:-2],
        chunk(EVENT)[:-1],
        chunk(EVENT)[:-7],
        chunk(EVENT)[:5],
        chunk(b"x" * 5000)[:10],
        b"3;ext=1\r\n: \n\r\n",
    ],
)
async def test_dying_stream_ends_with_an_error_event(rig: Rig, last: bytes) -> None:
    """An engine that dies in its stream, anywhere in a chunk, leaves well-framed chunks, the last one an error.

    The body doesn't end properly, so that nobody takes it for whole or uses the connection again.
    """
    await rig.start()

    async def script(request: Request) -> None:
        request.connection.write(SSE_HEAD + chunk(EVENT) + last)
        request.connection.transport.close()

    await rig.engine(script)
    wire = await rig.wire()
    await wire.send(post(ask(stream=True)))
    await wire.head()
    got = await wire.cut()
    assert got.startswith(EVENT)
    (error,) = errors(got)
    assert (error["code"], error["type"], error["status"]) == ("engine_died", "server_error", 502)
    assert b"[DONE]" not in got
    assert not rig.orchestrator.heard(Fault)
    await until(lambda: rig.in_flight() == 0)


async def test_bad_chunks_end_a_stream_in_an_unclean_way(rig: Rig) -> None:
    """When the engine's framing makes no sense any more, the client's connection is cut."""
    await rig.start()

    async def script(request: Request) -> None:
        request.connection.write(SSE_HEAD + chunk(EVENT))
        await asyncio.sleep(0)
        request.connection.write(b"nonsense\r\n")

    engine = await rig.engine(script)
    wire = await rig.wire()
    await wire.send(post(ask(stream=True)))
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        await wire.response()
    await asyncio.wait_for(engine.connections[0].closed.wait(), 30)
    await until(lambda: rig.in_flight() == 0)


@pytest.mark.parametrize(
    "begun",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"{"),
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 1000\r\n\r\ndata: 1\n\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n"
        b"transfer-encoding: chunked\r\n\r\n" + chunk(b"\x1f\x8b"),
    ],
)
async def test_dying_answer_is_seen_to_be_cut(rig: Rig, begun: bytes) -> None:
    """Where no error can be added, the client sees that something is missing."""
    await rig.start()

    async def script(request: Request) -> None:
        request.connection.write(begun)
        request.connection.transport.close()

    await rig.engine(script)
    wire = await rig.wire()
    await wire.send(post(ask()))
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        await wire.response()
    await until(lambda: rig.in_flight() == 0)


@pytest.mark.parametrize("reset", [False, True])
async def test_answer_framed_by_its_end(rig: Rig, reset: bool) -> None:
    """An answer that ends with its connection does so for the client; one that is reset is reset, too."""
    await rig.start()
    go = asyncio.Event()

    async def script(request: Request) -> None:
        request.connection.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nhello")
        await go.wait()
        if reset:
            transport = request.connection.transport
            real = socket.socket(fileno=transport.get_extra_info("socket").fileno())
            real.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            real.detach()
            transport.abort()
        else:
            request.connection.transport.close()

    await rig.engine(script)
    wire = await rig.wire()
    await wire.send(post(ask()))
    assert dict((await wire.head())[1])["connection"] == "close"
    assert await wire.until(b"hello") == b"hello"
    go.set()
    if reset:
        with pytest.raises(ConnectionResetError):
            await wire.rest()
    else:
        assert await wire.rest() == b""


async def test_dying_stream_of_an_old_client(rig: Rig) -> None:
    """An HTTP/1.0 client gets its error event as plain bytes."""
    await rig.start()

    async def script(request: Request) -> None:
        request.connection.write(SSE_HEAD + chunk(EVENT))
        request.connection.transport.close()

    await rig.engine(script)
    got = await rig.call(post(ask(stream=True), version="1.0"))
    assert got.body.startswith(EVENT)
    assert errors(got.body)[0]["code"] == "engine_died"


async def test_engine_that_answers_early_is_not_reused(rig: Rig) -> None:
    """An answer given before the whole request was taken is passed on, and its connection closed."""
    await rig.start()
    engine = await rig.engine(lease=False)

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(100)
        writer.write(response(b'"no"', status="413 Too Large"))
        await reader.read(-1)
        writer.close()

    server = await asyncio.start_server(early, "127.0.0.1", 0, limit=1000)
    engine.port = server.sockets[0].getsockname()[1]
    await rig.lease(engine)
    got = await rig.call(post(ask(text="x" * 20_000_000)))
    assert (got.status, got.body) == (413, b'"no"')
    await until(lambda: rig.in_flight() == 0)
    assert not rig.worker.pool(rig.worker.admission.leases[0]).idle
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("bad", [b"nonsense\r\n", b"2\r\nabcd\r\n"])
async def test_bad_chunks_anywhere(rig: Rig, version: str, later: bool, bad: bytes) -> None:
    """Framing that makes no sense cuts the answer, be it in the first read or later, for old clients, too."""
    await rig.start()
    go = asyncio.Event()

    async def script(request: Request) -> None:
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        if later:
            request.connection.write(head + chunk(b"first"))
            await go.wait()
            request.connection.write(bad)
        else:
            request.connection.write(head + bad)

    engine = await rig.engine(script)
    wire = await rig.wire()
    await wire.send(post(ask(), version=version))
    if later:
        await wire.until(b"first")
        go.set()
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await wire.until(b"never to come")
    await asyncio.wait_for(engine.connections[0].closed.wait(), 30)
    await until(lambda: rig.in_flight() == 0)


@pytest.mark.parametrize("first_read", [False, True])
async def test_surplus_after_the_last_chunk(rig: Rig, first_read: bool) -> None:
    """What follows a chunked answer's end stays with us, and its connection isn't used again."""
    await rig.start()

    async def script(request: Request) -> None:
        request.connection.write(SSE_HEAD)
        if not first_read:
            request.connection.write(chunk(EVENT))
            await asyncio.sleep(0.01)
        request.connection.write(chunk(EVENT) + b"0\r\n\r\nsurplus")

    engine = await rig.engine(script)
    wire = await rig.wire()
    for _ in range(2):
        await wire.send(post(ask(stream=True)))
        assert (await wire.response()).body.endswith(EVENT)
    assert len(engine.connections) == 2


async def test_pipelining_client_that_reads_late(rig: Rig) -> None:
    """While an answer isn't taken the next request waits; then all go on, in order."""
    await rig.start()

    async def script(request: Request) -> None:
        request.connection.write(response(request.body[-10:] * 500_000))

    engine = await rig.engine(script)
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.setblocking(False)
    with sock:
        await loop.sock_connect(sock, ("127.0.0.1", rig.port))
        bodies = [ask(n=f"{n:09}") for n in range(3)]
        await loop.sock_sendall(sock, b"".join(map(post, bodies)))
        await engine.request()
        await until(lambda: any(client.write_paused for client in rig.worker.clients))
        assert len(engine.requests) == 1
        got = b""
        while len(got) < 3 * 5_000_000:
            data = await asyncio.wait_for(loop.sock_recv(sock, 1 << 20), 30)
            assert data
            got += data
        assert got.index(bodies[0][-10:]) < got.index(bodies[1][-10:]) < got.index(bodies[2][-10:])
    await until(lambda: rig.in_flight() == 0)
