"""The one table from domain failures to what HTTP clients see.

Domain errors carry a `Code` and know nothing of HTTP; both services answer through `OUTCOMES` and `body`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

import msgspec


class Code(StrEnum):
    """What went wrong, as clients read it in ``error.code``."""

    BAD_REQUEST = "bad_request"
    INVALID_JSON = "invalid_json"
    MISSING_MODEL = "missing_model"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    REQUEST_TIMEOUT = "request_timeout"
    BODY_TOO_LARGE = "body_too_large"
    HEADERS_TOO_LARGE = "headers_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    MODEL_START_FAILED = "model_start_failed"
    MODEL_BROKEN = "model_broken"
    SWAP_TIMEOUT = "swap_timeout"
    MEMORY_NOT_RELEASED = "memory_not_released"
    DEVICE_STUCK = "device_stuck"
    MODEL_PINNED = "model_pinned"
    DRAIN_ABORTED = "drain_aborted"
    ENGINE_DIED = "engine_died"
    ORCHESTRATOR_AWAY = "orchestrator_away"
    SHUTTING_DOWN = "shutting_down"
    INTERNAL = "internal_error"


class Outcome(msgspec.Struct, frozen=True):
    """How a `Code` looks over HTTP.

    ``should_retry`` becomes ``x-should-retry`` where clients would otherwise guess wrong; None leaves it to them.
    ``retry_after_ms`` is what ``Retry-After`` says when nothing better was measured.
    """

    status: int
    type: str
    should_retry: bool | None = None
    retry_after_ms: int | None = None


OUTCOMES: Final[dict[Code, Outcome]] = {
    Code.BAD_REQUEST: Outcome(400, "invalid_request_error"),
    Code.INVALID_JSON: Outcome(400, "invalid_request_error"),
    Code.MISSING_MODEL: Outcome(400, "invalid_request_error"),
    Code.MODEL_NOT_FOUND: Outcome(404, "invalid_request_error"),
    Code.NOT_FOUND: Outcome(404, "invalid_request_error"),
    Code.METHOD_NOT_ALLOWED: Outcome(405, "invalid_request_error"),
    Code.REQUEST_TIMEOUT: Outcome(408, "invalid_request_error"),
    Code.BODY_TOO_LARGE: Outcome(413, "invalid_request_error"),
    Code.HEADERS_TOO_LARGE: Outcome(431, "invalid_request_error"),
    Code.UNSUPPORTED_MEDIA_TYPE: Outcome(415, "invalid_request_error"),
    Code.UNAUTHORIZED: Outcome(401, "authentication_error"),
    Code.FORBIDDEN: Outcome(403, "permission_error"),
    Code.QUEUE_FULL: Outcome(503, "server_error", retry_after_ms=5_000),
    Code.QUEUE_TIMEOUT: Outcome(504, "server_error"),
    Code.MODEL_START_FAILED: Outcome(503, "server_error", retry_after_ms=5_000),
    Code.MODEL_BROKEN: Outcome(503, "server_error", should_retry=False),
    Code.SWAP_TIMEOUT: Outcome(504, "server_error"),
    Code.MEMORY_NOT_RELEASED: Outcome(503, "server_error", retry_after_ms=10_000),
    Code.DEVICE_STUCK: Outcome(503, "server_error", should_retry=False),
    Code.MODEL_PINNED: Outcome(503, "server_error", should_retry=False),
    Code.DRAIN_ABORTED: Outcome(503, "server_error", retry_after_ms=1_000),
    Code.ENGINE_DIED: Outcome(502, "server_error"),
    Code.ORCHESTRATOR_AWAY: Outcome(503, "server_error", retry_after_ms=2_000),
    Code.SHUTTING_DOWN: Outcome(503, "server_error", retry_after_ms=2_000),
    Code.INTERNAL: Outcome(500, "server_error"),
}


class ModelswapError(Exception):
    """Base of every failure that a client or user is told about.

    ``code`` says which; ``str(error)`` is the message with its remedy; ``retry_after_ms`` overrides the table's.
    """

    code: Code = Code.INTERNAL

    def __init__(self, message: str, *, code: Code | None = None, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        self.retry_after_ms = retry_after_ms

    @property
    def outcome(self) -> Outcome:
        """The table's row for this error."""
        return OUTCOMES[self.code]


def body(code: Code | str, message: str, *, param: str | None = None) -> bytes:
    """Return the error in OpenAI's JSON shape: ``{"error": {"message", "type", "param", "code"}}``."""
    known = OUTCOMES.get(Code(code)) if code in Code.__members__.values() else None
    error: dict[str, Any] = {
        "message": message,
        "type": known.type if known else "server_error",
        "param": param,
        "code": str(code),
    }
    return msgspec.json.encode({"error": error})


def retry_headers(retry_after_ms: int | None, should_retry: bool | None) -> list[tuple[str, str]]:
    """Return the response headers that tell clients whether and when to come back.

    ``Retry-After`` is whole seconds, rounded up; ``retry-after-ms`` is exact (OpenAI's client reads it first).
    """
    headers: list[tuple[str, str]] = []
    if retry_after_ms is not None:
        headers.append(("retry-after", str(-(-retry_after_ms // 1000))))
        headers.append(("retry-after-ms", str(retry_after_ms)))
    if should_retry is not None:
        headers.append(("x-should-retry", "true" if should_retry else "false"))
    return headers
