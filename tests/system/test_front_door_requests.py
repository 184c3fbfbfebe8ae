"""What clients send, and what of it engines get, through a real ``modelswap up``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelswap.testing.engine.options import Options
from tests.system.front_door import chat, echo, engine_of, post, running, send, simulated, stack_of, stats, wire
from tests.system.stack import Stack

KEY = "engine-key-1"
IMAGE = "data:image/png;base64," + "iVBORw0KGgo" * 2000
VISION = (
    b'{ "model" : "mistral",\t"messages":[{"role":"user","content":[{"type":"text","text":"caf\\u00e9 \xc3\xa9"},'
    b'{"type":"image_url","image_url":{"url":"' + IMAGE.encode() + b'"}}]}], "n" : 1.0, "temperature":1e-1 }\r\n'
)
TOOLS = (
    b'{"tools":[{"type":"function","function":{"name":"f","parameters":{"properties":{"model":{"type":"string"}}'
    b'}}}],"tool_choice":"auto","model":"mistral","messages":[],"big":123456789012345678901234567890,"x":"\\ud83d"}'
)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Run one stack for all tests of this file; each leaves it as it was."""
    folder: Path = tmp_path_factory.mktemp("front-door")
    engine = Options(load_seconds=0.05, tokens=4, aliases=("keyed-lora",), api_key=KEY)
    made = stack_of(
        folder,
        {"keyed": simulated(folder, "keyed", engine, api_key=KEY, adapters=["keyed-lora"])},
        gateway={"max_body": 200_000, "max_headers": 4096, "header_timeout": 0.5},
    )
    yield from running(made)


@pytest.mark.parametrize(
    "body",
    [
        VISION,
        TOOLS,
        b'{"model":"coder","model":"no-such","model":"mistral","messages":[]}',
        b'{"m\\u006fdel":"mistral","messages":[]}',
    ],
    ids=["vision", "tools", "duplicates", "escaped-key"],
)
@pytest.mark.parametrize("chunked", [0, 777], ids=["length", "chunked"])
async def test_bodies_pass_byte_identical(stack: Stack, body: bytes, chunked: int) -> None:
    """Vision payloads, tools and odd JSON reach the engine byte for byte; the last of several models counts."""
    told = await echo(stack, body, chunked=chunked)
    assert told["model"] == "mistral"
    assert told["body"] == body
    assert told["names"]["content-length"] == str(len(body))
    assert "transfer-encoding" not in told["names"]


async def test_alias_is_rewritten_in_place(stack: Stack) -> None:
    """An alias that the engine doesn't know is replaced where it stands, and nothing else is."""
    before = b'{"a":{"model":"mistral-alias"}, "model" :  "coder","model" : "mistral-alias" , "t":[ 1.0,{"model":"x"}]}'
    told = await echo(stack, before)
    assert told["model"] == "mistral"
    assert told["body"] == (
        b'{"a":{"model":"mistral-alias"}, "model" :  "coder","model" : "mistral" , "t":[ 1.0,{"model":"x"}]}'
    )


async def test_adapter_is_not_rewritten(stack: Stack) -> None:
    """An adapter's name routes to its model and is passed on."""
    body = b'{"model":"keyed-lora","messages":[]}'
    told = await echo(stack, body)
    assert (told["model"], told["body"]) == ("keyed", body)


async def test_credentials_and_hop_by_hop_headers_stay_here(stack: Stack) -> None:
    """The engine gets its own key and the client's end-to-end headers, and no credentials or hop-by-hop headers."""
    more = (
        "Authorization: Bearer client-secret\r\nX-API-Key: client-secret\r\nApi-Key: client-secret\r\n"
        "Cookie: a=client-secret\r\nProxy-Authorization: Basic client-secret\r\nConnection: keep-alive, X-Mine\r\n"
        "X-Mine: hop\r\nKeep-Alive: timeout=5\r\nTE: trailers\r\nUpgrade: h2c\r\nProxy-Connection: keep-alive\r\n"
        "X-Custom: stays\r\nAccept-Encoding: gzip\r\nOpenAI-Organization: org\r\nUser-Agent: mine/1\r\n"
    )
    for model, key in (("keyed", f"Bearer {KEY}"), ("mistral", None)):
        told = await echo(stack, b'{"model":"%b"}' % model.encode(), more=more)
        names = told["names"]
        assert names.get("authorization") == key
        assert "client-secret" not in json.dumps(told["headers"])
        gone = ("x-mine", "connection", "keep-alive", "te", "upgrade", "proxy-connection", "cookie", "expect")
        assert [name for name in gone if name in names] == []
        assert names["x-custom"] == "stays"
        assert names["accept-encoding"] == "gzip"
        assert names["openai-organization"] == "org"
        assert names["user-agent"] == "mine/1"
        assert names["content-type"] == "application/json"
        assert names["host"] != "gateway.test"


