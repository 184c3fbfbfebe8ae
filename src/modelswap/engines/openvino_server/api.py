"""The HTTP side: OpenAI's endpoints, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Lifespan, Receive, Scope, Send

from modelswap.engines.openvino_server import wire
from modelswap.engines.openvino_server.worker import Worker
from modelswap.protocol.errors import OUTCOMES, Code, ModelswapError, body, retry_headers

T = TypeVar("T")

# What a client that has gone would be told; nobody reads it.
GONE = 499


class Api:
    """Serves one model under ``names``; ``max_tokens`` is the limit of requests that set none."""

    def __init__(self, worker: Worker, names: Sequence[str], max_tokens: int, started: int) -> None:
        self._worker = worker
        self._names = tuple(names)
        self._max_tokens = max_tokens
        self._started = started

    def app(self, lifespan: Lifespan[Starlette] | None = None) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            lifespan=lifespan,
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._text, methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/metrics", self._metrics, methods=["GET"]),
            ],
            exception_handlers={ModelswapError: _on_error, HTTPException: _on_http_error},
        )

    async def _chat(self, request: Request) -> Response:
        return await self._complete("chat", request)

    async def _text(self, request: Request) -> Response:
        return await self._complete("text", request)

    async def _complete(self, kind: wire.Kind, request: Request) -> Response:
        try:
            raw = await request.body()
        except ClientDisconnect:
            return Response(status_code=GONE)
        job = wire.parse(kind, raw, self._names, self._max_tokens)
        if self._worker.pipeline is None:
            raise ModelswapError("the model is still loading", code=Code.MODEL_START_FAILED, retry_after_ms=1000)
        if job.stream:
            return EventStream(self._worker, job)
        pieces: list[str] = []
        result = await while_connected(request.receive, self._worker.run(job.prompt, job.params, pieces.append))
        if result is None:
            return Response(status_code=GONE)
        return _json(wire.answer(job, "".join(pieces), result))

    async def _models(self, request: Request) -> Response:
        models = [
            {"id": name, "object": "model", "created": self._started, "owned_by": "modelswap"} for name in self._names
        ]
        return _json(msgspec.json.encode({"object": "list", "data": models}))

    async def _health(self, request: Request) -> Response:
        if self._worker.pipeline is None:
            return _json(b'{"status":"loading"}', 503)
        return _json(b'{"status":"ok"}')

    async def _metrics(self, request: Request) -> Response:
        lines = [
            "# HELP openvino_requests_running Requests generating now.",
            "# TYPE openvino_requests_running gauge",
            f"openvino_requests_running {self._worker.running}",
            "# HELP openvino_requests_waiting Requests waiting for their turn.",
            "# TYPE openvino_requests_waiting gauge",
            f"openvino_requests_waiting {self._worker.waiting}",
        ]
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


class EventStream(Response):
    """Generates while it is sent.

    The head goes out with the first text, so that whatever fails before it is answered with a status of its own.
    """

    def __init__(self, worker: Worker, job: wire.Job) -> None:
        super().__init__(headers={"cache-control": "no-store"}, media_type="text/event-stream")
        # Response took its own empty body's length for the stream's.
        del self.headers["content-length"]
        self._worker = worker
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; stop generating when the client goes."""
        await while_connected(receive, self._stream(scope, receive, send))

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        generation = asyncio.create_task(self._worker.run(self._job.prompt, self._job.params, pieces.put_nowait))
        generation.add_done_callback(lambda _: pieces.put_nowait(None))
        started = False
        try:
            while (piece := await pieces.get()) is not None:
                if not started:
                    await self._start(send)
                    started = True
                await _send(send, wire.text_event(self._job, piece))
            result = await generation
        except ModelswapError as error:
            if not started:
                await _error_response(error)(scope, receive, send)
                return
            await _send(send, b"data: " + body(error.code, str(error)) + b"\n\n", more=False)
            return
        finally:
            generation.cancel()
            await asyncio.wait([generation])
        if not started:
            await self._start(send)
        await _send(send, wire.last_events(self._job, result), more=False)

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if first := wire.first_event(self._job):
            await _send(send, first)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the work's result; once the client has gone, cancel the work, wait for its end and return None."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, data: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


def _json(content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(content, status, headers, media_type="application/json")


def _error_response(error: ModelswapError) -> Response:
    outcome = OUTCOMES[error.code]
    after = error.retry_after_ms if error.retry_after_ms is not None else outcome.retry_after_ms
    headers = dict(retry_headers(after, outcome.should_retry))
    return _json(body(error.code, str(error), param=getattr(error, "param", None)), outcome.status, headers)


async def _on_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ModelswapError):
        raise error
    return _error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    code = Code.METHOD_NOT_ALLOWED if error.status_code == 405 else Code.NOT_FOUND
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _json(body(code, message), error.status_code, dict(error.headers or {}))
