"""Streamed requests that wait: comments meanwhile, then the stream, or the failure as an event."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from modelswap.testing.engine.behaviour import Behaviour
from modelswap.testing.engine.options import Options
from tests.system.front_door import Answer, chat, counted, engine_of, post, running, send, simulated, stack_of, wire
from tests.system.stack import MODELS, Stack

LOADS = Options(load_seconds=0.7, tokens=4)
COMMENT = re.compile(r"modelswap position=\d+( stage=[^ ]+)?( progress=\d+%)?( eta=\d+s)?")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Run one stack for all tests of this file, with models that take a while to load or never do."""
    folder: Path = tmp_path_factory.mktemp("progress")
    never = Options(behaviour=Behaviour(load="hang"))
    fails = "sleep 0.7; echo 'usage: x'; echo 'x: error: bad weights'; exit 2"
    models = {
        "endless": simulated(folder, "endless", never, start_timeout=0.7),
        "broken": {"engine": "custom", "command": ["/bin/sh", "-c", fails]},
        "tiny": simulated(folder, "tiny", concurrency=1),
    }
    yield from running(stack_of(folder, models, engine=LOADS, gateway={"progress_after": 0.1}))


async def absent(stack: Stack) -> str:
    """Return a model that isn't resident, so that requests for it have to wait."""
    current = (await stack.get("/status"))["current_model"]
    return next(model for model in MODELS if model != current)


def assert_comments(answer: Answer) -> None:
    """Assert that comments came first, that each makes sense, and that the head is that of an event stream."""
    assert answer.status == 200
    assert answer.header("content-type") == "text/event-stream; charset=utf-8"
    assert answer.header("x-request-id")
    assert answer.body.startswith(b": modelswap ")
    assert answer.comments
    for comment in answer.comments:
        assert COMMENT.fullmatch(comment), comment


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_comments_then_the_stream(stack: Stack, version: str) -> None:
    """A stream that waits for its model begins with comments that tell position, stage and, once known, the ETA."""
    model = await absent(stack)
    answer = await send(stack, post(chat(model, stream=True), version=version))
    assert_comments(answer)
    assert (answer.whole, answer.data[-1]) == (True, None)
    assert answer.text.startswith(f"model={model} ")
    assert any("position=1 stage=" in comment for comment in answer.comments)
    assert (await send(stack, post(chat(await absent(stack))))).status == 200
    again = await send(stack, post(chat(model, stream=True), version=version))
    assert_comments(again)
    assert any("eta=" in comment for comment in again.comments), again.comments
    assert again.text.startswith(f"model={model} ")


async def test_connection_lives_on_after_comments(stack: Stack) -> None:
    """After comments and a whole stream the client's connection takes further requests."""
    async with wire(stack) as client:
        for _ in range(2):
            model = await absent(stack)
            await client.send(post(chat(model, stream=True)))
            answer = await client.answer()
            assert_comments(answer)
            assert answer.text.startswith(f"model={model} ")


async def test_no_comments(tmp_path: Path) -> None:
    """0 means never."""
    async with Stack(tmp_path, engine=LOADS, gateway={"progress_after": 0}) as silent:
        answer = await send(silent, post(chat("mistral", stream=True)))
        assert (answer.status, answer.comments, answer.header("x-sim-model")) == (200, [], "mistral")


async def test_no_comments_in_time(stack: Stack) -> None:
    """An answer that isn't streamed never has any comments, nor one that comes through in time."""
    model = await absent(stack)
    answer = await send(stack, post(chat(model)))
    assert (answer.status, answer.header("content-type")) == (200, "application/json")
    answer = await send(stack, post(chat(model, stream=True)))
    assert (answer.comments, answer.header("x-sim-model")) == ([], model)


