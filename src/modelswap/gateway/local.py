"""What the gateway answers by itself: models, health, status, metrics, and every path it doesn't know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote_to_bytes

import msgspec

from modelswap.core.held import LeaseState
from modelswap.gateway import metrics, routes
from modelswap.protocol import errors
from modelswap.protocol.errors import OUTCOMES, Code
from modelswap.protocol.messages import CatalogModel

if TYPE_CHECKING:
    from modelswap.gateway.worker import Worker

_JSON: Final = "application/json"
_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
_MODEL_PREFIX: Final = b"/v1/models/"

Answer = tuple[str, int, bytes, str, list[tuple[str, str]]]
"""The path's metrics label, status, body, content type, more headers."""


def answer_locally(worker: Worker, method: bytes, target: bytes) -> Answer:
    """Answer anything that is not relayed."""
    path, _ = routes.split(target)
    reads = method in (b"GET", b"HEAD")
    if path == b"/v1/models" or path.startswith(_MODEL_PREFIX):
        if not reads:
            return _wrong_method("/v1/models", method, "GET, HEAD")
        if path == b"/v1/models":
            listed = [_model(worker, model) for model in models(worker)]
            return _json("/v1/models", 200, {"object": "list", "data": listed})
        return _one_model(worker, unquote_to_bytes(path[len(_MODEL_PREFIX) :]).decode("utf-8", "replace"))
    if path in (b"/health", b"/status", b"/metrics"):
        label = path.decode()
        if not reads:
            return _wrong_method(label, method, "GET, HEAD")
        if path == b"/metrics":
            worker.publish_gauges()
            return label, 200, worker.metrics.render([model.name for model in models(worker)]), _TEXT, []
        if path == b"/status":
            return _json(label, 200, status(worker))
        health = _health(worker)
        return _json(label, 200 if health["status"] == "ok" else 503, health)
    if method != b"POST" and routes.is_inference(target):
        route = routes.inference(target)
        return _wrong_method(route.label if route is not None else routes.OTHER, method, "POST")
    shown = path.decode("latin-1")
    text = (
        f"{method.decode('latin-1')} {shown} is nothing this gateway serves; there are POST /chat/completions, "
        "POST /v1/… (OpenAI's inference paths), GET /v1/models, GET /health, GET /status and GET /metrics"
    )
    return _error(routes.OTHER, Code.NOT_FOUND, text)


def models(worker: Worker) -> list[CatalogModel]:
    """Return the configured models: the orchestrator's list, or our own file's until that is here."""
    catalog = worker.admission.catalog
    if catalog is not None:
        return list(catalog.models)
    return [
        CatalogModel(
            name=name,
            aliases=tuple(model.aliases),
            adapters=tuple(model.adapters),
            priority=model.priority,
            engine=model.engine,
            beside=model.device == "none",
            state="unknown",
        )
        for name, model in worker.config.models.items()
    ]


def status(worker: Worker) -> dict[str, Any]:
    """Return the current model, waiting requests and leases, as JSON-ready data."""
    worker.publish_gauges()
    sums = worker.metrics.read()

    def per_model(name: str) -> dict[str, int]:
        return {dict(labels)["model"]: values[0] for labels, values in sums.get(name, {}).items()}

    known = models(worker)
    return {
        "current_model": _current(known),
        "orchestrator": {"connected": worker.admission.connected},
        "models": {model.name: {"state": model.state, "resident": model.resident} for model in known},
        "waiting": per_model(metrics.WAITING),
        "in_flight": per_model(metrics.IN_FLIGHT),
        "worker": {
            "id": worker.admission.gateway,
            "clients": len(worker.clients),
            "leases": [
                {
                    "model": lease.model,
                    "epoch": str(lease.epoch),
                    "state": str(lease.state),
                    "address": f"{lease.address[0]}:{lease.address[1]}",
                    "slots": lease.slots,
                    "in_flight": lease.in_flight,
                }
                for lease in worker.admission.leases
            ],
        },
    }


def _current(known: list[CatalogModel]) -> str | None:
    return next((model.name for model in known if model.resident and not model.beside), None)


def _health(worker: Worker) -> dict[str, Any]:
    admission = worker.admission
    serving = any(lease.state is LeaseState.OPEN for lease in admission.leases)
    queueing = admission.catalog is not None and admission.connected
    if worker.stopping:
        word = "stopping"
    elif serving or queueing:
        word = "ok"
    else:
        word = "waiting for the orchestrator"
    return {
        "status": word,
        "gateway": {"status": "stopping" if worker.stopping else "ok", "waiting": admission.waiting},
        "orchestrator": {"connected": admission.connected},
        "current_model": _current(models(worker)),
        "instances": [
            {"model": model.name, "state": model.state, "resident": model.resident}
            for model in models(worker)
            if model.state not in ("absent", "unknown")
        ],
    }


def _one_model(worker: Worker, name: str) -> Answer:
    for model in models(worker):
        if name == model.name or name in model.aliases or name in model.adapters:
            return _json("/v1/models", 200, _model(worker, model))
    return _error("/v1/models", Code.MODEL_NOT_FOUND, worker.admission.unknown(name))


def _model(worker: Worker, model: CatalogModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": worker.started,
        "owned_by": "modelswap",
        "aliases": model.aliases,
        "adapters": model.adapters,
        "engine": model.engine,
        "state": model.state,
        "resident": model.resident,
    }


def _json(label: str, code: int, data: Any) -> Answer:
    return label, code, msgspec.json.encode(data), _JSON, []


def _error(label: str, code: Code, message: str) -> Answer:
    return label, OUTCOMES[code].status, errors.body(code, message), _JSON, []


def _wrong_method(label: str, method: bytes, allowed: str) -> Answer:
    message = f"{method.decode('latin-1')} is not for {label}; use {allowed}"
    body = errors.body(Code.METHOD_NOT_ALLOWED, message)
    return label, 405, body, _JSON, [("allow", allowed)]
