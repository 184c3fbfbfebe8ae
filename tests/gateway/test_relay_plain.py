"""Requests and answers that go straight through."""

from __future__ import annotations

import asyncio
import json

import pytest

from modelswap.gateway import metrics
from modelswap.protocol.messages import Fault
from modelswap.testing.waiting import until
from tests.gateway.rig import Request, Rig, ask, chunk, post, replies, response

IMAGE = b'{"type":"image_url","image_url":{"url":"data:image/png;base64,' + b"iVBORw0KGgo" * 40_000 + b'"}}'
TOOLS = b'{ "model" : "mistral", "tools":[{"type":"function","function":{"name":"f\\u00e9","parameters":{}}}],"n":1.0 }'


@pytest.mark.parametrize(
    "body", [ask(), TOOLS, b'{"messages":[' + IMAGE + b'],"model":"mistral"}', b'{"model":"x","model":"mistral"}']
)
@pytest.mark.parametrize("path", ["/chat/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/whatever/new"])
async def test_request_and_answer_pass_unchanged(rig: Rig, body: bytes, path: str) -> None:
    """The engine gets the body as it was sent, at the right path, and the client its answer as it was given."""
    await rig.start()
    answer = b'{ "odd" :  "spacing\\u00e9" }\n'
    engine = await rig.engine(replies(answer, more="x-engine: yes\r\n"))
    got = await rig.call(post(body, path=path, more="X-Custom: kept\r\nAuthorization: Bearer secret\r\n"))
    request = engine.requests[0]
    target = "/v1/chat/completions" if path == "/chat/completions" else path
    assert request.line == f"POST {target} HTTP/1.1"
    assert request.body == body
    assert request.header("content-length") == str(len(body))
    assert request.header("host") == f"127.0.0.1:{engine.port}"
    assert request.header("x-custom") == "kept"
    assert request.header("authorization") is None
    assert (got.status, got.body, got.header("x-engine")) == (200, answer, "yes")
    assert request.header("x-request-id") == got.header("x-request-id")


async def test_model_is_replaced_where_the_engine_knows_another_name(rig: Rig) -> None:
    """An engine that serves under another name gets that name; adapters are passed on as they are."""
    await rig.start()
    engine = await rig.engine(model="coder")
    await rig.call(post(b'{"a":{"model":"coder"}, "model" : "coder"}'))
    await rig.call(post(ask("coder-lora")))
    assert engine.requests[0].body == b'{"a":{"model":"coder"}, "model" : "served-coder"}'
    assert engine.requests[0].header("content-length") == str(len(engine.requests[0].body))
    assert engine.requests[1].body == ask("coder-lora")


@pytest.mark.parametrize("name", ["mistral-7b", "mistral-lora"])
async def test_aliases_and_adapters_route_to_their_model(rig: Rig, name: str) -> None:
    """Any of a model's names gets there, unchanged where the engine knows it."""
    await rig.start()
    engine = await rig.engine()
    assert (await rig.call(post(ask(name)))).status == 200
    assert engine.requests[0].body == ask(name)


async def test_engine_key_is_sent(rig: Rig) -> None:
    """The lease's key goes to the engine, and the client's own never does."""
    await rig.start()
    engine = await rig.engine(api_key="engine-key")
    await rig.call(post(ask(), more="Authorization: Bearer client\r\nX-Api-Key: client\r\nCookie: client\r\n"))
    assert engine.requests[0].header("authorization") == "Bearer engine-key"
    assert "client" not in str(engine.requests[0].headers)


