"""Connections of gateways: who may, which one counts, and how they end."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from modelswap.core import events
from modelswap.orchestrator import links as linking
from modelswap.orchestrator.links import Links
from modelswap.orchestrator.server import admin_server, listen, url_of
from modelswap.protocol.codec import decode_from_orchestrator, encode
from modelswap.protocol.messages import Forget, GatewayMessage, Heartbeat, Hello, Refuse
from tests.orchestrator.fakes import TOKEN, until

AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


class Rig:
    """Links behind a real server, and a scheduler's place taken by a list."""

    def __init__(self) -> None:
        self.term = 10.0
        self.handled: list[events.Event] = []
        self.changes: list[tuple[str, bool]] = []
        self.held: list[tuple[events.Event, Callable[[], bool] | None]] | None = None
        self.links = Links(
            self.post,
            token=TOKEN,
            clock=time.monotonic,
            term=lambda: self.term,
            on_change=lambda gateway, connected: self.changes.append((gateway, connected)),
        )
        self.url = ""
        self.http: aiohttp.ClientSession

    def post(self, event: events.Event, still: Callable[[], bool] | None = None) -> None:
        """Handle an event, now or when released."""
        if self.held is not None:
            self.held.append((event, still))
        elif still is None or still():
            self.handled.append(event)

    def release(self) -> None:
        """Handle what was held back."""
        held, self.held = self.held or [], None
        for event, still in held:
            self.post(event, still)

    async def connect(self, *messages: GatewayMessage, **headers: str) -> aiohttp.ClientWebSocketResponse:
        """Return a connection that has said ``messages``."""
        socket_ = await self.http.ws_connect(self.url + "/gateway", headers={**AUTHORIZED, **headers})
        for message in messages:
            await socket_.send_str(encode(message).decode())
        return socket_

    def said(self) -> list[GatewayMessage]:
        """Return what the scheduler heard of gateways."""
        return [event.message for event in self.handled if isinstance(event, events.GatewaySaid)]

    def lost(self) -> int:
        """Return how many connections the scheduler lost."""
        return sum(isinstance(event, events.GatewayLost) for event in self.handled)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """Links behind a server on a port of its own."""
    made = Rig()
    sock = listen("127.0.0.1", 0)
    made.url = url_of(sock)
    server = admin_server(Starlette(routes=[WebSocketRoute("/gateway", made.links.serve)]))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    await server.up.wait()
    async with aiohttp.ClientSession() as http:
        made.http = http
        yield made
    made.links.close()
    server.should_exit = True
    await serving
    sock.close()


async def closed(socket_: aiohttp.ClientWebSocketResponse) -> tuple[int | None, str]:
    """Return code and reason of the close that comes."""
    async with asyncio.timeout(30):
        while (message := await socket_.receive()).type is aiohttp.WSMsgType.TEXT:
            pass
    return socket_.close_code, str(message.extra or "")


