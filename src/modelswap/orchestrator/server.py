"""The HTTP server around the admin API."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from modelswap.protocol.errors import ModelswapError

_GRACE = 3
_LARGEST_FRAME = 16 * 1024 * 1024


class CantListen(ModelswapError):
    """Raised when the configured address can't be listened on."""


class Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to us and tells when it is up (it has no settings for either)."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets)
        self.up.set()


def admin_server(app: ASGIApp) -> Server:
    """Return a server for ``app``, to be run with ``serve(sockets=[…])`` and ended with ``should_exit``."""
    return Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            loop="none",
            http="httptools",
            # The other implementation uses what websockets has deprecated.
            ws="websockets-sansio",
            ws_max_size=_LARGEST_FRAME,
            # A gateway that is stopped for a while must not lose its connection for it: the protocol has its own term.
            ws_ping_interval=None,
            ws_ping_timeout=None,
            ws_per_message_deflate=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_GRACE,
        )
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address; raises `CantListen`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setblocking(False)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise CantListen(
            f"can't listen on {host}:{port}: {error.strerror}; is another orchestrator running? "
            "Stop it, or change orchestrator.host and orchestrator.port"
        ) from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
