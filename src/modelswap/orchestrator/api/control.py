"""The endpoints that change something: all of them POST."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from modelswap.core import effects, events
from modelswap.orchestrator.api.failures import error_response
from modelswap.orchestrator.api.reading import disconnected, flag, json_body, text
from modelswap.orchestrator.service import Service
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.spec.errors import ConfigError


class Control:
    """Handlers over one `Service`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def ensure_model(self, request: Request) -> Response:
        """``POST /ensure_model {"model", "wait"}``: make a model resident; returns when it is."""
        body = await json_body(request)
        name = text(body, "model")
        if not name:
            raise ModelswapError("'model' is missing", code=Code.MISSING_MODEL)
        wait = flag(body, "wait", default=True)
        model = self._service.resolve(name)
        if not wait:
            number = self._service.answers.number()
            self._service.post(events.Ensure(at=self._service.clock(), request=number, model=model))
            return JSONResponse({"model": model, "status": "accepted"}, status_code=202)
        answer = await self._ask(
            request, lambda number: events.Ensure(at=self._service.clock(), request=number, model=model)
        )
        if answer is None:
            return Response(status_code=204)
        if answer.code is not None:
            return error_response(answer.code, answer.message, retry_after_ms=answer.retry_after_ms)
        return JSONResponse(
            {
                "model": answer.model,
                "previous_model": answer.previous,
                "mechanism": answer.mechanism,
                "seconds": round(answer.seconds, 6),
                "address": f"{answer.host}:{answer.port}",
                "status": "ready",
            }
        )

    async def unload(self, request: Request) -> Response:
        """``POST /unload {"model"}``: drain and stop a model, or without one all of them."""
        name = text(await json_body(request), "model")
        model = self._service.resolve(name) if name else None
        answer = await self._ask(
            request, lambda number: events.Unload(at=self._service.clock(), request=number, model=model)
        )
        if answer is None:
            return Response(status_code=204)
        if answer.code is not None:
            return error_response(answer.code, answer.message, retry_after_ms=answer.retry_after_ms)
        return JSONResponse(
            {
                "model": model,
                "previous_model": answer.previous,
                "mechanism": answer.mechanism,
                "seconds": round(answer.seconds, 6),
                "status": "unloaded",
            }
        )

    async def pin(self, request: Request) -> Response:
        """``POST /pin {"model", "pinned"}``: keep a model once it is there, or leave it for others again."""
        body = await json_body(request)
        name = text(body, "model")
        pinned = flag(body, "pinned", default=True)
        model = self._service.resolve(name) if name else None
        self._service.post(events.Pin(at=self._service.clock(), model=model, pinned=pinned))
        return JSONResponse({"model": model, "pinned": pinned, "status": "accepted"})

    async def calibrate(self, request: Request) -> Response:
        """``POST /calibrate {"model"}``: measure a model's ways in and out (without one: every model's)."""
        name = text(await json_body(request), "model")
        config = self._service.configured.config
        models = [self._service.resolve(name)] if name else [m for m, s in config.models.items() if s.device == "gpu"]
        measured: list[dict[str, Any]] = []

        async def work() -> None:
            measured.extend(await self._service.calibrator.calibrate(*models))

        await self._first(request, work())
        return JSONResponse({"models": models, "measurements": measured, "status": "calibrated"})

    async def reload(self, request: Request) -> Response:
        """``POST /reload``: read the config file again."""
        await json_body(request)
        try:
            changes = await self._service.reload()
        except ConfigError as error:
            return error_response(Code.BAD_REQUEST, f"the config stays as it was: {error}")
        return JSONResponse({"status": "reloaded", **changes})

    async def shutdown(self, request: Request) -> Response:
        """``POST /shutdown {"now"}``: drain and stop everything; returns when nothing runs any more."""
        now = flag(await json_body(request), "now", default=False)
        self._service.post(events.Shutdown(at=self._service.clock(), now=now))
        await self._first(request, self._service.finished.wait())
        return JSONResponse({"status": "finished"})

    async def _ask(self, request: Request, event: Callable[[int], events.Event]) -> effects.Answer | None:
        """Put a question to the scheduler; None if the client has gone, and the question with it."""
        answers = self._service.answers
        number, answer = answers.expect()
        try:
            self._service.post(event(number))
            await self._first(request, asyncio.wait([answer]))
            return answer.result() if answer.done() else None
        finally:
            if answers.forget(number):
                self._service.post(events.Withdraw(at=self._service.clock(), request=number))

    async def _first(self, request: Request, work: Coroutine[Any, Any, object]) -> None:
        """Wait for ``work`` for as long as the client is there; raises `ModelswapError` if we are to end."""
        wanted = asyncio.create_task(work)
        gone = asyncio.create_task(disconnected(request))
        ending = asyncio.create_task(self._service.ending.wait())
        tasks = (wanted, gone, ending)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if ending.done() and not wanted.done():
                raise ModelswapError("the orchestrator is going away; ask the next one", code=Code.ORCHESTRATOR_AWAY)
            if wanted.done():
                await wanted  # raises what went wrong
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
