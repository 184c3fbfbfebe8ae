"""Every failure that a client can meet, as it sees it through a real ``modelswap up``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import openai
import psutil
import pytest

from modelswap.testing.engine.behaviour import Behaviour
from modelswap.testing.engine.options import Options
from tests.system.front_door import (
    Answer,
    chat,
    counted,
    engine_of,
    fault,
    metrics,
    post,
    running,
    send,
    simulated,
    stack_of,
    stats,
    total,
    wire,
)
from tests.system.stack import Stack, until

VICTIMS = 24
SLOW = {"tokens": 400, "tokens_per_second": 100}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Run one stack for most tests of this file, with models that don't start, each in its own way."""
    folder: Path = tmp_path_factory.mktemp("failures")
    models = {
        "failing": simulated(folder, "failing", Options(behaviour=Behaviour(load="fail"))),
        "mistyped": {"engine": "custom", "command": [sys.executable, "-m", "modelswap.testing.engine", "--no-such"]},
        "missing": {"engine": "custom", "command": ["/no/such/program"]},
        "endless": simulated(folder, "endless", Options(behaviour=Behaviour(load="hang")), start_timeout=0.5),
        "patient": simulated(folder, "patient", Options(load_seconds=0.05, tokens=4, keep_alive=600)),
        # Each dies in one test, so that none is left alone for having died too often.
        **{f"victim-{n}": simulated(folder, f"victim-{n}") for n in range(VICTIMS)},
    }
    yield from running(stack_of(folder, models))


@pytest.fixture(scope="module")
def victims() -> Iterator[str]:
    """Return names of models that may die."""
    return (f"victim-{n}" for n in range(VICTIMS))


@pytest.fixture
def victim(victims: Iterator[str]) -> str:
    """Return the name of a model that may die."""
    return next(victims)


