"""Puts the endpoints together."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from modelswap.orchestrator.api.control import Control
from modelswap.orchestrator.api.failures import on_bug, on_http_error, on_modelswap_error
from modelswap.orchestrator.api.guard import Guard, KnownHosts
from modelswap.orchestrator.api.streams import HEARTBEAT, Streams
from modelswap.orchestrator.api.views import Views
from modelswap.orchestrator.service import Service
from modelswap.protocol.errors import ModelswapError


def admin_app(service: Service, hosts: Callable[[], KnownHosts], *, heartbeat: float = HEARTBEAT) -> Starlette:
    """Return the ASGI application of one orchestrator."""
    control, views, streams = Control(service), Views(service), Streams(service, heartbeat)

    async def gateway(socket: WebSocket) -> None:
        await service.links.serve(socket)

    app = Starlette(
        routes=[
            Route("/", views.index),
            Route("/health", views.health),
            Route("/status", views.status),
            Route("/metrics", views.metrics),
            Route("/models", views.models),
            Route("/events", streams.events),
            Route("/logs/{model:path}", streams.logs),
            Route("/ensure_model", control.ensure_model, methods=["POST"]),
            Route("/unload", control.unload, methods=["POST"]),
            Route("/pin", control.pin, methods=["POST"]),
            Route("/calibrate", control.calibrate, methods=["POST"]),
            Route("/reload", control.reload, methods=["POST"]),
            Route("/shutdown", control.shutdown, methods=["POST"]),
            WebSocketRoute("/gateway", gateway),
        ],
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={
            ModelswapError: on_modelswap_error,
            HTTPException: on_http_error,
            Exception: on_bug,
        },
    )
    app.router.redirect_slashes = False
    return app