@pytest.mark.parametrize(
    ("request_", "method"),
    [
        (post(chat("mistral"), more="X-Request-ID: mine-7\r\n"), "POST"),
        (post(chat("mistral", stream=True), more="X-Request-ID: mine-7\r\n"), "POST"),
        (post(chat("nobody"), more="X-Request-ID: mine-7\r\n"), "POST"),
        (post(b"{", more="X-Request-ID: mine-7\r\n"), "POST"),
        (post(b" " * 200_001, more="X-Request-ID: mine-7\r\n"), "POST"),
        (b"GET /v1/models HTTP/1.1\r\nHost: g\r\nX-Request-ID: mine-7\r\n\r\n", "GET"),
        (b"GET /nothing HTTP/1.1\r\nHost: g\r\nX-Request-ID: mine-7\r\n\r\n", "GET"),
        (b"GET /metrics HTTP/1.1\r\nHost: g\r\nX-Request-ID: mine-7\r\n\r\n", "GET"),
        (b"DELETE /health HTTP/1.1\r\nHost: g\r\nX-Request-ID: mine-7\r\n\r\n", "DELETE"),
    ],
    ids=["answer", "stream", "404-model", "400", "413", "models", "404-path", "metrics", "405"],
)
async def test_request_id_comes_back_on_every_answer(stack: Stack, request_: bytes, method: str) -> None:
    """A client's request id is on its answer, once; without one, an id is made."""
    assert (await send(stack, request_, method=method)).header("x-request-id") == "mine-7"
    made = await send(stack, request_.replace(b"X-Request-ID: mine-7\r\n", b""), method=method)
    assert made.header("x-request-id")


async def test_request_id_goes_to_the_engine(stack: Stack) -> None:
    """Engines see the id that clients see, given or made."""
    told = await echo(stack, b'{"model":"mistral"}', more="X-Request-ID: mine-8\r\n")
    assert told["names"]["x-request-id"] == "mine-8"
    answer = await send(stack, post(b'{"model":"mistral"}', "/v1/echo"))
    assert ["x-request-id", answer.header("x-request-id")] in answer.json()["headers"]


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        (chat("no-such"), 404, "model_not_found", ["no-such", "mistral", "coder", "llava", "keyed"]),
        (b"", 400, "invalid_json", ["JSON"]),
        (b"not json", 400, "invalid_json", ["JSON"]),
        (b'{"model":"mistral"', 400, "invalid_json", ["JSON"]),
        (b'["mistral"]', 400, "invalid_json", ["object"]),
        (b'{"model":"mistral"} x', 400, "invalid_json", ["JSON"]),
        (b"[" * 100_000, 400, "invalid_json", []),
        (b"{}", 400, "missing_model", ["model"]),
        (b'{"model":null}', 400, "missing_model", ["model"]),
        (b'{"model":7}', 400, "missing_model", ["model"]),
        (b'{"model":""}', 400, "missing_model", ["model"]),
        (b'{"a":"' + b"x" * 200_000 + b'"}', 413, "body_too_large", ["max_body", "200000"]),
    ],
)
@pytest.mark.parametrize("chunked", [0, 5000], ids=["length", "chunked"])
async def test_bad_requests_are_told_what_is_wrong(
    stack: Stack, body: bytes, status: int, code: str, words: list[str], chunked: int
) -> None:
    """Each mistake in a request has its status, its code and a message that helps."""
    answer = await send(stack, post(body, chunked=chunked))
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.error["type"] == "invalid_request_error"
    assert [word for word in words if word not in answer.error["message"]] == []


