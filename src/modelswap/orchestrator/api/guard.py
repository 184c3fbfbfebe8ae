"""Keeps web pages from driving the admin API.

A page in some browser can send requests to this address: plain form posts (so a POST must say that it is JSON, which
makes the browser ask first, and is refused), and, by rebinding its own name to our address, anything at all (so the
name in ``Host`` must be one of ours). It always sends its ``Origin``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from modelswap.orchestrator.api.failures import error_response
from modelswap.protocol.errors import Code

_WILDCARDS: Final = frozenset({"0.0.0.0", "::", ""})


class KnownHosts:
    """The names under which this API may be addressed: loopback's, the configured one, and ``allowed``.

    When bound to every address, any address (never any name) is known, too.
    """

    def __init__(self, host: str, allowed: Iterable[str]) -> None:
        self._names = {"localhost", _bare(host), *(_bare(name) for name in allowed)} - _WILDCARDS
        self._any_address = host in _WILDCARDS

    def knows(self, authority: str) -> bool:
        """Return whether ``authority`` (a host, with or without a port) is one of ours."""
        name = _bare(authority)
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self._any_address

    def trusts(self, origin: str, authority: str) -> bool:
        """Return whether a page from ``origin`` may send requests to ``authority``."""
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https"):
            return False  # "null", browser extensions
        if parts.netloc.lower() == authority.lower():
            return True
        name = _bare(parts.netloc)
        return name in self._names or _is_loopback(name)


class Guard:
    """ASGI middleware that refuses what a web page could have sent."""

    def __init__(self, app: ASGIApp, hosts: Callable[[], KnownHosts]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] in ("http", "websocket"):
            refusal = self._refusal(scope)
            if refusal is not None:
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008})
                else:
                    await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        hosts = self._hosts()
        named = headers.getlist("host")
        host = named[0] if len(named) == 1 else ""
        if not hosts.knows(host):
            return error_response(
                Code.FORBIDDEN, f"Host '{host[:100]}' is not known here; add it to orchestrator.allowed_hosts"
            )
        for origin in headers.getlist("origin"):
            if not hosts.trusts(origin, host):
                return error_response(
                    Code.FORBIDDEN, f"Origin '{origin[:100]}' is not known here; add it to orchestrator.allowed_hosts"
                )
        if scope["type"] == "http" and scope["method"] == "POST":
            media = headers.get("content-type", "").partition(";")[0].strip().lower()
            if media != "application/json":
                return error_response(
                    Code.UNSUPPORTED_MEDIA_TYPE, "a POST needs the header 'content-type: application/json'"
                )
        return None


def _bare(authority: str) -> str:
    """Return the host without port, brackets and a trailing dot, in lower case; empty if it is malformed."""
    text = authority.strip().lower()
    if text.startswith("["):
        name, closed, rest = text[1:].partition("]")
        return name if closed and (not rest or _is_port(rest)) else ""
    if text.count(":") > 1:
        return text  # an IPv6 address without brackets, as it is written in a config file
    name, colon, port = text.partition(":")
    if colon and not _is_port(colon + port):
        return ""
    return name.rstrip(".")


def _is_port(text: str) -> bool:
    return text.startswith(":") and ((text[1:].isascii() and text[1:].isdigit()) or not text[1:])


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
