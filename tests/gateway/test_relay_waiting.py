"""Requests that wait: order, limits, refusals, progress, errors in event streams."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from modelswap.protocol.messages import Admitted, Forget, Limits, Progress, Refuse, Want
from modelswap.spec.config import Scheduling
from modelswap.testing.waiting import until
from tests.gateway.rig import SSE_HEAD, Request, Rig, Wire, ask, chunk, post, replies, response


async def test_request_waits_for_its_model(rig: Rig) -> None:
    """A request for a model that isn't resident is wanted, waits, and goes out when its lease opens."""
    await rig.start()
    engine = await rig.engine(lease=False)
    wire = await rig.wire()
    await wire.send(post(ask()))
    want = await rig.orchestrator.hears(Want)
    assert (want.model, want.body_bytes) == ("mistral", len(ask()))
    await rig.lease(engine)
    assert (await wire.response()).status == 200
    assert (await rig.orchestrator.hears(Admitted)).ticket == want.ticket


async def test_excess_waits_in_order(rig: Rig) -> None:
    """What exceeds the slots goes out in the order in which it came."""
    await rig.start()
    go = asyncio.Semaphore(0)

    async def script(request: Request) -> None:
        await go.acquire()
        request.connection.write(response(b"{}"))

    engine = await rig.engine(script, slots=1)
    wires = []
    for n in range(4):
        wire = await rig.wire()
        await wire.send(post(ask(n=n)))
        await until(lambda n=n: len(engine.requests) + rig.worker.admission.waiting == n + 1)  # type: ignore[misc]
        wires.append(wire)
    for wire in wires:
        go.release()
        assert (await wire.response()).status == 200
    assert [request.body for request in engine.requests] == [ask(n=n) for n in range(4)]


async def test_client_that_leaves_the_queue_is_forgotten(rig: Rig) -> None:
    """A waiting client that goes takes its ticket along."""
    await rig.start()
    wire = await rig.wire()
    await wire.send(post(ask()))
    want = await rig.orchestrator.hears(Want)
    await wire.close()
    assert (await rig.orchestrator.hears(Forget)).ticket == want.ticket
    await until(lambda: not rig.worker.waiting and not rig.worker.admission.waiting)


async def test_full_queue_refuses_at_once(rig: Rig) -> None:
    """503 with Retry-After, for both limits."""
    rig.orchestrator.limits = Limits(queue_timeout_ms=60_000, queue_requests=1, queue_bytes=1000)
    await rig.start()
    big = await rig.call(post(ask(text="x" * 1000)))
    assert (big.status, big.code) == (503, "queue_full")
    await (await rig.wire()).send(post(ask()))
    await rig.orchestrator.hears(Want)
    got = await rig.call(post(ask()))
    assert (got.status, got.code) == (503, "queue_full")
    assert int(got.header("retry-after") or 0) > 0
    assert int(got.header("retry-after-ms") or 0) > 0


async def test_refusal_reaches_its_client(rig: Rig) -> None:
    """What the orchestrator refuses is answered in its words, with its hints."""
    await rig.start()
    wire = await rig.wire()
    await wire.send(post(ask()))
    want = await rig.orchestrator.hears(Want)
    await rig.orchestrator.say(
        Refuse(
            ticket=want.ticket,
            status=503,
            code="model_broken",
            message="it says: out of memory",
            retry_after_ms=2500,
            should_retry=False,
        )
    )
    got = await wire.response()
    assert (got.status, got.code, got.json()["error"]["message"]) == (503, "model_broken", "it says: out of memory")
    assert got.header("retry-after") == "3"
    assert got.header("retry-after-ms") == "2500"
    assert got.header("x-should-retry") == "false"
    await wire.send(b"GET /health HTTP/1.1\r\n\r\n")
    assert (await wire.response()).status == 200


async def test_waiting_has_an_end(rig: Rig) -> None:
    """A request that got no turn in time is answered 504."""
    rig.orchestrator.limits = Limits(queue_timeout_ms=100, queue_requests=10, queue_bytes=1000)
    rig.orchestrator.term_ms = 300
    await rig.start()
    got = await rig.call(post(ask()))
    assert (got.status, got.code) == (504, "queue_timeout")


async def test_requests_before_the_first_catalog_are_routed_by_it(rig: Rig) -> None:
    """Requests that came before the orchestrator wait for it, and are then known or not."""
    rig.orchestrator.answers_hello = False
    await rig.orchestrator.start()
    await rig.start_worker()
    known, unknown = await rig.wire(), await rig.wire()
    await known.send(post(ask("mistral-7b")))
    await unknown.send(post(ask("nobody")))
    await until(lambda: len(rig.worker.waiting) == 2)
    await until(lambda: rig.orchestrator.connections)
    engine = await rig.engine(lease=False)
    await rig.orchestrator.say(rig.orchestrator.catalog())
    assert (await unknown.response()).status == 404
    assert (await rig.orchestrator.hears(Want)).model == "mistral"
    await rig.lease(engine)
    assert (await known.response()).status == 200


