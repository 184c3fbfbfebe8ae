"""Whole responses of the gateway's own."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Final

_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}


def render(
    status: int,
    body: bytes,
    request_id: bytes,
    *,
    keep_alive: bool,
    content_type: str = "application/json",
    extra: Iterable[tuple[str, str]] = (),
    with_body: bool = True,
) -> bytes:
    """Return a response as it is sent; ``with_body`` is False in answer to HEAD."""
    more = "".join(f"{name}: {value}\r\n" for name, value in extra).encode()
    return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b%b\r\n%b" % (
        status,
        _REASONS.get(status, b""),
        content_type.encode(),
        len(body),
        request_id,
        more,
        b"" if keep_alive else b"connection: close\r\n",
        body if with_body else b"",
    )
