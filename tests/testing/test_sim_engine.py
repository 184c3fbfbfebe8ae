from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from modelswap.testing.engine import Behaviour, Options, SimEngine, command
from modelswap.testing.engine.options import parse
from modelswap.testing.waiting import until

CHAT = "/v1/chat/completions"


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """Return a client session."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        yield session


async def _post(http: aiohttp.ClientSession, url: str, **body: Any) -> tuple[int, Any]:
    async with http.post(url, json=body) as response:
        return response.status, await response.json()


def _events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(("path", "field"), [(CHAT, "message"), ("/v1/completions", "text")])
async def test_completions_name_model_and_instance(http: aiohttp.ClientSession, path: str, field: str) -> None:
    """Every answer says which engine gave it, also under an alias."""
    async with SimEngine(Options(model="m", aliases=("alias",), instance="i-1")) as engine:
        for name in ("m", "alias"):
            status, answer = await _post(http, engine.url + path, model=name, messages=[], prompt="hi")
            said = answer["choices"][0][field]
            said = said["content"] if field == "message" else said
            assert (status, answer["model"], answer["system_fingerprint"]) == (200, "m", "i-1")
            assert said.startswith("model=m instance=i-1 ")
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["usage"]["completion_tokens"] == 8


async def test_streams_are_openais(http: aiohttp.ClientSession) -> None:
    """A stream opens with the role, brings the same text in pieces, a reason, usage if asked for, and its end."""
    async with SimEngine(Options(model="m", instance="i-1", tokens=5)) as engine:
        body = {
            "model": "m",
            "stream": True,
            "stream_options": {"include_usage": True},
            "tools": [{"type": "function"}],
        }
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        body["messages"] = [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, image]}]
        async with http.post(engine.url + CHAT, json=body) as response:
            assert response.content_type == "text/event-stream"
            first, *middle, finish, usage = _events(await response.text())
        assert first["choices"][0]["delta"]["role"] == "assistant"
        assert "".join(c["choices"][0]["delta"]["content"] for c in middle).startswith("model=m instance=i-1 ")
        assert len(middle) == 5
        assert finish["choices"][0]["finish_reason"] == "stop"
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 5


async def test_text_streams_and_token_limits(http: aiohttp.ClientSession) -> None:
    """`max_tokens` ends an answer with reason `length`, and the model's name is in it even then."""
    async with SimEngine(Options(model="m")) as engine:
        body = {"model": "m", "stream": True, "prompt": "x", "max_tokens": 1}
        async with http.post(engine.url + "/v1/completions", json=body) as response:
            text, end = _events(await response.text())
        assert text["choices"][0]["text"] == "model=m"
        assert end["choices"][0]["finish_reason"] == "length"


async def test_embeddings_depend_on_text_and_model(http: aiohttp.ClientSession) -> None:
    """Each input gets an embedding; the same one for the same text."""
    async with SimEngine(Options(model="m")) as engine:
        _, answer = await _post(http, engine.url + "/v1/embeddings", model="m", input=["a", "b", "a"])
        vectors = [item["embedding"] for item in answer["data"]]
        assert vectors[0] == vectors[2] != vectors[1]
        _, single = await _post(http, engine.url + "/v1/embeddings", model="m", input="a")
        assert single["data"][0]["embedding"] == vectors[0]


