"""A gateway worker between hand-written engines, clients that speak bytes, and an orchestrator that does as told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from modelswap.gateway.worker import Worker, listen
from modelswap.protocol.codec import decode_from_gateway, encode
from modelswap.protocol.messages import (
    Catalog,
    CatalogModel,
    Close,
    Epoch,
    GatewayMessage,
    Heartbeat,
    Hello,
    Limits,
    Open,
    OrchestratorMessage,
)
from modelswap.spec.config import Config, Gateway, Model, Scheduling
from modelswap.spec.config import Orchestrator as OrchestratorSection
from modelswap.testing.waiting import until

PATIENCE = 30.0
MODEL = CatalogModel(name="mistral", aliases=("mistral-7b",), adapters=("mistral-lora",), engine="custom")
OTHER = CatalogModel(name="coder", upstream_name="served-coder", adapters=("coder-lora",), engine="custom")

M = TypeVar("M")


class Orchestrator:
    """Answers hello with a catalog and heartbeats with the same; says all else only when told to."""

    def __init__(self) -> None:
        self.said: list[GatewayMessage] = []
        self.connections: list[ServerConnection] = []
        self.authorization: list[str | None] = []
        self.models: tuple[CatalogModel, ...] = (MODEL, OTHER)
        self.term_ms = 60_000
        self.limits = Limits(queue_timeout_ms=60_000, queue_requests=100, queue_bytes=1 << 30)
        self.answers_hello = True
        self.answers_heartbeats = True
        self.on_hello: list[OrchestratorMessage] = []
        self._server: Server | None = None
        self.port = 0

    async def start(self, port: int = 0) -> None:
        """Listen."""
        self._server = await serve(self._talk, "127.0.0.1", port)
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        """End with all connections."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    def catalog(self) -> Catalog:
        """Return what is said to a hello."""
        return Catalog(generation=1, term_ms=self.term_ms, limits=self.limits, models=self.models)

    async def say(self, message: OrchestratorMessage) -> None:
        """Say something on the newest connection."""
        await self.connections[-1].send(encode(message), text=True)

    async def open(self, engine: Engine, *, model: str = "mistral", n: int = 1, **more: Any) -> Open:
        """Open a lease on an engine."""
        more.setdefault("slots", 8)
        opened = Open(model=model, epoch=Epoch(1, n), host="127.0.0.1", port=engine.port, **more)
        await self.say(opened)
        return opened

    async def close(self, *, model: str = "mistral", n: int = 1, abort: bool = False) -> None:
        """Close a lease."""
        await self.say(Close(model=model, epoch=Epoch(1, n), abort=abort))

    def heard(self, kind: type[M]) -> list[M]:
        """Return what the gateway said of one kind."""
        return [message for message in self.said if isinstance(message, kind)]

    async def hears(self, kind: type[M], n: int = 1) -> M:
        """Return the n-th message of a kind, once it is said."""
        await until(lambda: len(self.heard(kind)) >= n, patience=PATIENCE)
        return self.heard(kind)[n - 1]

    async def _talk(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        self.authorization.append(connection.request.headers.get("Authorization"))
        self.connections.append(connection)
        try:
            async for frame in connection:
                message = decode_from_gateway(frame)
                self.said.append(message)
                if isinstance(message, Hello) and self.answers_hello:
                    for answer in (self.catalog(), *self.on_hello):
                        await connection.send(encode(answer), text=True)
                elif isinstance(message, Heartbeat) and self.answers_heartbeats:
                    await connection.send(encode(message), text=True)
        except ConnectionClosed:
            pass


class Request:
    """What an engine received."""

    def __init__(self, raw_head: bytes, body: bytes, connection: EngineConnection) -> None:
        lines = raw_head.decode("latin-1").split("\r\n")
        self.line = lines[0]
        self.headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
        self.body = body
        self.connection = connection

    def header(self, name: str) -> str | None:
        """Return a header's value."""
        return dict(self.headers).get(name)


class EngineConnection(asyncio.Protocol):
    """One connection to a hand-written engine."""

    transport: asyncio.Transport

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._buffer = b""
        self.closed = asyncio.Event()
        self.drained = asyncio.Event()
        self.drained.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count it."""
        self.transport = cast("asyncio.Transport", transport)
        self._engine.connections.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note it."""
        self.closed.set()
        self.drained.set()

    def pause_writing(self) -> None:
        """Note that the gateway reads no more."""
        self.drained.clear()

    def resume_writing(self) -> None:
        """Note that it reads on."""
        self.drained.set()

    def write(self, data: bytes) -> None:
        """Send bytes, whatever they are."""
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        """Hand whole requests to the script."""
        self._buffer += data
        while True:
            head, mark, rest = self._buffer.partition(b"\r\n\r\n")
            if not mark:
                return
            request = Request(head, b"", self)
            length = int(request.header("content-length") or 0)
            if len(rest) < length:
                return
            request.body = rest[:length]
            self._buffer = rest[length:]
            self._engine.requests.append(request)
            self._engine.tasks.append(asyncio.ensure_future(self._engine.script(request)))


Script = Callable[[Request], Awaitable[None]]


class Engine:
    """A hand-written engine: ``script`` is run for each request."""

    def __init__(self, script: Script | None = None) -> None:
        self.script: Script = script or replies(b'{"ok":true}')
        self.requests: list[Request] = []
        self.connections: list[EngineConnection] = []
        self.tasks: list[asyncio.Future[None]] = []
        self.port = 0
        self._server: asyncio.Server | None = None

    async def start(self, port: int = 0) -> Engine:
        """Listen."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: EngineConnection(self), "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def refuse(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def stop(self) -> None:
        """End with all connections."""
        self.refuse()
        for connection in self.connections:
            connection.transport.abort()
        for connection in self.connections:
            await connection.closed.wait()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def request(self, n: int = 1) -> Request:
        """Return the n-th request, once it is there."""
        await until(lambda: len(self.requests) >= n, patience=PATIENCE)
        return self.requests[n - 1]


def response(body: bytes, *, status: str = "200 OK", kind: str = "application/json", more: str = "") -> bytes:
    """Return a whole response."""
    return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{more}\r\n".encode() + body


def replies(body: bytes, **more: Any) -> Script:
    """Return a script that answers everything with one body."""

    async def script(request: Request) -> None:
        request.connection.write(response(body, **more))

    return script


SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """Return one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def in_two(go: asyncio.Event) -> Script:
    """Return a script that streams one event at once, and another one and the end when ``go`` is set."""

    async def script(request: Request) -> None:
        request.connection.write(SSE_HEAD + chunk(b"data: 1\n\n"))
        await go.wait()
        request.connection.write(chunk(b"data: 2\n\n") + b"0\r\n\r\n")

    return script


class Response:
    """What a client received. ``raw`` is the body as it came, chunk framing and all."""

    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes, raw: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.raw = raw

    def header(self, name: str) -> str | None:
        """Return a header's value."""
        return dict(self.headers).get(name)

    def json(self) -> Any:
        """Return the body's content."""
        return msgspec.json.decode(self.body)

    @property
    def code(self) -> str:
        """The error's code."""
        return str(self.json()["error"]["code"])


class Wire:
    """A client's connection, at the level of bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, list[tuple[str, str]]]:
        """Return a response's status and headers."""
        async with asyncio.timeout(PATIENCE):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        lines = raw[:-4].decode("latin-1").split("\r\n")
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
        return int(lines[0].split(" ")[1]), headers

    async def response(self, *, has_body: bool = True) -> Response:
        """Return a whole response."""
        status, headers = await self.head()
        known = dict(headers)
        body = raw = b""
        async with asyncio.timeout(PATIENCE):
            if not has_body:
                pass
            elif "content-length" in known:
                body = raw = await self.reader.readexactly(int(known["content-length"]))
            elif known.get("transfer-encoding") == "chunked":
                while size := await self.chunk():
                    raw += chunk(size)
                    body += size
                raw += b"0\r\n\r\n"
            else:
                body = raw = await self.reader.read()
        return Response(status, headers, body, raw)

    async def chunk(self) -> bytes:
        """Return one chunk's content; empty at the end."""
        async with asyncio.timeout(PATIENCE):
            size = int((await self.reader.readuntil(b"\r\n")).partition(b";")[0], 16)
            data = await self.reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def cut(self) -> bytes:
        """Return what all chunks carry until the connection ends, which it must before the body does."""
        out = b""
        while True:
            try:
                piece = await self.chunk()
            except asyncio.IncompleteReadError as error:
                return out + error.partial
            assert piece, "the body has ended properly"
            out += piece

    async def rest(self) -> bytes:
        """Return everything until the connection ends; raises `ConnectionResetError` if it is reset."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.read()

    async def until(self, mark: bytes) -> bytes:
        """Return everything up to and with ``mark``."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readuntil(mark)

    async def rest_after_answer(self) -> bytes:
        """Return everything up to the end of one answer, however it ends."""
        out = b""
        async with asyncio.timeout(PATIENCE):
            while not _whole(out):
                try:
                    data = await self.reader.read(65536)
                except ConnectionResetError:
                    return out
                if not data:
                    return out
                out += data
        return out

    async def close(self) -> None:
        """Leave."""
        self.writer.close()
        with contextlib.suppress(OSError):  # it may have been reset
            await self.writer.wait_closed()


def _whole(answer: bytes) -> bool:
    head, mark, body = answer.partition(b"\r\n\r\n")
    if not mark:
        return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line[15:])
    return body.endswith(b"0\r\n\r\n")


