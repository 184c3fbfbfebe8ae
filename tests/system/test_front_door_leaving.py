"""Clients that leave, or don't read, and what that frees at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from modelswap.testing.engine.behaviour import Behaviour
from modelswap.testing.engine.options import Options
from tests.system.front_door import (
    chat,
    counted,
    engine_of,
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

RUNNING_SIM = {"tokens": 100_000, "tokens_per_second": 50}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Run one stack for all tests of this file. There is only one slot a model: a leaked one is noticed."""
    folder: Path = tmp_path_factory.mktemp("leaving")
    never = Options(behaviour=Behaviour(load="hang"))
    models = {
        "mistral": simulated(folder, "mistral", concurrency=1),
        "wide": simulated(folder, "wide"),
        "endless": simulated(folder, "endless", never, start_timeout=3.0),
    }
    yield from running(stack_of(folder, models, gateway={"progress_after": 0.1, "idle_timeout": 4.0}))


async def idle(stack: Stack, url: str, model: str = "mistral") -> None:
    """Wait until neither the engine nor the gateway has anything running."""

    async def nothing_runs() -> bool:
        told = await stack.get("/status")
        return bool((await stats(url))["running"] == 0 and told["in_flight"].get(model) == 0)

    await until(nothing_runs, "the slot is free")


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize(
    ("body", "head"),
    [
        (chat("mistral", sim={"hang": "first_byte"}), False),
        (chat("mistral", stream=True, sim={"hang": "first_byte"}), False),
        (chat("mistral", stream=True, sim={"hang": "stream"}), True),
        (chat("mistral", sim={"hang": "stream"}), True),
        (chat("mistral", stream=True, sim=RUNNING_SIM), True),
        (chat("mistral", sim=RUNNING_SIM), False),
    ],
    ids=["silent", "silent-stream", "silent-mid-stream", "silent-mid-body", "streaming", "computing"],
)
async def test_client_that_leaves_frees_the_engine(stack: Stack, *, body: bytes, head: bool, reset: bool) -> None:
    """However a client leaves and whatever the engine is doing, the engine hears of it and its slot is free."""
    url = await engine_of(stack, "mistral")
    gone = (await stats(url))["cancelled"]
    async with wire(stack) as client:
        await client.send(post(body))
        if head:
            await client.head()
        await counted(url, "running")
        client.leave(reset=reset)
        await counted(url, "cancelled", gone + 1)
    # There is only one slot: this would wait forever if it were leaked.
    assert (await send(stack, post(chat("mistral")))).status == 200
    await idle(stack, url)
    assert (await stats(url))["cancelled"] == gone + 1


async def test_client_that_half_closes_counts_as_gone(stack: Stack) -> None:
    """A client that sends no more has left, as engines see it, too."""
    url = await engine_of(stack, "mistral")
    gone = (await stats(url))["cancelled"]
    async with wire(stack) as client:
        await client.send(post(chat("mistral", sim={"hang": "first_byte"})))
        await counted(url, "running")
        client.writer.write_eof()
        await counted(url, "cancelled", gone + 1)
        assert await client.end() in ("closed", "reset")


async def waiting(stack: Stack, model: str, count: int) -> None:
    """Wait until so many wait for a model, at the gateway and at the orchestrator."""

    async def so_many() -> bool:
        told = await stack.get("/status")
        [known] = [m for m in (await stack.status())["models"] if m["name"] == model]
        return bool(told["waiting"].get(model, 0) == count and known["waiting"] == count)

    await until(so_many, f"{count} wait for {model}")


async def test_client_that_leaves_while_queued(stack: Stack) -> None:
    """A client that leaves the queue is forgotten, and its request never reaches the engine."""
    url = await engine_of(stack, "mistral")
    gone = (await stats(url))["cancelled"]
    left = total(await metrics(stack), "modelswap_gateway_requests_total", status="499")
    async with wire(stack) as runner, wire(stack) as leaver, wire(stack) as other:
        await runner.send(post(chat("mistral", sim={"hang": "first_byte"})))
        await counted(url, "running")
        await leaver.send(post(chat("mistral")))
        await other.send(post(chat("coder")))
        await waiting(stack, "mistral", 1)
        leaver.leave()
        await waiting(stack, "mistral", 0)
        await waiting(stack, "coder", 1)
        other.leave()
        await waiting(stack, "coder", 0)
        requests = (await stats(url))["requests"]
        runner.leave()
        await counted(url, "cancelled", gone + 1)
    assert (await send(stack, post(chat("mistral")))).status == 200
    assert (await stats(url))["requests"] == requests + 1
    series = await metrics(stack)
    assert total(series, "modelswap_gateway_requests_total", status="499") == left + 3
    status = await stack.status()
    assert [i["model"] for i in status["instances"]] == ["mistral"]


async def test_clients_that_leave_while_their_model_loads(stack: Stack) -> None:
    """The last waiter's leaving is noted while its model loads; nobody else is held up by it."""
    async with wire(stack) as first, wire(stack) as second:
        for client in (first, second):
            await client.send(post(chat("endless", stream=True)))
        await waiting(stack, "endless", 2)
        first.leave()
        await waiting(stack, "endless", 1)
        second.leave(reset=True)
        await waiting(stack, "endless", 0)
    assert (await send(stack, post(chat("mistral")))).status == 200
    await stack.settled()
    stack.assert_never_overlapped()


@pytest.mark.parametrize("progress", [False, True], ids=["raw", "after-progress"])
async def test_client_that_does_not_read(stack: Stack, *, progress: bool) -> None:
    """An endless stream to a client that reads nothing stops at the engine, fills no memory, and is dropped at last."""
    model = "mistral" if progress else "wide"
    url = await engine_of(stack, model)
    gone = (await stats(url))["cancelled"]
    [gateway] = stack.gateways()
    before = gateway.memory_info().rss
    huge = {"tokens": 1_000_000_000, "event_bytes": 1_000_000}
    async with wire(stack) as runner, wire(stack) as client:
        if progress:
            await runner.send(post(chat(model, sim={"hang": "first_byte"})))
            await counted(url, "running")
        await client.send(post(chat(model, stream=True, sim=huge)))
        if progress:
            await client.until(b": modelswap")
            runner.leave()
            gone += 1
            await counted(url, "cancelled", gone)
        await client.until(f"model={model}".encode())
        # Nothing reads from here on (but for the little that a stream reader takes by itself).
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        [engine] = stack.engines()
        await until(quiet(engine.cpu_times), "the engine stands still")
        assert gateway.memory_info().rss - before < 48 << 20
        # Others are served meanwhile, if there is a slot.
        if not progress:
            assert (await send(stack, post(chat(model)))).status == 200
        # Nobody holds a slot for ever: that is `idle_timeout`.
        await counted(url, "cancelled", gone + 1)
    await idle(stack, url, model)


def quiet(cpu: Callable[[], tuple[float, ...]]) -> Callable[[], Awaitable[bool]]:
    """Return a condition: a process hasn't computed for half a second."""

    async def condition() -> bool:
        before = sum(cpu()[:2])
        await asyncio.sleep(0.5)
        return sum(cpu()[:2]) - before < 0.05

    return condition


async def test_large_body_to_a_slow_engine(stack: Stack) -> None:
    """A body of many megabytes arrives whole, and the answer too."""
    body = b'{"model":"coder-alias","x":"' + b"y" * (30 << 20) + b'"}'
    for chunked in (0, 100_000):
        answer = await send(stack, post(body, "/v1/echo", chunked=chunked))
        assert (answer.status, answer.json()["length"]) == (200, len(body) - len("-alias"))
