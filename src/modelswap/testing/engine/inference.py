"""Requests to the model: how they are checked, run, answered, and spoilt on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import msgspec

from modelswap.testing.engine import answers
from modelswap.testing.engine.admission import Admission
from modelswap.testing.engine.answers import Voice
from modelswap.testing.engine.behaviour import Behaviour, overlay
from modelswap.testing.engine.options import Options
from modelswap.testing.engine.slumber import Slumber
from modelswap.testing.engine.stats import Stats
from modelswap.testing.engine.wire import Connection, Framing, Request

CHAT: Final = "/v1/chat/completions"
TEXT: Final = "/v1/completions"
EMBEDDINGS: Final = "/v1/embeddings"
ECHO: Final = "/v1/echo"
PATHS: Final = frozenset((CHAT, TEXT, EMBEDDINGS, ECHO))

_JSON: Final = ("content-type", "application/json")
_SSE: Final = ("content-type", "text/event-stream; charset=utf-8")


class Refused(Exception):
    """The request is answered with an error of this status and body."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.body = body


class Inference:
    """Answers the paths in `PATHS`. ``crash`` ends the engine and never returns."""

    def __init__(
        self,
        options: Options,
        voice: Voice,
        admission: Admission,
        slumber: Slumber,
        stats: Stats,
        crash: Callable[[Behaviour], Awaitable[None]],
    ) -> None:
        self._options = options
        self._voice = voice
        self._admission = admission
        self._slumber = slumber
        self._stats = stats
        self._crash = crash

    async def answer(self, request: Request, connection: Connection, faults: Behaviour) -> None:
        """Answer one request under the engine's ``faults``, with those of its body's ``sim`` on top."""
        self._stats.requests += 1
        behaviour = faults
        try:
            body = self._read(request)
            behaviour = overlay(faults, _asked(body))
            if behaviour.idle_timeout is not None:
                connection.idle_timeout = behaviour.idle_timeout
            if behaviour.drop == "reused" and request.nth:
                connection.abort()
                return
            async with self._admission.admitted():
                await self._before_first_byte(connection, behaviour)
                if behaviour.status is not None:
                    message = behaviour.message or f"simulated error {behaviour.status}"
                    raise Refused(behaviour.status, answers.error(message, "SimulatedError", behaviour.status))
                if body.get("stream") and request.path in (CHAT, TEXT):
                    await self._stream(request, connection, body, behaviour)
                else:
                    await self._whole(request, connection, body, behaviour)
            self._stats.answered += 1
        except Refused as refused:
            await self._send(connection, refused.status, refused.body, behaviour)
        except asyncio.CancelledError:
            self._stats.cancelled += connection.left
            raise

    def _read(self, request: Request) -> dict[str, Any]:
        try:
            body = msgspec.json.decode(request.body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if request.path == ECHO:
                return {}
            raise Refused(400, answers.error(f"bad JSON: {error}", "BadRequestError", 400)) from None
        if not isinstance(body, dict):
            raise Refused(400, answers.error("the body is no JSON object", "BadRequestError", 400))
        model = body.get("model", "" if request.path != ECHO else self._voice.model)
        if model not in self._voice.names:
            self._stats.misrouted += 1
            message = f"The model `{model}` does not exist. This is {self._voice.model}, {self._voice.instance}."
            raise Refused(404, answers.error(message, "NotFoundError", 404, "model"))
        return body

    async def _before_first_byte(self, connection: Connection, behaviour: Behaviour) -> None:
        if behaviour.first_token_seconds:
            await asyncio.sleep(behaviour.first_token_seconds)
        await self._strike("first_byte", connection, behaviour)

    async def _strike(self, where: str, connection: Connection, behaviour: Behaviour) -> None:
        """Do what was to go wrong here; returns only if nothing was."""
        if behaviour.hang == where:
            await _forever()
        if behaviour.crash == where:
            await self._crash(behaviour)
        if behaviour.drop == where:
            connection.hang_up()
            await _forever()

    async def _whole(
        self, request: Request, connection: Connection, body: dict[str, Any], behaviour: Behaviour
    ) -> None:
        prompt = _prompt_tokens(request)
        match request.path:
            case "/v1/echo":
                answer = self._voice.echo(request)
            case "/v1/embeddings":
                given = body.get("input", "")
                answer = self._voice.embeddings(given if isinstance(given, list) else [given], prompt)
            case _:
                count, finish = self._length(body, behaviour)
                pieces: list[str] = []
                async for piece in self._paced(count, behaviour, _greedy(body)):
                    if piece is None:
                        finish = "abort"
                        break
                    pieces.append(piece)
                answer = self._voice.completion(
                    chat=request.path == CHAT,
                    pieces=pieces,
                    finish=finish,
                    prompt=prompt,
                    logprobs=bool(body.get("logprobs")),
                )
        await self._send(connection, 200, answer, behaviour)

    async def _stream(
        self, request: Request, connection: Connection, body: dict[str, Any], behaviour: Behaviour
    ) -> None:
        framing: Framing = behaviour.framing or "chunked"
        # A stream's length isn't known before its end.
        framing = "close" if request.version == "1.0" or framing == "length" else framing
        await connection.start(
            200,
            [_SSE, *self._names()],
            framing=framing,
            close=behaviour.connection_close,
            trickle=behaviour.slow_headers,
        )
        sent = 0
        async for event in self._events(request, body, behaviour):
            if sent == behaviour.after:
                await self._strike("stream", connection, behaviour)
            await connection.send(event)
            sent += 1
        connection.finish()

    async def _events(self, request: Request, body: dict[str, Any], behaviour: Behaviour) -> AsyncIterator[bytes]:
        chat = request.path == CHAT
        envelope = self._voice.envelope("chat.completion.chunk" if chat else "text_completion")
        count, finish = self._length(body, behaviour)
        if chat:
            yield answers.chunk(envelope, chat=True, piece=None, finish=None)
        done = 0
        async for piece in self._paced(count, behaviour, _greedy(body)):
            if piece is None:
                finish = "abort"
                break
            yield answers.chunk(envelope, chat=chat, piece=piece, finish=None)
            done += 1
        yield answers.chunk(envelope, chat=chat, piece=None, finish=finish)
        options = body.get("stream_options") or {}
        if options.get("include_usage"):
            yield answers.event(envelope | {"choices": [], "usage": answers.usage(_prompt_tokens(request), done)})
        yield b"data: [DONE]\n\n"

    async def _paced(self, count: int, behaviour: Behaviour, anonymous: bool) -> AsyncIterator[str | None]:
        """Yield pieces at the set rate; None instead of the rest when the engine aborts what runs."""
        rate = behaviour.tokens_per_second
        rate = self._options.tokens_per_second if rate is None else rate
        clock = asyncio.get_running_loop().time
        begun = clock()
        wrong = behaviour.wrong or self._slumber.garbage
        pieces = self._voice.pieces(count, wrong=wrong, first_bytes=behaviour.event_bytes, anonymous=anonymous)
        for index, piece in enumerate(pieces):
            if rate and (early := begun + index / rate - clock()) > 0:
                await asyncio.sleep(early)
            if not await self._admission.may_go_on():
                yield None
                return
            yield piece

    def _length(self, body: dict[str, Any], behaviour: Behaviour) -> tuple[int, str]:
        count = self._options.tokens if behaviour.tokens is None else behaviour.tokens
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        return (limit, "length") if isinstance(limit, int) and limit < count else (count, "stop")

    async def _send(self, connection: Connection, status: int, answer: bytes, behaviour: Behaviour) -> None:
        await connection.start(
            status,
            [_JSON, *self._names()],
            framing=behaviour.framing or "length",
            length=len(answer),
            close=behaviour.connection_close,
            trickle=behaviour.slow_headers,
        )
        if "stream" in (behaviour.hang, behaviour.crash, behaviour.drop):
            half = len(answer) // 2
            await connection.send(answer[:half])
            await self._strike("stream", connection, behaviour)
        await connection.send(answer)
        connection.finish()

    def _names(self) -> list[tuple[str, str]]:
        return [("x-sim-model", self._voice.model), ("x-sim-instance", self._voice.instance)]


def _asked(body: dict[str, Any]) -> Behaviour:
    try:
        return msgspec.convert(body.get("sim") or {}, Behaviour)
    except msgspec.ValidationError as error:
        raise Refused(400, answers.error(f"sim: {error}", "BadRequestError", 400, "sim")) from None


def _greedy(body: dict[str, Any]) -> bool:
    """Return whether a request wants the answer that every instance would give."""
    return body.get("temperature") == 0 and body.get("seed") is not None


def _prompt_tokens(request: Request) -> int:
    return len(request.body) // 4 + 1


async def _forever() -> None:
    await asyncio.get_running_loop().create_future()
