"""What a client that waits for its model is told meanwhile: comments in the event stream it asked for."""

from __future__ import annotations

from typing import Any

import msgspec

from modelswap.protocol import errors
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
