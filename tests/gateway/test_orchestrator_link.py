"""The gateway's connection to the orchestrator: lost, silent, slow, strange."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosedError

from modelswap.gateway import link
from modelswap.gateway.link import gateway_url
from modelswap.protocol.messages import Epoch, Heartbeat, Hello, Open, Want
from modelswap.testing.waiting import until
from tests.gateway.rig import SSE_HEAD, Request, Rig, ask, chunk, in_two, post, response


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://127.0.0.1:8888", "ws://127.0.0.1:8888/gateway"),
        ("http://127.0.0.1:8888/", "ws://127.0.0.1:8888/gateway"),
        ("ws://h:1/gateway", "ws://h:1/gateway"),
        ("https://h/swap/gateway", "wss://h/swap/gateway"),
        ("127.0.0.1:8888", "ws://127.0.0.1:8888/gateway"),
    ],
)
def test_addresses(given: str, used: str) -> None:
    """Any usual way to write the orchestrator's address will do."""
    assert gateway_url(given) == used


async def test_says_hello_with_its_token(rig: Rig) -> None:
    """The first thing said is hello, with the token in the handshake."""
    await rig.start()
    assert isinstance(rig.orchestrator.said[0], Hello)
    assert rig.orchestrator.authorization == ["Bearer secret-token"]


async def test_serves_on_while_the_orchestrator_is_away(rig: Rig) -> None:
    """Resident models answer, streams go on, the rest waits and is told of in the next hello."""
    await rig.start()
    go = asyncio.Event()

    async def script(request: Request) -> None:
        if b"stream" in request.body:
            request.connection.write(SSE_HEAD + chunk(b"data: 1\n\n"))
            await go.wait()
            request.connection.write(chunk(b"data: 2\n\n") + b"0\r\n\r\n")
        else:
            request.connection.write(response(b"{}"))

    await rig.engine(script)
    stream, waiting = await rig.wire(), await rig.wire()
    await stream.send(post(ask(stream=True)))
    await stream.head()
    port = rig.orchestrator.port
    await rig.orchestrator.stop()
    await until(lambda: not rig.worker.admission.connected)
    assert (await rig.call(post(ask()))).status == 200
    assert (await rig.get("/health")).json()["orchestrator"] == {"connected": False}
    await waiting.send(post(ask("coder")))
    await until(lambda: rig.worker.waiting)
    await rig.orchestrator.start(port)
    hello = await rig.orchestrator.hears(Hello, 2)
    assert [(held.model, held.in_flight) for held in hello.leases] == [("mistral", 1)]
    assert [ticket.model for ticket in hello.tickets] == ["coder"]
    go.set()
    assert await stream.chunk() == b"data: 1\n\n"
    assert await stream.chunk() == b"data: 2\n\n"
    assert await stream.chunk() == b""
    await rig.engine(model="coder")
    assert (await waiting.response()).status == 200


async def test_a_connection_that_breaks_as_it_is_made_cuts_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orchestrator that goes away between accepting a connection and the handshake is away, like any other.

    On a busy loop `websockets` tells it with `ConnectionClosed`, not with a handshake's failure.
    """
    broken = 0

    async def breaking(*arguments: Any, **options: Any) -> ClientConnection:
        nonlocal broken
        if rig.orchestrator.connections and broken < 2:
            broken += 1
            raise ConnectionClosedError(None, None)
        return await connect(*arguments, **options)

    monkeypatch.setattr(link, "connect", breaking)
    await rig.start()
    go = asyncio.Event()

    await rig.engine(in_two(go))
    stream = await rig.wire()
    await stream.send(post(ask(stream=True)))
    await stream.head()
    port = rig.orchestrator.port
    await rig.orchestrator.stop()
    await rig.orchestrator.start(port)
    hello = await rig.orchestrator.hears(Hello, 2)
    assert broken == 2
    assert [(held.model, held.in_flight) for held in hello.leases] == [("mistral", 1)]
    go.set()
    assert [await stream.chunk() for _ in range(3)] == [b"data: 1\n\n", b"data: 2\n\n", b""]


async def test_silent_orchestrator_is_left(rig: Rig) -> None:
    """A connection on which nothing is heard for a term is given up for a new one."""
    rig.orchestrator.term_ms = 300
    rig.orchestrator.answers_heartbeats = False
    await rig.start()
    await rig.orchestrator.hears(Heartbeat)
    await rig.orchestrator.hears(Hello, 2)


async def test_heartbeats_are_said(rig: Rig) -> None:
    """The gateway shows that it lives, and stays connected while it is answered."""
    rig.orchestrator.term_ms = 300
    await rig.start()
    await rig.orchestrator.hears(Heartbeat, 5)
    assert len(rig.orchestrator.connections) == 1


async def test_pause_longer_than_the_term_suspends_all(rig: Rig) -> None:
    """A gateway that was stopped too long admits nothing on what it held before its lease is confirmed."""
    rig.orchestrator.term_ms = 5000
    await rig.start()
    engine = await rig.engine()
    worker = rig.worker
    assert (await rig.call(post(ask()))).status == 200
    worker.admission._alive_at = -1e9
    wire = await rig.wire()
    await wire.send(post(ask()))
    await rig.orchestrator.hears(Hello, 2)
    await until(
        lambda: any(isinstance(m, Want) for m in rig.orchestrator.said) or rig.orchestrator.heard(Hello)[1].tickets
    )
    assert len(engine.requests) == 1
    await rig.orchestrator.open(engine)
    assert (await wire.response()).status == 200


async def test_nothing_is_heard_on_a_connection_given_up(rig: Rig) -> None:
    """What was still under way on the old connection can't undo a suspension."""
    await rig.start()
    engine = await rig.engine()
    link = rig.worker.link
    heard = rig.worker._heard_at
    link.reconnect()
    await rig.orchestrator.say(Open(model="mistral", epoch=Epoch(1, 2), host="127.0.0.1", port=engine.port, slots=1))
    await rig.orchestrator.hears(Hello, 2)
    await until(lambda: rig.worker._heard_at > heard)
    assert [lease.epoch for lease in rig.worker.admission.leases] == [Epoch(1, 1)]


@pytest.mark.parametrize("frame", ["{", '{"type":"from_the_future"}', '{"type":"open"}', b"\xff", "[]"])
async def test_strange_messages_are_passed_over(rig: Rig, frame: str | bytes) -> None:
    """What isn't understood is left aside, and the connection stays."""
    await rig.start()
    await rig.orchestrator.connections[0].send(frame)
    engine = await rig.engine()
    assert (await rig.call(post(ask()))).status == 200
    assert engine.requests
    assert len(rig.orchestrator.connections) == 1
