from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from modelswap.testing.engine import Behaviour, Options, SimEngine
from modelswap.testing.ledger import Ledger
from modelswap.testing.waiting import until

CHAT = "/v1/chat/completions"


@pytest.fixture
async def engine() -> AsyncIterator[SimEngine]:
    """Return an engine of the model ``m``."""
    async with SimEngine(Options(model="m", instance="i-1", tokens=6)) as engine:
        yield engine


@asynccontextmanager
async def _connection(engine: SimEngine) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(engine.host, engine.port)
    try:
        async with asyncio.timeout(60):
            yield reader, writer
    finally:
        writer.close()
        # A reset is one of the things that are simulated.
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def _request(sim: dict[str, Any] | None = None, *, stream: bool = False, version: str = "1.1") -> bytes:
    body = json.dumps({"model": "m", "stream": stream, "sim": sim or {}}).encode()
    return f"POST {CHAT} HTTP/{version}\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def _rest(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the connection ends, cleanly or with a reset."""
    found = bytearray()
    try:
        while data := await reader.read(1 << 16):
            found += data
    except ConnectionResetError:
        pass
    return bytes(found)


@pytest.mark.parametrize("stream", [False, True])
async def test_hang_before_the_first_byte(engine: SimEngine, stream: bool) -> None:
    """The request runs, and nothing comes."""
    async with _connection(engine) as (reader, writer):
        writer.write(_request({"hang": "first_byte"}, stream=stream))
        await until(lambda: engine.stats.running)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.05)
        assert engine.stats.running == 1


async def test_hang_in_mid_stream(engine: SimEngine) -> None:
    """As many events as asked for come, and then nothing."""
    async with _connection(engine) as (reader, writer):
        writer.write(_request({"hang": "stream", "after": 3}, stream=True))
        for _ in range(3):
            await reader.readuntil(b"data: ")
            await reader.readuntil(b"\n\n")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readuntil(b"data: "), 0.05)


