"""OpenAI's request and response shapes."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Collection
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from modelswap.engines.openvino_server.pipeline import Message, Params, Prompt, Result
from modelswap.protocol.errors import Code, ModelswapError

Kind = Literal["chat", "text"]
Tokens = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]


class Rejected(ModelswapError):
    """A request that can't be served as it is; ``param`` names the offending field, where one can be named."""

    def __init__(self, code: Code, message: str, param: str | None = None) -> None:
        super().__init__(message, code=code)
        self.param = param


class StreamOptions(msgspec.Struct):
    """``include_usage`` asks for a last chunk with the token counts."""

    include_usage: bool | None = None


class Common(msgspec.Struct, kw_only=True):
    """The fields that chat and text completions share; unknown ones are ignored, as OpenAI's own clients expect."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    n: int | None = None
    logprobs: bool | int | None = None
    logit_bias: dict[str, float] | None = None


class ChatTurn(msgspec.Struct):
    """A message as clients send it; ``content`` may be a list of parts."""

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Common, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatTurn], Meta(min_length=1)]
    max_completion_tokens: Tokens | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None


class TextRequest(Common, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[Any]
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A request that can be served, and the shape of its answer."""

    id: str
    created: int
    kind: Kind
    model: str
    prompt: Prompt
    params: Params
    stream: bool
    include_usage: bool


def parse(kind: Kind, body: bytes, names: Collection[str], max_tokens: int) -> Job:
    """Return the job that ``body`` asks for; ``max_tokens`` is the limit where it sets none. Raises `Rejected`."""
    request: ChatRequest | TextRequest
    try:
        request = msgspec.json.decode(body, type=ChatRequest) if kind == "chat" else _decode_text(body)
    except msgspec.ValidationError as error:
        place = re.search(r"at `\$\.?([^`]*)`", str(error)) or re.search(r"required field `([^`]*)`", str(error))
        raise Rejected(Code.BAD_REQUEST, str(error), place and place[1]) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Rejected(Code.INVALID_JSON, f"the request's body is not JSON: {error}") from None
    if not request.model:
        raise Rejected(Code.MISSING_MODEL, "the request names no model", "model")
    if request.model not in names:
        known = ", ".join(names)
        raise Rejected(Code.MODEL_NOT_FOUND, f"this engine serves {known}, not {request.model!r}", "model")
    _refuse_unsupported(request)
    prompt, limit = _chat(request) if isinstance(request, ChatRequest) else _text(request)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return Job(
        id=("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12),
        created=int(time.time()),
        kind=kind,
        model=request.model,
        prompt=prompt,
        params=Params(
            max_tokens=limit or max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k if request.top_k and request.top_k > 0 else None,
            seed=request.seed,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            stop=tuple(text for text in stop if text),
        ),
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
    )


def _decode_text(body: bytes) -> TextRequest:
    return msgspec.json.decode(body, type=TextRequest)


def _chat(request: ChatRequest) -> tuple[Prompt, int | None]:
    messages = tuple(Message(turn.role, _content(turn.content)) for turn in request.messages)
    return Prompt(messages=messages), request.max_completion_tokens or request.max_tokens


def _text(request: TextRequest) -> tuple[Prompt, int | None]:
    prompt = request.prompt
    if isinstance(prompt, list):
        if len(prompt) != 1 or not isinstance(prompt[0], str):
            raise Rejected(
                Code.BAD_REQUEST, "prompt must be one string; token lists and batches aren't taken", "prompt"
            )
        prompt = prompt[0]
    return Prompt(text=prompt), request.max_tokens


def _content(content: str | list[dict[str, Any]] | None) -> str:
    if not isinstance(content, list):
        return content or ""
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type")
            raise Rejected(Code.BAD_REQUEST, f"only text parts are understood, not {kind!r}", "messages")
    return "\n".join(part["text"] for part in content)


def _refuse_unsupported(request: ChatRequest | TextRequest) -> None:
    asked: dict[str, bool] = {
        "n": request.n not in {None, 1},
        "logprobs": request.logprobs is not None and request.logprobs is not False,
        "logit_bias": bool(request.logit_bias),
    }
    if isinstance(request, ChatRequest):
        asked["tools"] = bool(request.tools) and request.tool_choice != "none"
        asked["functions"] = bool(request.functions)
        asked["response_format"] = (request.response_format or {}).get("type", "text") != "text"
    else:
        asked["echo"] = bool(request.echo)
        asked["suffix"] = bool(request.suffix)
        asked["best_of"] = request.best_of not in {None, 1}
    for name, wanted in asked.items():
        if wanted:
            only = "; only n=1 is" if name == "n" else ""
            raise Rejected(Code.BAD_REQUEST, f"{name} is not supported by the openvino engine{only}", name)


def answer(job: Job, text: str, result: Result) -> bytes:
    """Return the body of a response that isn't streamed."""
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": result.finish}
    choice |= {"message": {"role": "assistant", "content": text}} if job.kind == "chat" else {"text": text}
    return msgspec.json.encode(_head(job, "chat.completion") | {"choices": [choice], "usage": usage(result)})


def first_event(job: Job) -> bytes:
    """Return what a stream begins with: in a chat, the role."""
    return _event(job, {"role": "assistant", "content": ""}) if job.kind == "chat" else b""


def text_event(job: Job, text: str) -> bytes:
    """Return the event that carries a piece of text."""
    return _event(job, {"content": text} if job.kind == "chat" else text)


def last_events(job: Job, result: Result) -> bytes:
    """Return what a stream ends with: the finish reason, the counts if asked for, and ``[DONE]``."""
    events = _event(job, {} if job.kind == "chat" else "", result.finish)
    if job.include_usage:
        events += sse(_head(job, "chat.completion.chunk") | {"choices": [], "usage": usage(result)})
    return events + b"data: [DONE]\n\n"


def sse(data: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def usage(result: Result) -> dict[str, int]:
    """Return the token counts in OpenAI's shape."""
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "total_tokens": result.prompt_tokens + result.completion_tokens,
    }


def _head(job: Job, chat_object: str) -> dict[str, Any]:
    kind = chat_object if job.kind == "chat" else "text_completion"
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model}


def _event(job: Job, delta: dict[str, str] | str, finish: str | None = None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
    choice |= {"delta": delta} if job.kind == "chat" else {"text": delta}
    chunk = _head(job, "chat.completion.chunk") | {"choices": [choice]}
    return sse(chunk | {"usage": None} if job.include_usage else chunk)