async def test_too_large_headers_get_431(stack: Stack) -> None:
    """A head over the limit is answered 431, whether it comes at once or never ends."""
    huge = "X-Large: " + "x" * 5000 + "\r\n"
    answer = await send(stack, post(chat("mistral"), more=huge))
    assert (answer.status, answer.error["code"], answer.end) == (431, "headers_too_large", "closed")
    answer = await send(stack, b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nX-Large: " + b"x" * 6000)
    assert (answer.status, answer.error["code"], answer.end) == (431, "headers_too_large", "closed")


@pytest.mark.parametrize(
    "sent", [b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\n", b"P", post(chat("mistral"))[:-5]]
)
async def test_slow_requests_get_408(stack: Stack, sent: bytes) -> None:
    """A request that doesn't arrive is answered 408 and its connection closed."""
    answer = await send(stack, sent)
    assert (answer.status, answer.error["code"], answer.end) == (408, "request_timeout", "closed")


async def test_too_large_body_is_refused_before_it_is_sent(stack: Stack) -> None:
    """A body that announces itself as too large gets its 413 at once, also with Expect: 100-continue."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: 200001\r\n"
    for more in (b"\r\n", b"Expect: 100-continue\r\n\r\n"):
        answer = await send(stack, head + more)
        assert (answer.status, answer.error["code"], answer.end) == (413, "body_too_large", "closed")


async def test_expect_continue(stack: Stack) -> None:
    """A client that waits for 100 Continue gets it, then sends, then gets its answer."""
    body = chat("mistral")
    head, _, _ = post(body, more="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    async with wire(stack) as client:
        await client.send(head + b"\r\n\r\n")
        assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(body)
        assert (await client.answer()).status == 200


async def test_pipelined_requests_are_answered_in_order(stack: Stack) -> None:
    """Requests sent before their answers are read, also byte by byte, are answered in their order."""
    bodies = [b'{"model":"mistral","n":%d}' % n for n in range(6)]
    requests = b"".join(
        b"GET /health HTTP/1.1\r\nHost: g\r\n\r\n" if n == 3 else post(body, "/v1/echo", chunked=9 if n % 2 else 0)
        for n, body in enumerate(bodies)
    )
    async with wire(stack) as client:
        for size in (len(requests), 7):
            for at in range(0, len(requests), size):
                await client.send(requests[at : at + size])
            answers = [await client.answer() for _ in bodies]
            assert [a.status for a in answers] == [200] * 6
            assert answers[3].json()["status"] == "ok"
            lengths = [a.json().get("length") for a in answers]
            assert lengths == [None if n == 3 else len(body) for n, body in enumerate(bodies)]


async def test_old_http(stack: Stack) -> None:
    """HTTP/1.0 clients get whole answers and streams, unchunked, ended by the connection's end."""
    answer = await send(stack, post(chat("mistral"), version="1.0"))
    assert (answer.status, answer.whole, answer.end) == (200, True, "closed")
    assert "model=mistral" in answer.json()["choices"][0]["message"]["content"]
    answer = await send(stack, post(chat("mistral", stream=True), version="1.0"))
    assert (answer.status, answer.header("transfer-encoding"), answer.end) == (200, None, "closed")
    assert answer.data[-1] is None
    assert answer.text.startswith("model=mistral")


async def test_connection_close_is_obeyed(stack: Stack) -> None:
    """After ``Connection: close`` the answer says so, and the connection ends."""
    for stream in (False, True):
        answer = await send(stack, post(chat("mistral", stream=stream), more="Connection: close\r\n"))
        assert (answer.status, answer.whole, answer.end) == (200, True, "closed")
        assert answer.header("connection") == "close"


async def test_connections_are_kept(stack: Stack) -> None:
    """Many requests, good and bad, go over one connection of the client and few of the engine's."""
    url = await engine_of(stack, "mistral")
    before = (await stats(url))["connections"]
    async with wire(stack) as client:
        for n in range(30):
            await client.send(post(chat("mistral" if n % 3 else "nobody", stream=n % 2 == 0)))
            answer = await client.answer()
            assert (answer.status, answer.whole) == ((200, True) if n % 3 else (404, True))
    assert (await stats(url))["connections"] - before <= 3  # the counts' own one each time


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /v1/echo HTTP/1.1\r\nHost: g\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/echo HTTP/1.1\r\nHost: g\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST /v1/echo HTTP/1.1\r\nHost: g\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/echo HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/echo HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        b"POST /v1/echo HTTP/1.1\r\nHost: g\r\nContent-Length : 5\r\n\r\nhello",
        b"POST /v1/echo HTTP/1.1\nHost: g\nContent-Length: 5\n\nhello\r\n\r\n",
        b"POST /v1/echo HTTP/1.1\r\nHost: g\r\nX: a\rb\r\nContent-Length: 0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50,
        b"GET / HTTP/3.0\r\nHost: g\r\n\r\n",
        b"CONNECT g:443 HTTP/1.1\r\nHost: g\r\n\r\n",
    ],
)
async def test_doubtful_framing_is_refused(stack: Stack, raw: bytes) -> None:
    """What two servers might read differently, or no server can read, is a 400 and the connection's end."""
    answer = await send(stack, raw)
    assert (answer.status, answer.error["code"], answer.end) == (400, "bad_request", "closed")