async def test_request_id_goes_in_and_out(rig: Rig) -> None:
    """A client's request id is kept on every answer, errors included; without one it is made, each time another."""
    await rig.start()
    engine = await rig.engine()
    mine = "X-Request-ID: mine-1\r\n"
    assert (await rig.call(post(ask(), more=mine))).header("x-request-id") == "mine-1"
    assert engine.requests[0].header("x-request-id") == "mine-1"
    assert (await rig.call(post(b"{", more=mine))).header("x-request-id") == "mine-1"
    made = {(await rig.call(post(body))).header("x-request-id") for body in (ask(), ask(), b"{", ask("none"))}
    made.add((await rig.get("/health")).header("x-request-id"))
    assert len(made) == 5
    assert None not in made


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b"{}", 400, "missing_model"),
        (b'{"model":null}', 400, "missing_model"),
        (b'{"model":7}', 400, "missing_model"),
        (b'{"model":""}', 400, "missing_model"),
        (b'{"model":"mistral","model":[]}', 400, "missing_model"),
        (b'{"model":"unknown"}', 404, "model_not_found"),
    ],
)
async def test_bad_bodies_are_told_apart(rig: Rig, body: bytes, status: int, code: str) -> None:
    """Errors have OpenAI's shape, and the connection goes on."""
    await rig.start()
    await rig.engine()
    wire = await rig.wire()
    await wire.send(post(body))
    got = await wire.response()
    assert (got.status, got.code) == (status, code)
    assert got.json()["error"]["type"] == "invalid_request_error"
    await wire.send(post(ask()))
    assert (await wire.response()).status == 200


async def test_unknown_model_names_those_there_are(rig: Rig) -> None:
    """The 404 helps."""
    await rig.start()
    assert "coder, mistral" in (await rig.call(post(ask("x")))).json()["error"]["message"]


async def test_compressed_body_is_refused_as_such(rig: Rig) -> None:
    """A body that can't be read because it is compressed gets 415."""
    await rig.start()
    got = await rig.call(post(b"\x1f\x8b123", more="Content-Encoding: gzip\r\n"))
    assert (got.status, got.code) == (415, "unsupported_media_type")


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "429 Too Many Requests", "500 Oops"])
async def test_engine_errors_pass_unchanged(rig: Rig, status: str) -> None:
    """What the engine itself refuses is none of our business."""
    await rig.start()
    body = b'{"object":"error","message":"no"}'
    engine = await rig.engine(replies(body, status=status, more="Retry-After: 7\r\n"))
    got = await rig.call(post(ask()))
    assert (got.status, got.body, got.header("retry-after")) == (int(status[:3]), body, "7")
    assert len(engine.requests) == 1
    assert not rig.orchestrator.heard(Fault)


async def test_connections_are_kept_on_both_sides(rig: Rig) -> None:
    """Requests in a row use one connection of the client's and one to the engine."""
    await rig.start()
    engine = await rig.engine()
    wire = await rig.wire()
    for n in range(5):
        await wire.send(post(ask(text="x" * n)))
        assert (await wire.response()).status == 200
    assert len(engine.connections) == 1
    assert [request.body for request in engine.requests] == [ask(text="x" * n) for n in range(5)]


async def test_requests_at_once_have_connections_of_their_own(rig: Rig) -> None:
    """Sixteen clients at once get their own answers, within the lease's slots."""
    await rig.start()
    running = peak = 0

    async def script(request: Request) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0)
        running -= 1
        request.connection.write(response(request.body))

    engine = await rig.engine(script, slots=4)

    async def client(n: int) -> None:
        wire = await rig.wire()
        for i in range(10):
            body = ask(n=n, i=i)
            await wire.send(post(body))
            assert (await wire.response()).body == body

    await asyncio.gather(*(client(n) for n in range(16)))
    assert peak <= 4
    assert len(engine.connections) <= 4
    await until(lambda: rig.in_flight() == 0)


@pytest.mark.parametrize("said", ["Connection: close\r\n", "Keep-Alive: timeout=1\r\n"])
async def test_engine_decides_how_long_its_connections_are_used(rig: Rig, said: str) -> None:
    """A connection that the engine is about to close is not used again."""
    await rig.start()
    engine = await rig.engine(replies(b"{}", more=said))
    await rig.call(post(ask()))
    await rig.call(post(ask()))
    assert len(engine.connections) == 2
    await engine.connections[0].closed.wait()