async def test_echo_returns_exactly_what_arrived() -> None:
    """Headers come back in order and case, the body as digest, length and, if small, itself."""
    async with SimEngine(Options(model="m", instance="i-1")) as engine:
        body = b'{"model": "m",  "x":\t1}'
        reader, writer = await asyncio.open_connection(engine.host, engine.port)
        head = b"POST /v1/echo?a=b%20c HTTP/1.1\r\nHost: h\r\nX-CaSe: One\r\nx-case: two\r\n"
        writer.write(head + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        raw = await reader.read()
        writer.close()
        await writer.wait_closed()
        seen = json.loads(raw.partition(b"\r\n\r\n")[2])
        assert (seen["method"], seen["target"], seen["instance"]) == ("POST", "/v1/echo?a=b%20c", "i-1")
        assert seen["headers"][1:3] == [["X-CaSe", "One"], ["x-case", "two"]]
        assert (seen["length"], seen["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
        assert base64.b64decode(seen["body"]) == body


async def test_echo_takes_what_is_no_json_and_large(http: aiohttp.ClientSession) -> None:
    """A large body is only digested, and need not be JSON."""
    async with SimEngine(Options(model="m")) as engine:
        body = b"\xff" * 3_000_000
        async with http.post(engine.url + "/v1/echo", data=io.BytesIO(body)) as response:
            seen = await response.json()
        assert (seen["sha256"], seen["length"], seen["body"]) == (hashlib.sha256(body).hexdigest(), len(body), None)


async def test_a_misrouted_request_is_refused_and_counted(http: aiohttp.ClientSession) -> None:
    """A request for another model gets 404 and stays visible in the counts."""
    async with SimEngine(Options(model="m")) as engine:
        assert (await _post(http, engine.url + CHAT, model="other"))[0] == 404
        assert (await _post(http, engine.url + "/v1/echo", model="other"))[0] == 404
        assert (await _post(http, engine.url + CHAT))[0] == 404
        async with http.get(engine.url + "/sim/stats") as response:
            report = await response.json()
        assert (report["stats"]["misrouted"], report["stats"]["requests"], report["model"]) == (3, 3, "m")


async def test_bad_requests_are_refused(http: aiohttp.ClientSession) -> None:
    """No JSON, no object, an unknown fault, an unknown path: each gets its status."""
    async with SimEngine(Options(model="m")) as engine:
        for data in (b"{", b"[]", b'{"model": "\xff"}'):
            async with http.post(engine.url + CHAT, data=data) as response:
                assert response.status == 400
        status, answer = await _post(http, engine.url + CHAT, model="m", sim={"hnag": "stream"})
        assert (status, "hnag" in answer["error"]["message"]) == (400, True)
        assert (await _post(http, engine.url + "/sim/fault", hang="never"))[0] == 400
        for path in ("/nowhere", "/sim/nowhere", "/sleep"):
            assert (await _post(http, engine.url + path))[0] == 404
        reader, writer = await asyncio.open_connection(engine.host, engine.port)
        writer.write(b"nonsense\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        await writer.wait_closed()


async def test_small_endpoints(http: aiohttp.ClientSession) -> None:
    """Models, health, version, load and metrics answer as vLLM's do."""
    async with SimEngine(Options(model="m", aliases=("a",))) as engine:
        async with http.get(engine.url + "/v1/models") as response:
            assert [model["id"] for model in (await response.json())["data"]] == ["m", "a"]
        for path in ("/health", "/ping", "/version", "/load"):
            async with http.get(engine.url + path) as response:
                assert response.status == 200
        async with http.get(engine.url + "/metrics") as response:
            text = await response.text()
        assert 'vllm:num_requests_running{engine="0",model_name="m"} 0.0' in text
        assert 'sleep_state="awake"} 1.0' in text


async def test_the_api_key_guards_v1_only(http: aiohttp.ClientSession) -> None:
    """Without the key `/v1` is closed, the rest open."""
    async with SimEngine(Options(model="m", api_key="k")) as engine:
        assert (await _post(http, engine.url + CHAT, model="m"))[0] == 401
        async with http.get(engine.url + "/health") as response:
            assert response.status == 200
        async with http.get(engine.url + "/v1/models", headers={"authorization": "Bearer k"}) as response:
            assert response.status == 200


async def test_loading_answers_503_until_ready(http: aiohttp.ClientSession) -> None:
    """While loading, health and requests get 503; ready says when that is over."""
    async with SimEngine(Options(model="m", load_seconds=1.0)) as engine:
        async with http.get(engine.url + "/health") as response:
            assert response.status == 503
        assert (await _post(http, engine.url + CHAT, model="m"))[0] == 503
        async with asyncio.timeout(60):
            await engine.ready.wait()
        assert (await _post(http, engine.url + CHAT, model="m"))[0] == 200


async def test_an_engine_may_listen_only_when_loaded(http: aiohttp.ClientSession) -> None:
    """Like vLLM, it can refuse connections until it has loaded."""
    async with SimEngine(Options(model="m", load_seconds=0.01, listen_late=True)) as engine:
        assert engine.port == 0
        async with asyncio.timeout(60):
            await engine.ready.wait()
        assert (await _post(http, engine.url + CHAT, model="m"))[0] == 200


async def test_slots_bound_what_runs_at_once(http: aiohttp.ClientSession) -> None:
    """More requests than slots wait in the engine, and its metrics say so."""
    async with SimEngine(Options(model="m", slots=2)) as engine:
        sim = {"hang": "first_byte"}
        held = [asyncio.create_task(_post(http, engine.url + CHAT, model="m", sim=sim)) for _ in range(2)]
        await until(lambda: engine.stats.running == 2)
        third = asyncio.create_task(_post(http, engine.url + CHAT, model="m"))
        await until(lambda: engine.stats.waiting == 1)
        async with http.get(engine.url + "/metrics") as response:
            text = await response.text()
        assert 'running{engine="0",model_name="m"} 2.0' in text
        assert 'waiting{engine="0",model_name="m"} 1.0' in text
        for task in held:
            task.cancel()
        assert (await third)[0] == 200
        await asyncio.gather(*held, return_exceptions=True)
        await until(lambda: engine.stats.cancelled == 2)
        stats = engine.stats
        assert (stats.peak_running, stats.running, stats.waiting, stats.answered) == (2, 0, 0, 1)


async def test_a_client_that_leaves_is_noticed_whatever_goes_on(http: aiohttp.ClientSession) -> None:
    """Waiting for a slot, before the first byte, or in mid-stream: leaving frees the slot and is counted."""
    async with SimEngine(Options(model="m", slots=1, tokens=10**9)) as engine:

        async def read() -> None:
            body = {"model": "m", "stream": True}
            async with http.post(engine.url + CHAT, json=body) as response:
                await response.content.readline()
                await asyncio.Event().wait()

        streaming = asyncio.create_task(read())
        await until(lambda: engine.stats.running == 1)
        waiting = asyncio.create_task(_post(http, engine.url + CHAT, model="m"))
        await until(lambda: engine.stats.waiting == 1)
        for task in (waiting, streaming):
            task.cancel()
        await asyncio.gather(waiting, streaming, return_exceptions=True)
        await until(lambda: engine.stats.cancelled == 2)
        assert (engine.stats.running, engine.stats.waiting) == (0, 0)


async def test_the_rate_is_kept(http: aiohttp.ClientSession) -> None:
    """Pieces come no faster than the set rate."""
    async with SimEngine(Options(model="m", tokens=4, tokens_per_second=50)) as engine:
        begun = asyncio.get_running_loop().time()
        await _post(http, engine.url + CHAT, model="m")
        assert asyncio.get_running_loop().time() - begun >= 3 / 50


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Requests sent without waiting get their answers one after the other on the same connection."""
    async with SimEngine(Options(model="m")) as engine:
        reader, writer = await asyncio.open_connection(engine.host, engine.port)
        last = b"GET /version HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
        writer.write(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n" * 2 + last)
        raw = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert raw.count(b"HTTP/1.1 200 OK") == 3
        assert raw.endswith(b'{"version":"simulated"}')


async def test_expect_continue_is_answered() -> None:
    """A client that waits for leave to send its body gets it."""
    async with SimEngine(Options(model="m")) as engine:
        reader, writer = await asyncio.open_connection(engine.host, engine.port)
        writer.write(b"POST /v1/echo HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"{}")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.close()
        await writer.wait_closed()


def test_a_command_line_says_the_same_as_options() -> None:
    """What `command` writes, the program reads back."""
    options = Options(
        model="m",
        aliases=("a", "b"),
        instance="i",
        load_seconds=1.5,
        slots=3,
        api_key="k",
        gpu_ledger="/l",
        gpu_bytes=7,
        sleepable=True,
        quiet=True,
        listen_late=True,
        residue_bytes=1,
        behaviour=Behaviour(hang="stream", after=3, ignore_sigterm=True, late_release=0.5, child="orphan"),
    )
    argv = command(options, port="0")
    assert argv[1:7] == ["-m", "modelswap.testing.engine", "--host", "{host}", "--port", "0"]
    assert parse([*argv[7:], "--port=0"]) == options


def test_faults_are_read_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Flags need no value, and a mistake ends the program with the reason."""
    options = parse(["--fault", "ignore-sigterm", "--fault", "crash=load", "--fault", "child"])
    assert options.behaviour == Behaviour(ignore_sigterm=True, crash="load", child="child")
    with pytest.raises(SystemExit):
        parse(["--fault", "crash=nowhere"])
    assert "crash" in capsys.readouterr().err
