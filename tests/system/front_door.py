"""What the tests of the gateway's address share: clients that speak bytes, and models that are simulated engines."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp
import msgspec

from modelswap.testing.engine.options import Options, command
from tests.system.stack import GIB, MODELS, Stack, until

PATIENCE: Final = 60.0
End = Literal["open", "closed", "reset"]


class Answer:
    """One response: ``whole`` if it ended as its framing says; ``end`` is what became of the connection, if known."""

    def __init__(self, status: int, version: str, headers: list[tuple[str, str]]) -> None:
        self.status = status
        self.version = version
        self.headers = headers
        self.body = b""
        self.whole = False
        self.end: End = "open"

    def header(self, name: str) -> str | None:
        """Return a header's value; it must not be there twice."""
        values = [value for key, value in self.headers if key == name]
        assert len(values) <= 1, f"{name} is there {len(values)} times"
        return values[0] if values else None

    def json(self) -> Any:
        """Return the body's content."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in OpenAI's shape; fails if it isn't."""
        error: dict[str, Any] = self.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert self.header("content-type") == "application/json"
        return error

    @property
    def data(self) -> list[Any]:
        """The data of a stream's events, ``[DONE]`` as None."""
        events = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [None if event == "[DONE]" else json.loads(event) for event in events]

    @property
    def comments(self) -> list[str]:
        """A stream's comments."""
        return [line[2:] for line in self.body.decode().split("\n") if line.startswith(": ")]

    @property
    def text(self) -> str:
        """What a stream's chat chunks say."""
        choices = [event["choices"] for event in self.data if event is not None and "choices" in event]
        return "".join(choice[0]["delta"].get("content") or "" for choice in choices if choice)


class Wire:
    """A client's connection. Everything has a deadline."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        async with asyncio.timeout(PATIENCE):
            self.writer.write(data)
            await self.writer.drain()

    async def head(self) -> Answer:
        """Return a response without its body."""
        async with asyncio.timeout(PATIENCE):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        pairs = [line.partition(":") for line in lines]
        return Answer(int(status), version, [(name.lower(), value.strip()) for name, _, value in pairs])

    async def answer(self, *, method: str = "POST") -> Answer:
        """Return a response with as much of its body as comes."""
        answer = await self.head()
        try:
            async with asyncio.timeout(PATIENCE):
                await self._body(answer, method)
        except asyncio.IncompleteReadError as error:
            answer.body += error.partial
            answer.end = "closed"
        except ConnectionResetError:
            answer.end = "reset"
        return answer

    async def _body(self, answer: Answer, method: str) -> None:
        length = answer.header("content-length")
        coding = answer.header("transfer-encoding")
        assert length is None or coding is None
        if method == "HEAD" or answer.status in (204, 304):
            pass
        elif coding is not None:
            assert coding == "chunked"
            while True:
                size = int((await self.reader.readuntil(b"\r\n")), 16)
                if size:
                    answer.body += await self.reader.readexactly(size)
                assert await self.reader.readexactly(2) == b"\r\n"
                if not size:
                    break
        elif length is not None:
            answer.body = await self.reader.readexactly(int(length))
        else:
            answer.body = await self.reader.read()
            answer.end = "closed"
        answer.whole = True

    async def until(self, mark: bytes) -> bytes:
        """Return everything up to and with ``mark``."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readuntil(mark)

    async def end(self) -> End:
        """Wait for the connection's end; nothing more may come on it."""
        try:
            async with asyncio.timeout(PATIENCE):
                assert await self.reader.read() == b""
        except ConnectionResetError:
            return "reset"
        return "closed"

    async def rest(self) -> tuple[bytes, End]:
        """Return all bytes to the connection's end, and how it ended."""
        got = b""
        try:
            async with asyncio.timeout(PATIENCE):
                while data := await self.reader.read(65536):
                    got += data
        except ConnectionResetError:
            return got, "reset"
        return got, "closed"

    def leave(self, *, reset: bool = False) -> None:
        """Close the connection, whatever is under way."""
        self.writer.transport.abort() if reset else self.writer.close()


@contextlib.asynccontextmanager
async def wire(stack: Stack) -> AsyncIterator[Wire]:
    """Connect to the gateway."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stack.gateway_port, limit=1 << 24)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):  # it may have been reset
            await writer.wait_closed()


def chat(model: str, *, stream: bool = False, sim: dict[str, Any] | None = None, **more: Any) -> bytes:
    """Return a chat request's body."""
    body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "hi"}], **more}
    return json.dumps(body | ({"sim": sim} if sim is not None else {})).encode()