async def test_orchestrator_that_never_comes(rig: Rig) -> None:
    """Without an orchestrator requests wait a while, as many as the queue takes, and are told so."""
    limits = Scheduling(queue_timeout=0.3, queue_requests=1)
    await rig.start(orchestrator=False, scheduling=limits, header_timeout=0.2)
    wire = await rig.wire()
    await wire.send(post(ask()))
    await until(lambda: rig.worker.waiting)
    assert (await rig.call(post(ask()))).code == "queue_full"
    got = await wire.response()
    assert (got.status, got.code) == (503, "orchestrator_away")
    assert (await rig.get("/health")).status == 503
    assert [model["id"] for model in (await rig.get("/v1/models")).json()["data"]] == ["mistral", "coder"]


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────


async def waiting_stream(rig: Rig, *, version: str = "1.1", **gateway: Any) -> tuple[Wire, Want]:
    """Start everything, and have one streamed request wait until it has been told something."""
    await rig.start(progress_after=0.02, **gateway)
    wire = await rig.wire()
    await wire.send(post(ask(stream=True), more="Accept-Encoding: gzip\r\n", version=version))
    want = await rig.orchestrator.hears(Want)
    status, headers = await wire.head()
    assert status == 200
    assert dict(headers)["content-type"].startswith("text/event-stream")
    assert "x-request-id" in dict(headers)
    assert dict(headers).get("transfer-encoding") == ("chunked" if version == "1.1" else None)
    return wire, want


def events(body: bytes) -> list[Any]:
    """Return the content of a stream's events."""
    assert body.endswith(b"\n\n")
    out = []
    for event in body[:-2].split(b"\n\n"):
        if not event.startswith(b":"):
            lines = [line.removeprefix(b"data: ") for line in event.split(b"\n")]
            out.append(msgspec.json.decode(b"\n".join(lines)))
    return out


async def rest(wire: Wire) -> bytes:
    """Return what all chunks to the end carry."""
    out = b""
    while piece := await wire.chunk():
        out += piece
    return out


async def test_waiting_stream_hears_how_it_gets_on(rig: Rig) -> None:
    """Comments tell position, stage, fraction and ETA, again at every change."""
    wire, _ = await waiting_stream(rig)
    assert await wire.chunk() == b": modelswap position=1\n\n"
    await rig.orchestrator.say(Progress(model="mistral", stage="loading", ahead=2, fraction=0.5, eta_ms=11_001))
    assert await wire.chunk() == b": modelswap position=3 stage=loading progress=50% eta=12s\n\n"
    await rig.orchestrator.say(Progress(model="mistral", stage="warming\nup"))
    assert await wire.chunk() == b": modelswap position=1 stage=warming up\n\n"


async def test_waiting_stream_hears_from_us_regularly(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without news the last word is said again, so that no proxy on the way gives up."""
    monkeypatch.setattr("modelswap.gateway.exchange.TELL_SECONDS", 0.01)
    wire, _ = await waiting_stream(rig, header_timeout=0.2)
    for _ in range(3):
        assert await wire.chunk() == b": modelswap position=1\n\n"


@pytest.mark.parametrize("body", [ask(), ask(stream=False), ask(stream="true")])
async def test_only_streams_hear(rig: Rig, body: bytes) -> None:
    """A request that doesn't stream waits in silence and gets a plain answer."""
    await rig.start(progress_after=0.01)
    wire = await rig.wire()
    await wire.send(post(body))
    want = await rig.orchestrator.hears(Want)
    await asyncio.sleep(0.1)
    await rig.orchestrator.say(Refuse(ticket=want.ticket, status=503, code="x", message="no"))
    assert (await wire.response()).status == 503


async def test_no_progress_if_so_configured(rig: Rig) -> None:
    """progress_after: 0 means never."""
    await rig.start(progress_after=0)
    wire = await rig.wire()
    await wire.send(post(ask(stream=True)))
    want = await rig.orchestrator.hears(Want)
    await asyncio.sleep(0.1)
    await rig.orchestrator.say(Refuse(ticket=want.ticket, status=503, code="x", message="no"))
    assert (await wire.response()).status == 503


async def test_quick_stream_is_untouched(rig: Rig) -> None:
    """A stream whose turn comes before progress begins has its engine's own framing and headers."""
    await rig.start(progress_after=30)
    engine = await rig.engine(replies(b"data: 1\n\n", kind="text/event-stream"), lease=False)
    wire = await rig.wire()
    await wire.send(post(ask(stream=True), more="Accept-Encoding: gzip\r\n"))
    await rig.orchestrator.hears(Want)
    await rig.lease(engine)
    got = await wire.response()
    assert got.header("content-length") == "9"
    assert engine.requests[0].header("accept-encoding") == "gzip"


async def _as_chunks(request: Request) -> None:
    request.connection.write(SSE_HEAD + chunk(b"data: 1\n\nda") + chunk(b"ta: 2\n\n"))
    await asyncio.sleep(0)
    request.connection.write(chunk(b"data: 3\n\n") + b"0\r\n\r\n")


async def _as_length(request: Request) -> None:
    request.connection.write(response(b"data: 1\n\ndata: 2\n\ndata: 3\n\n", kind="text/event-stream"))


async def _until_close(request: Request) -> None:
    request.connection.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: 1\n\ndata: 2\n\n")
    await asyncio.sleep(0)
    request.connection.write(b"data: 3\n\n")
    request.connection.transport.close()


@pytest.mark.parametrize("script", [_as_chunks, _as_length, _until_close])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_events_follow_progress(rig: Rig, script: Callable[[Request], Awaitable[None]], version: str) -> None:
    """After progress, the engine's events come in our own chunks, however the engine frames them."""
    wire, _ = await waiting_stream(rig, version=version)
    engine = await rig.engine(script)
    body = await (rest(wire) if version == "1.1" else wire.rest())
    assert events(body) == [1, 2, 3]
    assert engine.requests[0].header("accept-encoding") is None
    await until(lambda: rig.in_flight() == 0)
    if version == "1.1":
        await wire.send(post(ask()))
        assert (await wire.head())[0] == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":{"message":"too long","type":"BadRequest","code":"context"}}', "too long"),
        (b'{"object":"error","message":"too long","code":400}', "too long"),
        (b"<html>\n</html>", "<html>\n</html>"),
        (b"", "The engine answered 429"),
        (b'"text"', '"text"'),
    ],
)
async def test_engine_refusal_after_progress(rig: Rig, body: bytes, message: str) -> None:
    """An engine's 4xx becomes an event with its own words, its status and its retry hint."""
    wire, _ = await waiting_stream(rig)
    await rig.engine(replies(body, status="429 Too Many Requests", more="Retry-After: 3\r\n"))
    (event,) = events(await wire.cut())
    assert event["error"]["message"] == message
    assert event["error"]["status"] == 429
    assert event["error"]["retry_after_ms"] == 3000


