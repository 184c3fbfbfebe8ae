"""The endpoints that go on: events, and logs as they are written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from modelswap.orchestrator.api.reading import number, switch
from modelswap.orchestrator.feed import Item
from modelswap.orchestrator.hosting import redacted
from modelswap.orchestrator.service import Service

HEARTBEAT: Final = 15.0
MOST_LINES: Final = 10_000
FOLLOWED_LINES: Final = 2_000
_LOOK_EVERY: Final = 0.25


class Streams:
    """Handlers over one `Service`."""

    def __init__(self, service: Service, heartbeat: float = HEARTBEAT) -> None:
        self._service = service
        self._heartbeat = heartbeat

    async def events(self, request: Request) -> Response:
        """``GET /events``: server-sent events; ``Last-Event-ID`` takes up where a connection broke off."""
        last = request.headers.get("last-event-id") or request.query_params.get("after") or ""
        after = int(last[:18]) if last.isascii() and last.isdigit() else None
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._events(after), media_type="text/event-stream", headers=headers)

    async def _events(self, after: int | None) -> AsyncIterator[bytes]:
        with self._service.feed.subscribe(after) as queue:
            yield b": modelswap events\n\n"
            while True:
                try:
                    async with asyncio.timeout(self._heartbeat):
                        item = await queue.get()
                except TimeoutError:
                    yield b": alive\n\n"
                    continue
                if item is None:
                    yield b": closed; come back with Last-Event-ID\n\n"
                    return
                yield _frame(item)

    async def logs(self, request: Request) -> Response:
        """``GET /logs/{model}``: the last lines of the model's newest instance, as plain text."""
        model = self._service.resolve(request.path_params["model"])
        lines = number(request, "lines", 100, MOST_LINES)
        if switch(request, "follow"):
            headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
            return StreamingResponse(self._followed(model, lines), media_type="text/plain", headers=headers)
        tail = await self._tail(model, lines)
        return PlainTextResponse("".join(f"{line}\n" for line in tail))

    async def _followed(self, model: str, lines: int) -> AsyncIterator[bytes]:
        before = await self._tail(model, FOLLOWED_LINES)
        shown = before[-lines:] if lines else []
        # Something at once, so that the client knows it is connected.
        yield "".join(f"{line}\n" for line in shown).encode()
        while not self._service.ending.is_set():
            await asyncio.sleep(_LOOK_EVERY)
            now = await self._tail(model, FOLLOWED_LINES)
            new = added(before, now)
            before = now
            if new:
                yield "".join(f"{line}\n" for line in new).encode()

    async def _tail(self, model: str, lines: int) -> list[str]:
        tail = await self._service.outside.runtime.log_tail(model, lines)
        spec = self._service.configured.config.models.get(model)
        return tail if spec is None else redacted(tail, spec)


def added(before: list[str], now: list[str]) -> list[str]:
    """Return what is at the end of ``now`` that wasn't in ``before``, both the last lines of the same log."""
    for dropped in range(len(before)):
        kept = len(before) - dropped
        if kept <= len(now) and before[dropped:] == now[:kept]:
            return now[kept:]
    return now


def _frame(item: Item) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (item.id, item.kind.encode(), item.data)