def assert_retry_hints(answer: Answer) -> None:
    """Assert that whole seconds and milliseconds agree."""
    seconds, exact = answer.header("retry-after"), answer.header("retry-after-ms")
    assert seconds is not None
    assert exact is not None
    assert int(seconds) == -(-int(exact) // 1000) > 0


async def test_models_that_do_not_start(stack: Stack) -> None:
    """A failed start is 503 with the reason and the log's last lines; a permanent one says not to come back."""
    answer = await send(stack, post(chat("failing")))
    assert (answer.status, answer.error["code"], answer.error["type"]) == (503, "model_start_failed", "server_error")
    assert "failing failed to start" in answer.error["message"]
    assert "Loading model failing..." in answer.error["message"]
    assert_retry_hints(answer)
    # While it backs off, nothing is started, and the answer is the same at once.
    again = await send(stack, post(chat("failing")))
    assert (again.status, again.error["code"]) == (503, "model_start_failed")
    assert "Loading model failing..." in again.error["message"]
    assert_retry_hints(again)

    for model, words in (("mistyped", "unrecognized arguments: --no-such"), ("missing", "/no/such/program")):
        for _ in range(2):
            answer = await send(stack, post(chat(model)))
            assert (answer.status, answer.error["code"]) == (503, "model_broken")
            assert words in answer.error["message"]
            assert answer.header("x-should-retry") == "false"

    answer = await send(stack, post(chat("endless")))
    assert (answer.status, answer.error["code"]) == (504, "swap_timeout")
    assert "0.5 s" in answer.error["message"]
    assert "endless" in answer.error["message"]
    # The device is clean: the next model has it.
    assert (await send(stack, post(chat("mistral")))).status == 200
    stack.assert_never_overlapped()


async def test_permanent_failure_is_not_retried_by_openai_client(stack: Stack) -> None:
    """OpenAI's client obeys x-should-retry: one request only, however many retries it would make."""
    asked = {"name": "modelswap_gateway_requests_total", "model": "mistyped", "status": "503"}
    before = total(await metrics(stack), **asked)
    async with openai.AsyncOpenAI(base_url=stack.base_url, api_key="none", max_retries=5, timeout=60) as client:
        with pytest.raises(openai.InternalServerError, match="unrecognized arguments") as caught:
            await client.chat.completions.create(model="mistyped", messages=[])
        assert caught.value.status_code == 503
        assert caught.value.request_id
        with pytest.raises(openai.NotFoundError, match="there are: coder"):
            await client.chat.completions.create(model="nobody", messages=[])
    assert total(await metrics(stack), **asked) == before + 1


@pytest.mark.parametrize("how", ["crash", "drop"])
@pytest.mark.parametrize("stream", [False, True])
async def test_engine_that_dies_twice(stack: Stack, victim: str, *, how: str, stream: bool) -> None:
    """An engine that dies before its first byte each time: the request is tried again once, then 502."""
    answer = await send(stack, post(chat(victim, stream=stream, sim={how: "first_byte"})))
    assert (answer.status, answer.error["code"]) == (502, "engine_died")
    assert victim in answer.error["message"]
    assert answer.end == "open"
    assert (await send(stack, post(chat(victim)))).status == 200
    await stack.settled()
    stack.assert_never_overlapped()


async def test_engine_that_dies_once_costs_nothing(stack: Stack, victim: str) -> None:
    """An engine that dies once before its first byte: the client sees nothing of it."""
    url = await engine_of(stack, victim)
    waiting = asyncio.create_task(send(stack, post(chat(victim, sim={"first_token_seconds": 0.5}))))
    await counted(url, "running")
    [engine] = stack.engines()
    engine.kill()
    answer = await waiting
    assert answer.status == 200
    assert "model=" in answer.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("how", ["crash", "drop"])
async def test_stream_that_breaks_off(stack: Stack, victim: str, how: str) -> None:
    """Mid-stream: an error event, then the connection's end without a last chunk; nobody takes it for whole."""
    body = chat(victim, stream=True, sim={how: "stream", "after": 3, **SLOW})
    answer = await send(stack, post(body))
    assert (answer.status, answer.whole, answer.end) == (200, False, "closed")
    *chunks, last = answer.data
    assert len(chunks) == 3
    assert last["error"]["code"] == "engine_died"
    assert last["error"]["status"] == 502
    assert "broke off" in last["error"]["message"]
    assert answer.body.endswith(b"\n\n")
    # The client's library raises, and its next request on the same session is not hurt by the close.
    async with openai.AsyncOpenAI(base_url=stack.base_url, api_key="none", max_retries=0, timeout=60) as client:
        for _ in range(3):
            with pytest.raises(openai.APIError, match="broke off"):
                async for _chunk in await client.chat.completions.create(
                    model=victim, messages=[], stream=True, extra_body={"sim": {"drop": "stream", **SLOW}}
                ):
                    pass
            whole = await client.chat.completions.create(model=victim, messages=[])
            assert "model=" in (whole.choices[0].message.content or "")
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        for _ in range(10):
            data = chat(victim, stream=True, sim={"drop": "stream", **SLOW})
            async with session.post(f"{stack.base_url}/chat/completions", data=data) as got:
                with pytest.raises(aiohttp.ClientPayloadError):
                    await got.read()
            async with session.post(f"{stack.base_url}/chat/completions", data=chat(victim)) as got:
                assert got.status == 200


async def test_old_http_stream_that_breaks_off(stack: Stack, victim: str) -> None:
    """An HTTP/1.0 client gets the error event as its stream's last words."""
    body = chat(victim, stream=True, sim={"drop": "stream", **SLOW})
    answer = await send(stack, post(body, version="1.0"))
    assert answer.data[-1]["error"]["code"] == "engine_died"


async def test_unbounded_stream_that_breaks_off(stack: Stack, victim: str) -> None:
    """Where an engine's close ends its stream, its death looks the same; no end that it didn't send is made up."""
    await engine_of(stack, victim)
    async with wire(stack) as client:
        await client.send(post(chat(victim, stream=True, sim={"framing": "close", **SLOW})))
        assert (await client.head()).header("connection") == "close"
        await client.until(b"instance=")
        [engine] = stack.engines()
        engine.kill()
        rest, end = await client.rest()
        assert b"[DONE]" not in rest
        assert end in ("closed", "reset")


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("how", ["crash", "drop"])
async def test_plain_answer_that_breaks_off(stack: Stack, victim: str, how: str, framing: str) -> None:
    """A body that is no event stream and breaks off is visibly cut: no end, no added words."""
    answer = await send(stack, post(chat(victim, sim={how: "stream", "framing": framing})))
    assert (answer.status, answer.whole) == (200, False)
    assert answer.end in ("closed", "reset")
    assert b"error" not in answer.body
    assert (await send(stack, post(chat(victim)))).status == 200


async def test_full_queue_and_long_waits(tmp_path: Path) -> None:
    """A full queue answers 503 with Retry-After at once; who has waited for too long is answered 504."""
    models = {"tiny": simulated(tmp_path, "tiny", concurrency=1)}
    async with stack_of(tmp_path, models, scheduling={"queue_requests": 2, "queue_timeout": 4.0}) as full:
        url = await engine_of(full, "tiny")
        async with wire(full) as runner:
            await runner.send(post(chat("tiny", sim={"hang": "first_byte"})))
            await counted(url, "running")
            waiting = [asyncio.create_task(send(full, post(chat("tiny")))) for _ in range(2)]

            async def both_wait() -> bool:
                return bool(sum(model["waiting"] for model in (await full.status())["models"]) == 2)

            await until(both_wait, "two wait")
            for model in ("tiny", "mistral"):
                answer = await send(full, post(chat(model, stream=True)))
                assert (answer.status, answer.error["code"]) == (503, "queue_full")
                assert_retry_hints(answer)
            for answer in await asyncio.gather(*waiting):
                assert (answer.status, answer.error["code"]) == (504, "queue_timeout")
        assert (await send(full, post(chat("tiny")))).status == 200


async def test_reused_connection_that_the_engine_drops(stack: Stack) -> None:
    """A kept connection that the engine closes is not its death: the request goes out again, uncounted."""
    url = await engine_of(stack, "mistral")
    pid = stack.engines()[0].pid
    for behaviour in (
        {"drop": "reused"},
        {"idle_timeout": 0.0},
        {"idle_timeout": 0.01},
        {"connection_close": True},
    ):
        await fault(url, **behaviour)
        before = (await stats(url))["answered"]
        for n in range(20):
            answer = await send(stack, post(chat("mistral", stream=n % 2 == 0)))
            assert (answer.status, answer.whole, answer.header("connection")) == (200, True, None), behaviour
        assert (await stats(url))["answered"] == before + 20
    series = await metrics(stack)
    assert total(series, "modelswap_gateway_faults_total", model="mistral") == 0
    assert total(series, "modelswap_gateway_stale_connections_total", model="mistral") > 0
    await fault(url)
    assert [p.pid for p in stack.engines()] == [pid]


async def test_idle_engine_connections_retire(stack: Stack) -> None:
    """A connection to an engine that would keep it for long is closed by us after a while, and made anew."""
    await engine_of(stack, "patient")
    [gateway] = stack.gateways()
    status = await stack.status()
    [port] = [i["port"] for i in status["instances"] if i["model"] == "patient" and i["state"] == "ready"]

    def connections() -> int:
        found = gateway.net_connections()
        return sum(c.status == psutil.CONN_ESTABLISHED and c.raddr[1:] == (port,) for c in found)

    assert connections() == 1
    await until(lambda: connections() == 0, "the idle connection is closed")
    assert (await send(stack, post(chat("patient")))).status == 200


async def test_drain_that_takes_too_long(tmp_path: Path) -> None:
    """What still runs when a drain's time is over ends with a retryable error: an event in a stream, else a status."""
    scheduling = {"max_wait": 0.3, "drain_timeout": 0.3, "on_drain_timeout": "abort"}
    async with stack_of(tmp_path, {}, scheduling=scheduling) as short:
        url = await engine_of(short, "mistral")
        async with wire(short) as stream, wire(short) as silent:
            await stream.send(post(chat("mistral", stream=True, sim={"hang": "stream"})))
            await silent.send(post(chat("mistral", stream=True, sim={"hang": "first_byte"})))
            await counted(url, "running", 2)
            assert (await send(short, post(chat("coder")))).status == 200
            answer = await stream.answer()
            assert (answer.status, answer.whole, answer.end) == (200, False, "closed")
            error = answer.data[-1]["error"]
            assert (error["code"], error["status"]) == ("drain_aborted", 503)
            assert error["retry_after_ms"] > 0
            answer = await silent.answer()
            assert (answer.status, answer.error["code"]) == (503, "drain_aborted")
            assert_retry_hints(answer)
        await short.settled()
        short.assert_never_overlapped()


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("slow_headers", [0.0, 0.2])
async def test_every_framing_of_engines(stack: Stack, framing: str, slow_headers: float) -> None:
    """However an engine delimits its answers, and however slowly it sends their heads, clients get them whole."""
    sim = {"framing": framing, "slow_headers": slow_headers}
    for stream in (False, True):
        for version in ("1.1", "1.0"):
            answer = await send(stack, post(chat("mistral", stream=stream, sim=sim), version=version))
            assert (answer.status, answer.whole) == (200, True)
            text = answer.text if stream else answer.json()["choices"][0]["message"]["content"]
            assert text.startswith("model=mistral ")
            if stream:
                assert answer.data[-1] is None


async def test_orchestrator_that_is_away(stack: Stack) -> None:
    """While the orchestrator is stopped, bad requests are still told so, and the health says what is the matter."""
    assert (await send(stack, post(chat("mistral")))).status == 200
    [orchestrator] = stack.orchestrators()
    orchestrator.suspend()
    try:
        assert (await send(stack, post(chat("nobody")))).status == 404
        assert (await send(stack, post(b"{"))).status == 400
        assert (await send(stack, post(chat("mistral")))).status == 200
        assert (await stack.get("/v1/models"))["data"]

        async def noticed() -> bool:
            return (await stack.get("/health"))["orchestrator"]["connected"] is False

        await until(noticed, "the health says that the orchestrator is silent")
        assert (await stack.get("/health"))["gateway"]["status"] == "ok"
    finally:
        orchestrator.resume()
    await until(stack.healthy, "well again")
    assert (await send(stack, post(chat("coder")))).status == 200