async def test_openai_client_reads_through_comments(stack: Stack) -> None:
    """OpenAI's client gets the stream's chunks and nothing of the comments."""
    model = await absent(stack)
    async with (
        openai.AsyncOpenAI(base_url=stack.base_url, api_key="none", max_retries=0, timeout=60) as client,
    ):
        text = ""
        stream: Any = await client.chat.completions.create(model=model, messages=[], stream=True)
        async for chunk in stream:
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
        assert text.startswith(f"model={model} ")
        with pytest.raises(openai.APIError, match="teapots only") as caught:
            async for _ in await client.chat.completions.create(
                model=await absent(stack),
                messages=[],
                stream=True,
                extra_body={"sim": {"status": 418, "message": "teapots only"}},
            ):
                pass
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["status"] == 418


async def test_accept_encoding_is_dropped_only_then(stack: Stack) -> None:
    """Behind comments the engine isn't offered compression; before, it is."""
    body = chat(await absent(stack), stream=True)
    answer = await send(stack, post(body, "/v1/echo", more="Accept-Encoding: gzip\r\nX-Mine: a\r\n"))
    assert_comments(answer)
    # What is no event stream becomes one event.
    [told] = answer.data
    names = {name.lower(): value for name, value in told["headers"]}
    assert "accept-encoding" not in names
    assert names["x-mine"] == "a"
    assert answer.whole
    again = await send(stack, post(body, "/v1/echo", more="Accept-Encoding: gzip\r\nX-Mine: a\r\n"))
    assert ["accept-encoding", "gzip"] in [[n.lower(), v] for n, v in again.json()["headers"]]


async def test_failures_after_comments_are_events(stack: Stack) -> None:
    """Behind comments, each failure is an event with the status, code and retry hint it would have had."""

    async def fails(model: str, **more: Any) -> dict[str, Any]:
        answer = await send(stack, post(chat(model, stream=True, **more)))
        assert_comments(answer)
        assert (answer.whole, answer.end) == (False, "closed")
        error: dict[str, Any] = answer.data[-1]["error"]
        assert error["message"]
        assert error["type"]
        return error

    error = await fails("endless")
    assert (error["status"], error["code"]) == (504, "swap_timeout")
    error = await fails("broken")
    assert (error["status"], error["code"], error["should_retry"]) == (503, "model_broken", False)
    assert "bad weights" in error["message"]
    error = await fails(await absent(stack), sim={"status": 422, "message": "no such thing"})
    assert (error["status"], error["code"], error["message"]) == (422, 422, "no such thing")
    # An engine that dies mid-stream behind comments.
    answer = await send(
        stack, post(chat(await absent(stack), stream=True, sim={"drop": "stream", "after": 2, "tokens": 50}))
    )
    assert_comments(answer)
    assert (answer.whole, answer.end, len(answer.data)) == (False, "closed", 3)
    assert (answer.data[-1]["error"]["status"], answer.data[-1]["error"]["code"]) == (502, "engine_died")
    # And one that dies before its first byte, twice.
    error = await fails(await absent(stack), sim={"crash": "first_byte"})
    assert (error["status"], error["code"]) == (502, "engine_died")


async def test_comments_tell_the_position(stack: Stack) -> None:
    """Those who wait for a slot are told how many are before them."""
    url = await engine_of(stack, "tiny")
    async with wire(stack) as runner, wire(stack) as second, wire(stack) as third:
        await runner.send(post(chat("tiny", sim={"hang": "first_byte"})))
        await counted(url, "running")
        await second.send(post(chat("tiny", stream=True)))
        assert b"position=1" in await second.until(b"\n\n\r\n")
        await third.send(post(chat("tiny", stream=True)))
        assert b"position=2" in await third.until(b"\n\n\r\n")
        second.leave()
        await third.until(b"position=1")
        runner.leave()
        await third.until(b"[DONE]")


async def test_aiohttp_client_after_failures(stack: Stack) -> None:
    """A pooling client that reads an error event to the end sees a cut, and its next request is not hurt."""
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        for _ in range(2):
            model = await absent(stack)
            data = chat(model, stream=True, sim={"status": 400, "message": "no"})
            async with session.post(f"{stack.base_url}/chat/completions", data=data) as got:
                with pytest.raises(aiohttp.ClientPayloadError):
                    await got.read()
            async with session.post(f"{stack.base_url}/chat/completions", data=chat(model)) as got:
                assert got.status == 200
