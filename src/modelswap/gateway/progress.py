"""The event stream that a client is given while it waits: comments on its progress, and failures as events."""

from __future__ import annotations

from typing import Any

import msgspec

from modelswap.gateway.headers import ResponseHead, find
from modelswap.protocol import errors
from modelswap.protocol.errors import Code
from modelswap.protocol.messages import Progress


def comment(position: int, told: Progress | None) -> bytes:
    """Return one comment with the request's position, and stage, fraction and ETA where they are known."""
    words = [f": modelswap position={position}"]
    if told is not None:
        words.append(f"stage={told.stage}")
        if told.fraction is not None:
            words.append(f"progress={round(told.fraction * 100)}%")
        if told.eta_ms is not None:
            words.append(f"eta={-(-told.eta_ms // 1000)}s")
    return " ".join(words).replace("\n", " ").replace("\r", " ").encode() + b"\n\n"


def error_event(
    status: int,
    code: str,
    message: str,
    *,
    retry_after_ms: int | None = None,
    should_retry: bool | None = None,
) -> bytes:
    """Return a failure as an event: OpenAI's error shape, with the status and retry hints that headers would carry."""
    error: dict[str, Any] = msgspec.json.decode(errors.body(code, message))["error"]
    return _event(_with_hints(error, status, retry_after_ms, should_retry))


def code_event(code: Code, message: str) -> bytes:
    """Return a failure of our own as an event, with the table's status and hints."""
    outcome = errors.OUTCOMES[code]
    return error_event(
        outcome.status, code, message, retry_after_ms=outcome.retry_after_ms, should_retry=outcome.should_retry
    )


def stream_head(request_id: bytes, *, http10: bool, keep_alive: bool) -> bytes:
    """Return the head of our own event stream, which goes out before there is an engine."""
    framing = b"" if http10 else b"transfer-encoding: chunked\r\n"
    connection = b"" if keep_alive else b"connection: close\r\n"
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
        b"x-accel-buffering: no\r\nx-request-id: %b\r\n%b%b\r\n" % (request_id, framing, connection)
    )


def answer_event(head: ResponseHead, body: bytes) -> tuple[bytes, bool]:
    """Return an engine's answer that is no event stream as one event, and whether it is what the client asked for."""
    if head.encoded:
        return error_event(502, Code.INTERNAL, "The engine sent a compressed answer unasked"), False
    if 200 <= head.status < 300:
        return data_event(body), True
    return engine_error_event(head.status, body, find(head.lines, b"retry-after")), False


def engine_error_event(status: int, body: bytes, retry_after: bytes | None) -> bytes:
    """Return an engine's error response as an event, in the engine's own words as far as they can be read."""
    error: dict[str, Any] | None = None
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = None
    if isinstance(found, dict):
        inner = found.get("error")
        error = inner if isinstance(inner, dict) else found
    if error is None:
        text = body.decode("utf-8", "replace")[:2000] or f"The engine answered {status}"
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": text, "type": kind, "param": None, "code": status}
    wait = int(retry_after) * 1000 if retry_after is not None and retry_after.isdigit() else None
    return _event(_with_hints(error, status, wait, None))


def data_event(body: bytes) -> bytes:
    """Return any text as one event."""
    lines = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return b"".join(b"data: %b\n" % line for line in lines) + b"\n"


def _with_hints(
    error: dict[str, Any], status: int, retry_after_ms: int | None, should_retry: bool | None
) -> dict[str, Any]:
    hinted = {**error, "status": status}
    if retry_after_ms is not None:
        hinted["retry_after_ms"] = retry_after_ms
    if should_retry is not None:
        hinted["should_retry"] = should_retry
    return hinted


def _event(error: dict[str, Any]) -> bytes:
    return data_event(msgspec.json.encode({"error": error}))
