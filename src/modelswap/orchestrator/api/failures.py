"""Errors as the admin API tells them: OpenAI's shape, by the one table."""

from __future__ import annotations

from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from modelswap.protocol.errors import OUTCOMES, Code, ModelswapError, body, retry_headers


def error_response(
    code: Code, message: str, *, param: str | None = None, retry_after_ms: int | None = None
) -> Response:
    """Return the response for a failure."""
    outcome = OUTCOMES[code]
    retry = retry_after_ms if retry_after_ms is not None else outcome.retry_after_ms
    return Response(
        body(code, message, param=param),
        status_code=outcome.status,
        headers=dict(retry_headers(retry, outcome.should_retry)),
        media_type="application/json",
    )


async def on_modelswap_error(request: Request, error: Exception) -> Response:
    """Answer a failure that a handler raised."""
    assert isinstance(error, ModelswapError)  # noqa: S101 - for the type checker: registered for this class
    return error_response(error.code, str(error), retry_after_ms=error.retry_after_ms)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer an unknown path or method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - for the type checker: registered for this class
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        response = error_response(Code.METHOD_NOT_ALLOWED, f"{request.method} is not allowed on {request.url.path}")
    else:
        response = error_response(Code.NOT_FOUND, f"there is nothing at {request.url.path}; see GET /")
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def on_bug(request: Request, error: Exception) -> Response:
    """Answer what nobody expected; the server logs it."""
    return error_response(Code.INTERNAL, f"internal error: {type(error).__name__}; see the orchestrator's log")