async def test_hang_in_a_whole_answer(engine: SimEngine) -> None:
    """Half the body comes."""
    async with _connection(engine) as (reader, writer):
        writer.write(_request({"hang": "stream"}))
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        await reader.readexactly(length // 2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.05)


@pytest.mark.parametrize(("where", "stream", "events"), [("first_byte", True, 0), ("stream", True, 2)])
async def test_dropped_connections(engine: SimEngine, where: str, stream: bool, events: int) -> None:
    """The connection ends before any byte, or after so many events; the engine lives and blames no client."""
    async with _connection(engine) as (reader, writer):
        writer.write(_request({"drop": where, "after": 2}, stream=stream))
        raw = await _rest(reader)
    assert raw.count(b"data: ") == events
    assert bool(raw) == bool(events)
    assert not raw.endswith(b"0\r\n\r\n")
    assert engine.stats.cancelled == 0


async def test_a_reused_connection_can_be_dropped(engine: SimEngine) -> None:
    """The first request on a connection is answered, the second one finds it closed."""
    async with _connection(engine) as (reader, writer):
        writer.write(_request({"drop": "reused"}))
        await reader.readuntil(b"}]")
        writer.write(_request({"drop": "reused"}))
        assert b"HTTP/1.1" not in await _rest(reader)


async def test_idle_connections_are_closed(engine: SimEngine) -> None:
    """An idle connection is closed unannounced, at once or after a while."""
    for timeout in (0, 0.02):
        async with _connection(engine) as (reader, writer):
            writer.write(_request({"idle_timeout": timeout}))
            raw = await _rest(reader)
            assert raw.startswith(b"HTTP/1.1 200")
            assert b"connection: close" not in raw


async def test_connection_close_is_announced(engine: SimEngine) -> None:
    """`Connection: close` is said and done."""
    async with _connection(engine) as (reader, writer):
        writer.write(_request({"connection_close": True}))
        assert b"\r\nconnection: close\r\n" in await _rest(reader)


@pytest.mark.parametrize(
    ("framing", "stream", "header"),
    [
        ("chunked", False, b"transfer-encoding: chunked"),
        ("length", False, b"content-length: "),
        ("close", False, b"connection: close"),
        ("chunked", True, b"transfer-encoding: chunked"),
        ("length", True, b"connection: close"),
    ],
)
async def test_framing(engine: SimEngine, framing: str, stream: bool, header: bytes) -> None:
    """Bodies are delimited as asked for; a stream never by its length."""
    async with _connection(engine) as (reader, writer):
        writer.write(_request({"framing": framing, "idle_timeout": 0}, stream=stream))
        head, _, body = (await _rest(reader)).partition(b"\r\n\r\n")
        assert header in head
        assert body.endswith(b"0\r\n\r\n") == (framing == "chunked")


async def test_http_1_0_streams_end_with_the_connection(engine: SimEngine) -> None:
    """An old client gets no chunks."""
    async with _connection(engine) as (reader, writer):
        writer.write(_request(stream=True, version="1.0"))
        raw = await _rest(reader)
        assert b"transfer-encoding" not in raw
        assert raw.endswith(b"data: [DONE]\n\n")


async def test_slow_headers_come_in_pieces(engine: SimEngine) -> None:
    """The head trickles over the time asked for, and is whole in the end."""
    async with _connection(engine) as (reader, writer):
        begun = time.monotonic()
        writer.write(_request({"slow_headers": 0.1}))
        head = await reader.readuntil(b"\r\n\r\n")
        assert time.monotonic() - begun >= 0.08
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_slow_first_token(engine: SimEngine) -> None:
    """Nothing comes before the first token's time."""
    async with _connection(engine) as (reader, writer):
        begun = time.monotonic()
        writer.write(_request({"first_token_seconds": 0.05}, stream=True))
        await reader.read(1)
        assert time.monotonic() - begun >= 0.05


async def test_huge_events_and_wrong_answers(engine: SimEngine) -> None:
    """An event can be as long as asked for, and an answer can name no model."""
    async with _connection(engine) as (reader, writer):
        writer.write(_request({"event_bytes": 300_000, "idle_timeout": 0}, stream=True))
        assert len(await _rest(reader)) > 300_000
    async with _connection(engine) as (reader, writer):
        writer.write(_request({"wrong": True, "idle_timeout": 0}))
        raw = await _rest(reader)
        assert raw.startswith(b"HTTP/1.1 200")
        assert b"model=m" not in raw


async def test_error_statuses(engine: SimEngine) -> None:
    """An error can be had with any status and message, for so many requests."""
    engine.set_faults(Behaviour(status=429, message="slow down", times=2))
    for expected in (b"429", b"429", b"200"):
        async with _connection(engine) as (reader, writer):
            writer.write(_request({"idle_timeout": 0}))
            raw = await _rest(reader)
            assert raw.split()[1] == expected
            assert (b"slow down" in raw) == (expected == b"429")


async def test_faults_at_run_time_replace_each_other(engine: SimEngine) -> None:
    """`POST /sim/fault` sets what is to go wrong, `{}` ends it; health can be made to fail."""
    async with aiohttp.ClientSession() as http:

        async def health() -> int:
            async with http.get(engine.url + "/health") as response:
                return response.status

        async def fault(**said: Any) -> None:
            async with http.post(engine.url + "/sim/fault", json=said) as response:
                assert response.status == 200
                assert await response.json() == said

        await fault(health_status=500)
        assert await health() == 500
        await fault(hang="health")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(health(), 0.05)
        await fault()
        assert await health() == 200


@pytest.mark.parametrize(("where", "by", "code"), [("first_byte", "exit", 1), ("stream", "kill", -9)])
async def test_a_crash_in_process_looks_like_one(tmp_path: Path, where: Any, by: Any, code: int) -> None:
    """On a test's own loop a crash cuts every connection, closes the port and frees the memory."""
    ledger = Ledger.create(tmp_path / "gpu.json", 100)
    options = Options(model="m", gpu_ledger=str(ledger.path), gpu_bytes=60)
    async with SimEngine(options) as engine:
        assert ledger.read().used == 60
        async with _connection(engine) as (idle, _), _connection(engine) as (reader, writer):
            writer.write(_request({"crash": where, "by": by}, stream=True))
            raw = await _rest(reader)
            await _rest(idle)
        assert raw.count(b"data: ") == (1 if where == "stream" else 0)
        assert (engine.exit_code, engine.ended.is_set(), ledger.read().used) == (code, True, 0)
        with pytest.raises(OSError):
            await asyncio.open_connection(engine.host, engine.port)


async def test_failed_loads_end_the_engine(tmp_path: Path) -> None:
    """Out-of-memory and a wrong model end it with status 1 and vLLM's words."""
    for load, words in (
        ("oom", "torch.OutOfMemoryError: CUDA out of memory"),
        ("fail", "not a valid model identifier"),
    ):
        async with SimEngine(Options(model="m", behaviour=Behaviour(load=load))) as engine:  # type: ignore[arg-type]
            assert (engine.exit_code, engine.ended.is_set(), engine.ready.is_set()) == (1, True, False)
            assert any(words in line for line in engine.log.lines)


async def test_a_load_can_hang_or_crash() -> None:
    """A hanging load stays 503 for ever; a crashing one ends."""
    async with (
        SimEngine(Options(model="m", behaviour=Behaviour(load="hang"))) as engine,
        aiohttp.ClientSession() as http,
    ):
        async with http.get(engine.url + "/health") as response:
            assert response.status == 503
        assert not engine.ended.is_set()
    options = Options(model="m", load_seconds=0.01, behaviour=Behaviour(crash="load", by="kill"))
    async with SimEngine(options) as engine, asyncio.timeout(60):
        await engine.ended.wait()
        assert engine.exit_code == -9


async def test_a_port_that_is_taken_is_an_error(engine: SimEngine) -> None:
    """Starting on a taken port raises; one that listens late ends with status 1."""
    with pytest.raises(OSError):
        await SimEngine(Options(port=engine.port)).start()
    async with SimEngine(Options(port=engine.port, listen_late=True)) as late, asyncio.timeout(60):
        await late.ended.wait()
        assert late.exit_code == 1


async def test_sigterm_can_be_ignored_or_slow() -> None:
    """What SIGTERM does can be said: nothing, or a slow end."""
    async with SimEngine(Options(behaviour=Behaviour(ignore_sigterm=True))) as engine:
        await engine.terminate()
        assert engine.exit_code is None
        engine.set_faults(Behaviour())
        assert engine.behaviour.ignore_sigterm
    async with SimEngine() as engine:
        engine.set_faults(Behaviour(stop_seconds=0.05))
        begun = time.monotonic()
        await engine.terminate()
        assert engine.exit_code == 0
        assert time.monotonic() - begun >= 0.05