@pytest.mark.parametrize(
    "authorization", [None, "Bearer wrong", f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x", "Bearer \xe9"]
)
async def test_without_the_token_there_is_no_connection(rig: Rig, authorization: str | None) -> None:
    """The handshake itself is refused."""
    headers = {} if authorization is None else {"authorization": authorization}
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await rig.http.ws_connect(rig.url + "/gateway", headers=headers)
    assert refused.value.status == 403
    assert rig.handled == []


async def test_messages_go_both_ways_in_order(rig: Rig) -> None:
    """Hello first; what the gateway says is heard, what is said to it arrives."""
    gateway = await rig.connect(Hello(gateway="g"), Forget(ticket=1), Forget(ticket=2))
    await until(lambda: len(rig.said()) == 3)
    assert rig.said() == [Hello(gateway="g"), Forget(ticket=1), Forget(ticket=2)]
    for number in range(100):
        rig.links.say("g", Heartbeat(n=number))
    got = [decode_from_orchestrator(await gateway.receive_str()) for _ in range(100)]
    assert got == [Heartbeat(n=number) for number in range(100)]
    assert rig.links.connected == 1 and rig.changes == [("g", True)]
    await gateway.close()
    await until(lambda: rig.lost() == 1)
    assert rig.links.connected == 0 and rig.changes == [("g", True), ("g", False)]
    rig.links.say("g", Heartbeat())


@pytest.mark.parametrize(
    ("frame", "code", "told"),
    [
        ("not json", linking.UNREADABLE, "not a message of the lease protocol"),
        ('{"type": "dance"}', linking.UNREADABLE, "not a message of the lease protocol"),
        (encode(Heartbeat()).decode(), linking.POLICY_VIOLATION, "the first message must be hello"),
        (encode(Hello(gateway="g", version=99)).decode(), linking.WRONG_VERSION, "version 99"),
        (encode(Hello(gateway="")).decode(), linking.POLICY_VIOLATION, "needs a name"),
        (encode(Hello(gateway="g" * 300)).decode(), linking.POLICY_VIOLATION, "needs a name"),
    ],
)
async def test_a_bad_first_message_closes_the_connection_with_a_reason(
    rig: Rig, frame: str, code: int, told: str
) -> None:
    """And the scheduler hears nothing of it."""
    gateway = await rig.connect()
    await gateway.send_str(frame)
    got, reason = await closed(gateway)
    assert got == code and told in reason and rig.handled == []


async def test_a_connection_that_says_nothing_is_closed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a while to say hello."""
    monkeypatch.setattr(linking, "HELLO_WITHIN", 0.02)
    assert await closed(await rig.connect()) == (linking.POLICY_VIOLATION, "no hello came")


@pytest.mark.parametrize("frame", ["{", encode(Hello(gateway="g")).decode()], ids=["rubbish", "second hello"])
async def test_a_bad_later_message_ends_the_connection_and_the_gateway(rig: Rig, frame: str) -> None:
    """The scheduler hears that it is lost."""
    gateway = await rig.connect(Hello(gateway="g"))
    await gateway.send_str(frame)
    code, reason = await closed(gateway)
    assert code in (linking.UNREADABLE, linking.POLICY_VIOLATION) and reason
    await until(lambda: rig.lost() == 1)


async def test_frames_may_be_binary(rig: Rig) -> None:
    """JSON is JSON."""
    gateway = await rig.connect()
    await gateway.send_bytes(encode(Hello(gateway="g")))
    await until(lambda: len(rig.said()) == 1)


async def test_a_gateway_that_comes_back_replaces_its_lingering_connection(rig: Rig) -> None:
    """The old one is closed, what it still says is dropped, and its end kills nothing."""
    old = await rig.connect(Hello(gateway="g"))
    await until(lambda: rig.links.connected == 1)
    new = await rig.connect(Hello(gateway="g"))
    assert (await closed(old))[0] == linking.REPLACED
    rig.links.say("g", Heartbeat(n=7))
    assert decode_from_orchestrator(await new.receive_str()) == Heartbeat(n=7)
    await new.send_str(encode(Forget(ticket=3)).decode())
    await until(lambda: Forget(ticket=3) in rig.said())
    assert rig.lost() == 0 and rig.links.connected == 1


async def test_nothing_meant_for_the_old_connection_is_said_on_the_new_one(rig: Rig) -> None:
    """The new one counts from the moment the scheduler hears its hello, not before."""
    old = await rig.connect(Hello(gateway="g"))
    await until(lambda: rig.links.connected == 1)
    rig.held = []
    new = await rig.connect(Hello(gateway="g"))
    await until(lambda: bool(rig.held))
    await old.send_str(encode(Forget(ticket=1)).decode())
    await until(lambda: rig.held is not None and len(rig.held) == 2)
    rig.links.say("g", Heartbeat(n=1))
    assert decode_from_orchestrator(await old.receive_str()) == Heartbeat(n=1)
    rig.release()
    rig.links.say("g", Heartbeat(n=2))
    assert decode_from_orchestrator(await new.receive_str()) == Heartbeat(n=2)
    assert Forget(ticket=1) not in rig.said()


async def test_a_connection_that_ends_before_its_hello_is_handled_counts_for_nothing(rig: Rig) -> None:
    """Neither its hello nor its end."""
    rig.held = []
    gateway = await rig.connect(Hello(gateway="g"))
    await until(lambda: bool(rig.held))
    await gateway.close()
    await until(lambda: rig.held is not None and len(rig.held) == 2)
    rig.release()
    assert rig.handled == [] and rig.links.connected == 0


async def test_a_silent_gateway_is_disconnected_without_being_lost_again(rig: Rig) -> None:
    """The scheduler has forgotten it already."""
    gateway = await rig.connect(Hello(gateway="g"))
    await until(lambda: rig.links.connected == 1)
    rig.links.disconnect("g", "silent for 10 s")
    rig.links.disconnect("unknown", "never seen")
    assert await closed(gateway) == (linking.SILENT, "silent for 10 s")
    assert rig.lost() == 0 and rig.links.connected == 0


async def test_a_gateway_that_does_not_read_is_closed(rig: Rig) -> None:
    """After a term in which nothing could be sent."""
    rig.term = 0.05
    port = int(rig.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(
            b"GET /gateway HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            b"Authorization: Bearer " + TOKEN.encode() + b"\r\n\r\n"
        )
        answer = await asyncio.to_thread(deaf.recv, 4096)
        assert b" 101 " in answer
        hello = encode(Hello(gateway="deaf"))
        deaf.sendall(bytes([0x81, 0x80 | len(hello)]) + b"\0\0\0\0" + hello)
        await until(lambda: rig.links.connected == 1)
        for number in range(5000):
            rig.links.say("deaf", Refuse(ticket=number, status=503, code="x", message="m" * 2000))
        await until(lambda: rig.lost() == 1)
        assert rig.links.connected == 0


async def test_a_queue_that_grows_too_long_ends_the_connection(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is bounded."""
    monkeypatch.setattr(linking, "QUEUED", 10)
    gateway = await rig.connect(Hello(gateway="g"))
    await until(lambda: rig.links.connected == 1)
    for number in range(20):
        rig.links.say("g", Heartbeat(n=number))
    code, reason = await closed(gateway)
    assert code == linking.TRY_AGAIN and "were not read" in reason
    await until(lambda: rig.lost() == 1)


async def test_at_the_end_gateways_are_sent_away_but_not_forgotten(rig: Rig) -> None:
    """The journal keeps them for the next orchestrator; no new one is let in."""
    gateway = await rig.connect(Hello(gateway="g"))
    await until(lambda: rig.links.connected == 1)
    rig.links.close()
    assert (await closed(gateway))[0] == 1001
    assert rig.lost() == 0 and rig.changes == [("g", True)]
    with pytest.raises(aiohttp.WSServerHandshakeError):
        await rig.connect(Hello(gateway="g"))
