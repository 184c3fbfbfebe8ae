"""Reads requests."""

from __future__ import annotations

import json
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request

from modelswap.protocol.errors import Code, ModelswapError

LARGEST_BODY: Final = 64 * 1024


async def json_body(request: Request) -> dict[str, Any]:
    """Return the JSON object in the body, empty if there is no body; raises `ModelswapError`."""
    content = bytearray()
    try:
        async for chunk in request.stream():
            content += chunk
            if len(content) > LARGEST_BODY:
                raise ModelswapError(f"the body is larger than {LARGEST_BODY} bytes", code=Code.BODY_TOO_LARGE)
    except ClientDisconnect as gone:
        raise ModelswapError("the body did not come", code=Code.BAD_REQUEST) from gone
    if not content.strip():
        return {}
    try:
        value = json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise ModelswapError(f"the body is not JSON: {error}", code=Code.INVALID_JSON) from error
    if not isinstance(value, dict):
        raise ModelswapError("the body must be a JSON object", code=Code.INVALID_JSON)
    return value


def text(body: dict[str, Any], key: str) -> str | None:
    """Return a text of the body, None if it isn't there; raises `ModelswapError`."""
    value = body.get(key)
    if value is not None and not isinstance(value, str):
        raise ModelswapError(f"'{key}' must be a text", code=Code.BAD_REQUEST)
    return value


def flag(body: dict[str, Any], key: str, default: bool) -> bool:
    """Return a truth value of the body; raises `ModelswapError`."""
    value = body.get(key, default)
    if not isinstance(value, bool):
        raise ModelswapError(f"'{key}' must be true or false", code=Code.BAD_REQUEST)
    return value


def number(request: Request, key: str, default: int, most: int) -> int:
    """Return a whole number of the query, at least 0 and at most ``most``; raises `ModelswapError`."""
    given = request.query_params.get(key)
    if given is None:
        return default
    if not (given.isascii() and given.isdigit()):
        raise ModelswapError(f"'{key}' must be a whole number", code=Code.BAD_REQUEST)
    return min(int(given[:10]), most)


def switch(request: Request, key: str) -> bool:
    """Return whether a flag of the query is on."""
    return request.query_params.get(key, "").lower() in ("1", "true", "yes", "on")


async def disconnected(request: Request) -> None:
    """Return when the client has gone; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
