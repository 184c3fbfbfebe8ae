"""The endpoints that only tell: JSON and Prometheus text."""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import modelswap
from modelswap.core.snapshot import InstanceView, ModelView, Snapshot
from modelswap.orchestrator import sleepers
from modelswap.orchestrator.facts import DEVICE
from modelswap.orchestrator.service import Service
from modelswap.spec.config import Model

INDEX: Final = {
    "GET /status": "instances, queue, last swaps, devices",
    "GET /health": "200 while the orchestrator can decide, else 503",
    "GET /metrics": "Prometheus",
    "GET /models": "configured models and their states",
    "GET /events": "what happens, as server-sent events",
    "GET /logs/{model}": "an engine's last log lines (?lines=100&follow=1)",
    "POST /ensure_model": '{"model": "name", "wait": true}',
    "POST /unload": '{"model": "name"}, or {} for all',
    "POST /pin": '{"model": "name", "pinned": true}: keep it once it is there',
    "POST /calibrate": '{"model": "name"}: measure its ways in and out, or {} for all',
    "POST /reload": "{}: read the config file again",
    "POST /shutdown": '{"now": false}: drain and stop everything',
}

SHORT_ID: Final = 12
"""How many digits of a container's id are shown, as ``docker ps`` does."""


class Views:
    """Handlers over one `Service`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def index(self, request: Request) -> Response:
        """``GET /``: what there is."""
        return JSONResponse({"service": "modelswap orchestrator", "version": modelswap.__version__, "endpoints": INDEX})

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200, or 503 with the problems."""
        problems = self._service.shell.problems()
        status = {
            "status": "failing" if problems else "ok",
            "healthy": not problems,
            "problems": problems,
            "warnings": self._service.warnings(),
        }
        return JSONResponse(status, status_code=503 if problems else 200)

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``: Prometheus' text format."""
        service = self._service
        service.metrics.failed("scheduler", service.shell.failures)
        service.metrics.failed("task", service.tasks.failures)
        service.metrics.failed("journal", service.store.failures)
        service.metrics.host_memory(sleepers.spent(service.outside), sleepers.spare(service.outside))
        text = service.metrics.render(service.shell.snapshot(), service.reading, DEVICE, service.links.connected)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def models(self, request: Request) -> Response:
        """``GET /models``: every configured model."""
        snapshot = self._service.shell.snapshot()
        return JSONResponse({"models": [self._model(view) for view in snapshot.models]})

    async def status(self, request: Request) -> Response:
        """``GET /status``: everything there is to know."""
        service = self._service
        snapshot = service.shell.snapshot()
        return JSONResponse(
            {
                "version": modelswap.__version__,
                "generation": snapshot.generation,
                "uptime_seconds": round(service.clock() - service.began, 3),
                "time": time.time(),
                "config": str(service.config_path),
                "begun": snapshot.begun,
                "problems": service.shell.problems(),
                "warnings": service.warnings(),
                "current_model": _current(snapshot),
                "models": [self._model(view) for view in snapshot.models],
                "instances": [self._instance(view) for view in snapshot.instances],
                "queue": [
                    {"model": view.name, "waiting": view.waiting, "oldest_seconds": view.oldest_wait}
                    for view in snapshot.models
                    if view.waiting
                ],
                "swaps": msgspec.to_builtins(snapshot.swaps),
                "last_swaps": service.history.swaps(),
                "timings": service.history.timings(),
                "measurements": service.outside.measurements.table(service.configured.definitions.items()),
                "calibrating": service.calibrator.progress,
                "host_memory": self._host_memory(),
                "standbys": msgspec.to_builtins(service.outside.runtime.standbys()),
                "devices": [{**msgspec.to_builtins(view), **self._memory(view.name)} for view in snapshot.devices],
                "gateways": msgspec.to_builtins(snapshot.gateways),
            }
        )

    def _model(self, view: ModelView) -> dict[str, Any]:
        model = self._service.configured.config.models.get(view.name)
        told: dict[str, Any] = {"name": view.name}
        if model is not None:
            told.update(
                engine=model.engine,
                runtime=model.runtime,
                container=_container(view.name, model),
                image=model.image,
                aliases=model.aliases,
                adapters=model.adapters,
                priority=model.priority,
            )
        return {**told, **msgspec.to_builtins(view), "measurements": self._measurements(view.name)}

    def _measurements(self, model: str) -> list[dict[str, Any]]:
        service = self._service
        definition = service.configured.definitions.get(model)
        return [] if definition is None else service.outside.measurements.table([(model, definition)])

    def _host_memory(self) -> dict[str, Any]:
        outside = self._service.outside
        return {
            "budget": outside.memory.budget(),
            "spent": sleepers.spent(outside),
            "spare": sleepers.spare(outside),
        }

    def _instance(self, view: InstanceView) -> dict[str, Any]:
        hosted = self._service.outside.hosted.get(view.instance)
        running = hosted.running if hosted is not None else None
        container = running.container[:SHORT_ID] if running is not None else ""
        return {
            **msgspec.to_builtins(view),
            "container": container or None,
            "host_bytes": hosted.host_bytes if hosted is not None else 0,
            "residue_bytes": hosted.residue if hosted is not None and hosted.asleep else 0,
        }

    def _memory(self, device: str) -> dict[str, Any]:
        outside = self._service.device
        ahead = self._service.reading_ahead.told(device)
        told: dict[str, Any] = {"kind": outside.kind, "title": outside.name, "memory": None, "reading_ahead": ahead}
        reading = self._service.reading
        if reading is not None:
            told["memory"] = msgspec.to_builtins(reading)
        return told


def _container(name: str, model: Model) -> str | None:
    """Return what the container is called that serves a model, or its compose service; None for a process."""
    if model.runtime == "managed":
        # Only who uses containers pays for the imports.
        from modelswap.runtimes.docker.body import container_name

        return container_name(name)
    return model.container or model.compose_service


def _current(snapshot: Snapshot) -> str | None:
    return next((view.resident for view in snapshot.devices if view.resident is not None), None)