async def test_shorthand_path(stack: Stack) -> None:
    """POST /chat/completions is /v1/chat/completions, queries and all."""
    answer = await send(stack, post(chat("mistral"), "/chat/completions?a=b"))
    assert answer.json()["object"] == "chat.completion"
    told = await send(stack, post(b'{"model":"mistral"}', "/v1/echo?x=%20y&x=2"))
    assert told.json()["target"] == "/v1/echo?x=%20y&x=2"


async def test_every_inference_path_is_relayed(stack: Stack) -> None:
    """Any POST under /v1/ goes to the engine, whose own 404 comes back; what changes engines does not."""
    answer = await send(stack, post(chat("mistral"), "/v1/some/new-thing"))
    assert (answer.status, answer.json()) == (404, {"detail": "Not Found"})
    assert (await send(stack, post(b'{"model":"mistral","input":"a"}', "/v1/embeddings"))).json()["model"] == "mistral"
    for path in ("/v1/load_lora_adapter", "/v1/../sleep", "/v1/%2e%2e/sleep", "/v1//x", "/sleep", "/v1/", "/v1"):
        answer = await send(stack, post(chat("mistral"), path))
        assert (answer.status, answer.error["code"]) == (404, "not_found"), path


async def test_engine_errors_pass_as_they_are(stack: Stack) -> None:
    """An engine's own error comes back with its status and body."""
    for status in (400, 422, 429, 500, 503):
        answer = await send(stack, post(chat("mistral", stream=True, sim={"status": status, "message": "no way"})))
        assert (answer.status, answer.json()["error"]["message"]) == (status, "no way")


async def test_paths_and_methods(stack: Stack) -> None:
    """Other methods and paths are told so: 404, 405 with Allow; HEAD has no body."""

    async def ask(method: str, path: str, more: str = "") -> tuple[int, str | None]:
        raw = f"{method} {path} HTTP/1.1\r\nHost: g\r\n{more}\r\n".encode()
        answer = await send(stack, raw, method=method)
        if method == "HEAD":
            assert answer.body == b""
        elif answer.status >= 400:
            assert answer.error["message"]
        return answer.status, answer.header("allow")

    assert await ask("GET", "/v1/chat/completions") == (405, "POST")
    assert await ask("GET", "/chat/completions") == (405, "POST")
    assert await ask("OPTIONS", "/v1/chat/completions") == (405, "POST")
    assert await ask("POST", "/health", "Content-Length: 0\r\n") == (405, "GET, HEAD")
    assert await ask("DELETE", "/v1/models") == (405, "GET, HEAD")
    assert await ask("GET", "/") == (404, None)
    assert await ask("GET", "/v1/whatever") == (404, None)
    assert await ask("OPTIONS", "*") == (404, None)
    assert await ask("HEAD", "/v1/models") == (200, None)
    assert await ask("HEAD", "/health") == (200, None)
    assert await ask("GET", "/v1/models/no-such") == (404, None)
    assert await ask("GET", "/v1/models/mistral-alias") == (200, None)


async def test_models_health_and_status(stack: Stack) -> None:
    """The lists of models, the health and the current model are told without causing a swap."""
    assert (await send(stack, post(chat("mistral")))).status == 200
    await stack.settled()
    swaps = len((await stack.status())["last_swaps"])
    models = await stack.get("/v1/models")
    assert models["object"] == "list"
    found = {model["id"]: model for model in models["data"]}
    assert found.keys() == {"mistral", "coder", "llava", "keyed"}
    assert all(model["object"] == "model" and model["created"] > 0 and model["owned_by"] for model in models["data"])
    assert (found["mistral"]["state"], found["mistral"]["resident"]) == ("ready", True)
    assert (found["coder"]["state"], found["coder"]["resident"]) == ("absent", False)
    assert found["keyed"]["adapters"] == ["keyed-lora"]
    assert (await stack.get("/v1/models/coder"))["id"] == "coder"
    health = await stack.get("/health")
    assert health["status"] == "ok"
    assert health["gateway"]["status"] == "ok"
    assert health["orchestrator"]["connected"] is True
    assert health["instances"] == [{"model": "mistral", "state": "ready", "resident": True}]
    assert (await stack.get("/status"))["current_model"] == "mistral"
    assert len((await stack.status())["last_swaps"]) == swaps