async def test_idle_upstream_connection_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the engine would close an idle connection, the gateway does."""
    monkeypatch.setattr("modelswap.gateway.headers.IDLE_SECONDS", 0.05)
    await rig.start(header_timeout=0.2)
    engine = await rig.engine()
    await rig.call(post(ask()))
    await asyncio.wait_for(engine.connections[0].closed.wait(), 30)


async def test_stale_connection_costs_nothing(rig: Rig) -> None:
    """A reused connection that turns out to be closed is replaced, without a fault."""
    await rig.start()

    async def script(request: Request) -> None:
        if len(engine.requests) == 2:
            request.connection.transport.abort()
        else:
            request.connection.write(response(b"{}"))

    engine = await rig.engine(script)
    wire = await rig.wire()
    for _ in range(3):
        await wire.send(post(ask()))
        assert (await wire.response()).status == 200
    assert len(engine.connections) == 2
    assert len(engine.requests) == 4
    assert not rig.orchestrator.heard(Fault)
    assert rig.worker.metrics.read()[metrics.RETRIES][("model", "mistral"),] == [1]


async def test_unasked_bytes_end_an_idle_connection(rig: Rig) -> None:
    """An engine that says something on an idle connection (a late 408) isn't believed to answer the next request."""
    await rig.start()
    engine = await rig.engine(replies(b'{"n":1}'))
    await rig.call(post(ask()))
    engine.connections[0].write(response(b"late", status="408 Request Timeout"))
    await asyncio.wait_for(engine.connections[0].closed.wait(), 30)
    assert (await rig.call(post(ask()))).json() == {"n": 1}


async def test_surplus_bytes_do_not_reach_the_client(rig: Rig) -> None:
    """Bytes after an answer's end are dropped, and so is their connection."""
    await rig.start()
    engine = await rig.engine(lambda request: _surplus(request))
    wire = await rig.wire()
    for _ in range(2):
        await wire.send(post(ask()))
        assert (await wire.response()).body == b"{}"
    assert len(engine.connections) == 2


async def test_large_answers_come_whole(rig: Rig) -> None:
    """Megabytes pass, with backpressure on the way."""
    await rig.start()
    answer = bytes(range(256)) * 40_000
    await rig.engine(replies(answer))
    assert (await rig.call(post(ask()))).body == answer


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_answers_without_a_body(rig: Rig, status: str) -> None:
    """Statuses that have no body leave the connection usable."""
    await rig.start()

    async def script(request: Request) -> None:
        request.connection.write(f"HTTP/1.1 {status}\r\nx-a: b\r\n\r\n".encode())

    await rig.engine(script)
    wire = await rig.wire()
    for _ in range(2):
        await wire.send(post(ask()))
        assert (await wire.response(has_body=False)).status == int(status[:3])


async def test_informational_answers_are_swallowed(rig: Rig) -> None:
    """A 100 or 103 of the engine isn't taken for the answer."""
    await rig.start()

    async def script(request: Request) -> None:
        request.connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.connection.write(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + response(b'"final"'))

    await rig.engine(script)
    assert (await rig.call(post(ask()))).body == b'"final"'


async def test_requests_are_counted(rig: Rig) -> None:
    """Counts carry model, path and status, with unknown models and paths lumped together."""
    await rig.start()
    await rig.engine()
    await rig.call(post(ask()))
    await rig.call(post(ask("mistral-7b"), path="/v1/new"))
    await rig.call(post(ask("nonsense")))
    await rig.get("/v1/nonsense")
    text = (await rig.get("/metrics")).body.decode()
    name = "modelswap_gateway_requests_total"
    assert f'{name}{{model="mistral",path="/v1/chat/completions",status="200"}} 1\n' in text
    assert f'{name}{{model="mistral",path="other",status="200"}} 1\n' in text
    assert f'{name}{{model="",path="/v1/chat/completions",status="404"}} 1\n' in text
    assert f'{name}{{model="",path="other",status="404"}} 1\n' in text
    assert f'{name}{{model="coder",path="/v1/chat/completions",status="200"}} 0\n' in text
    assert 'modelswap_gateway_time_to_first_byte_seconds_count{model="mistral",path="other"} 1\n' in text
    assert "nonsense" not in text


async def test_json_answers_are_what_json_says(rig: Rig) -> None:
    """An engine's chunked JSON reaches a 1.1 client in the engine's own chunks."""
    await rig.start()
    whole = json.dumps({"text": "x" * 100}).encode()

    async def script(request: Request) -> None:
        request.connection.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        request.connection.write(chunk(whole[:10]) + chunk(whole[10:]) + b"0\r\n\r\n")

    await rig.engine(script)
    got = await rig.call(post(ask()))
    assert got.body == whole
    assert got.raw == chunk(whole[:10]) + chunk(whole[10:]) + b"0\r\n\r\n"


async def _surplus(request: Request) -> None:
    request.connection.write(response(b"{}") + b"HTTP/1.1 200 OK\r\n\r\n")