def post(
    body: bytes, path: str = "/v1/chat/completions", *, more: str = "", version: str = "1.1", chunked: int = 0
) -> bytes:
    """Return a POST as bytes, its body in chunks of ``chunked`` bytes, if that is not 0."""
    head = f"POST {path} HTTP/{version}\r\nHost: gateway.test\r\nContent-Type: application/json\r\n{more}"
    if not chunked:
        return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    parts = [body[at : at + chunked] for at in range(0, len(body), chunked)]
    coded = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + coded + b"0\r\n\r\n"


async def send(stack: Stack, request: bytes, *, method: str = "POST") -> Answer:
    """Send one request on a connection of its own; return the answer, and wait for the end if it says so."""
    async with wire(stack) as client:
        await client.send(request)
        answer = await client.answer(method=method)
        if answer.end == "open" and answer.header("connection") == "close":
            answer.end = await client.end()
        return answer


async def echo(stack: Stack, body: bytes, *, more: str = "", **how: Any) -> dict[str, Any]:
    """Send a body to an engine that tells what it received; ``body`` in the outcome is bytes."""
    answer = await send(stack, post(body, "/v1/echo", more=more, **how))
    assert answer.status == 200, answer.body
    told: dict[str, Any] = answer.json()
    told["body"] = base64.b64decode(told["body"]) if told["body"] is not None else None
    told["names"] = {name.lower(): value for name, value in told["headers"]}
    assert len(told["names"]) == len(told["headers"])
    return told


def simulated(folder: Path, name: str, options: Options | None = None, **more: Any) -> dict[str, Any]:
    """Return a model's section for a simulated engine on the stack's device."""
    asked = msgspec.structs.replace(
        options if options is not None else Options(load_seconds=0.05, tokens=4),
        model=name,
        gpu_ledger=str(folder / "gpu.json"),
        gpu_bytes=6 * GIB,
        quiet=True,
    )
    return {"engine": "custom", "command": command(asked, host="{host}", port="{port}"), "concurrency": 4, **more}


def stack_of(folder: Path, models: dict[str, Any], *, engine: Options | None = None, **sections: Any) -> Stack:
    """Return a stack with the usual models and some more, all simulated."""
    usual = {name: simulated(folder, name, engine, aliases=[f"{name}-alias"]) for name in MODELS}
    device = {"kind": "simulated", "ledger": str(folder / "gpu.json"), **sections.pop("device", {})}
    return Stack(folder, models=usual | models, device=device, **sections)


async def metrics(stack: Stack) -> dict[str, float]:
    """Return every series of the gateway's metrics."""
    answer = await send(stack, b"GET /metrics HTTP/1.1\r\nHost: g\r\n\r\n", method="GET")
    assert answer.status == 200
    lines = [line.rpartition(" ") for line in answer.body.decode().splitlines() if not line.startswith("#")]
    assert len({series for series, _, _ in lines}) == len(lines)
    return {series: float(value) for series, _, value in lines}


def total(series: dict[str, float], name: str, **labels: str) -> float:
    """Return the sum of the series of a metric that have these labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        value
        for key, value in series.items()
        if key.partition("{")[0] == name and all(part in key.partition("{")[2] for part in wanted)
    )


def running(stack: Stack) -> Iterator[Stack]:
    """Run one stack for all tests of a file, whose event loops come and go; each test leaves it as it was."""
    asyncio.run(stack.start())
    try:
        yield stack
    finally:
        asyncio.run(stack.__aexit__())


async def engine_of(stack: Stack, model: str) -> str:
    """Return the base URL of a model's engine; makes it resident first."""
    answer = await send(stack, post(chat(model)))
    assert answer.status == 200, answer.body
    status = await stack.status()
    [found] = [i for i in status["instances"] if i["model"] == model and i["state"] == "ready"]
    return f"http://{found['host']}:{found['port']}"


async def stats(url: str) -> dict[str, Any]:
    """Return an engine's counts."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/sim/stats") as answer:
        counts: dict[str, Any] = (await answer.json())["stats"]
        return counts


async def counted(url: str, what: str, at_least: int = 1) -> None:
    """Wait until an engine has counted so many."""

    async def enough() -> bool:
        return bool((await stats(url))[what] >= at_least)

    await until(enough, f"{what} ≥ {at_least}")


async def fault(url: str, **behaviour: Any) -> None:
    """Say what goes wrong in an engine from now on; nothing ends it."""
    async with aiohttp.ClientSession() as session, session.post(f"{url}/sim/fault", json=behaviour) as answer:
        assert answer.status == 200, await answer.text()