async def test_other_answers_after_progress(rig: Rig) -> None:
    """A 200 that is no event stream becomes one event."""
    wire, _ = await waiting_stream(rig)
    await rig.engine(replies(b'{"a":\n1}'))
    assert events(await rest(wire)) == [{"a": 1}]


async def test_compressed_answer_after_progress(rig: Rig) -> None:
    """An engine that compresses unasked can't be re-framed, and the client hears so."""
    wire, _ = await waiting_stream(rig)
    await rig.engine(replies(b"\x1f\x8b", kind="text/event-stream", more="content-encoding: gzip\r\n"))
    assert events(await wire.cut())[0]["error"]["code"] == "internal_error"


async def test_endless_answer_after_progress(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that can't be made one event is given up."""
    monkeypatch.setattr("modelswap.gateway.exchange.MAX_ENGINE_ERROR", 1000)
    wire, _ = await waiting_stream(rig)
    engine = await rig.engine(replies(b"x" * 2000))
    assert events(await wire.cut())[0]["error"]["code"] == "internal_error"
    await asyncio.wait_for(engine.connections[0].closed.wait(), 30)
    assert rig.in_flight() == 0


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_refusal_after_progress(rig: Rig, version: str) -> None:
    """A refusal becomes an event with the code and hints that its headers would have had."""
    wire, want = await waiting_stream(rig, version=version)
    await rig.orchestrator.say(
        Refuse(
            ticket=want.ticket,
            status=503,
            code="model_start_failed",
            message="out of memory",
            retry_after_ms=2500,
            should_retry=True,
        )
    )
    body = await (wire.cut() if version == "1.1" else wire.rest())
    assert events(body) == [
        {
            "error": {
                "message": "out of memory",
                "type": "server_error",
                "param": None,
                "code": "model_start_failed",
                "status": 503,
                "retry_after_ms": 2500,
                "should_retry": True,
            }
        }
    ]


async def test_stream_dying_after_progress(rig: Rig) -> None:
    """An engine that dies in its stream is told of in ours."""
    wire, _ = await waiting_stream(rig)

    async def script(request: Request) -> None:
        request.connection.write(SSE_HEAD + chunk(b"data: 1\n\n") + b"50\r\n")
        request.connection.transport.close()

    await rig.engine(script)
    one, error = events(await wire.cut())
    assert one == 1
    assert error["error"]["code"] == "engine_died"


async def test_engine_dying_silently_after_progress(rig: Rig) -> None:
    """A stream whose engine dies before its response waits again and hears on; the second death is its end."""
    wire, _ = await waiting_stream(rig)

    async def script(request: Request) -> None:
        request.connection.transport.abort()

    await rig.engine(script)
    await rig.orchestrator.hears(Want, 2)
    await rig.engine(script, n=2)
    assert events(await wire.cut())[0]["error"]["code"] == "engine_died"