def post(body: bytes, *, path: str = "/v1/chat/completions", more: str = "", version: str = "1.1") -> bytes:
    """Return a request."""
    return (
        f"POST {path} HTTP/{version}\r\nHost: gateway\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{more}\r\n"
    ).encode() + body


def ask(model: str = "mistral", **more: Any) -> bytes:
    """Return a request's body."""
    return msgspec.json.encode({"model": model, **more})


class Rig:
    """Everything together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.orchestrator = Orchestrator()
        self.engines: list[Engine] = []
        self.wires: list[Wire] = []
        self.stop = asyncio.Event()
        self.port = 0
        self._running: list[tuple[asyncio.Task[None], asyncio.Event]] = []
        self.workers: list[Worker] = []
        self.uncaught: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.uncaught.append(context))

    @property
    def worker(self) -> Worker:
        """The first worker."""
        return self.workers[0]

    async def start(self, *, orchestrator: bool = True, scheduling: Scheduling | None = None, **gateway: Any) -> Rig:
        """Start orchestrator and one worker; ``gateway`` is its section of the config file."""
        if orchestrator:
            await self.orchestrator.start()
        await self.start_worker(scheduling=scheduling, **gateway)
        if orchestrator:
            await until(lambda: self.worker.admission.catalog is not None, patience=PATIENCE)
        return self

    async def start_worker(self, *, scheduling: Scheduling | None = None, **gateway: Any) -> Worker:
        """Start a worker; all but the first have ports of their own."""
        config = Config(
            models={
                "mistral": Model(engine="custom", command=["unused"], aliases=["mistral-7b"]),
                "coder": Model(engine="custom", command=["unused"]),
            },
            gateway=Gateway(port=0, **gateway),
            orchestrator=OrchestratorSection(state_dir=self.folder),
            scheduling=scheduling or Scheduling(),
        )
        ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        stop = self.stop if not self._running else asyncio.Event()
        url = f"http://127.0.0.1:{self.orchestrator.port or 9}"
        worker = Worker(config, len(self.workers), url, "secret-token", self.folder / "metrics")
        running = worker.run(listen("127.0.0.1", 0), ready.set_result, stop)
        self._running.append((asyncio.create_task(running), stop))
        self.workers.append(worker)
        port = await ready
        self.port = self.port or port
        return worker

    async def engine(self, script: Script | None = None, **more: Any) -> Engine:
        """Start an engine and open a lease on it, unless ``lease`` is False."""
        lease = more.pop("lease", True)
        engine = await Engine(script).start()
        self.engines.append(engine)
        if lease:
            await self.lease(engine, **more)
        return engine

    async def lease(self, engine: Engine, *, model: str = "mistral", n: int = 1, **more: Any) -> None:
        """Open a lease, and wait until the worker has it."""
        await self.orchestrator.open(engine, model=model, n=n, **more)
        await until(
            lambda: any(lease.model == model and lease.epoch == Epoch(1, n) for lease in self.worker.admission.leases),
            patience=PATIENCE,
        )

    async def wire(self) -> Wire:
        """Connect a client."""
        wire = Wire(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 22))
        self.wires.append(wire)
        return wire

    async def call(self, data: bytes, *, has_body: bool = True) -> Response:
        """Send one request on a connection of its own, and return the response."""
        wire = await self.wire()
        await wire.send(data)
        return await wire.response(has_body=has_body)

    async def get(self, path: str) -> Response:
        """GET a path."""
        return await self.call(f"GET {path} HTTP/1.1\r\nHost: gateway\r\n\r\n".encode())

    async def ended(self) -> None:
        """Return when the first worker has stopped by itself."""
        async with asyncio.timeout(PATIENCE):
            await self._running[0][0]

    def in_flight(self) -> int:
        """Return how many requests run, as the first worker's admission has it."""
        return sum(lease.in_flight for lease in self.worker.admission.leases)

    async def close(self) -> None:
        """Stop everything; what the gateway still runs is cut."""
        for wire in self.wires:
            await wire.close()
        for engine in self.engines:
            await engine.stop()
        for task, stop in self._running:
            stop.set()
            async with asyncio.timeout(PATIENCE):
                await task
        await self.orchestrator.stop()
        assert not self.uncaught, self.uncaught
