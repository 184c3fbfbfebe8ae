"""What the gateway answers by itself."""

from __future__ import annotations

import pytest

from modelswap.protocol.messages import CatalogModel, Want
from modelswap.testing.waiting import until
from tests.gateway.rig import Rig, ask, post


async def test_models_are_listed(rig: Rig) -> None:
    """All configured models, in OpenAI's shape, with their state as more fields."""
    rig.orchestrator.models = (
        CatalogModel(name="mistral", aliases=("m",), adapters=("lora",), engine="vllm", state="ready", resident=True),
        CatalogModel(name="org/coder"),
    )
    await rig.start()
    listed = (await rig.get("/v1/models")).json()
    assert listed["object"] == "list"
    first, second = listed["data"]
    assert (first["id"], first["object"], first["owned_by"]) == ("mistral", "model", "modelswap")
    assert (first["aliases"], first["adapters"], first["engine"]) == (["m"], ["lora"], "vllm")
    assert (first["state"], first["resident"]) == ("ready", True)
    assert isinstance(first["created"], int)
    assert second["state"] == "absent"
    for path in ("mistral", "m", "lora"):
        assert (await rig.get(f"/v1/models/{path}")).json() == first
    for path in ("org/coder", "org%2Fcoder"):
        assert (await rig.get(f"/v1/models/{path}")).json() == second
    got = await rig.get("/v1/models/nobody")
    assert (got.status, got.code) == (404, "model_not_found")


async def test_polls_cause_nothing(rig: Rig) -> None:
    """Lists, health and status never ask for a model."""
    await rig.start()
    for path in ("/v1/models", "/v1/models/mistral", "/health", "/status", "/metrics"):
        assert (await rig.get(path)).status == 200
    assert not rig.orchestrator.heard(Want)


async def test_health_tells_each_part(rig: Rig) -> None:
    """Gateway, orchestrator and current instance, and 503 if neither serving nor queueing is possible."""
    rig.orchestrator.models = (CatalogModel(name="mistral", state="ready", resident=True), CatalogModel(name="coder"))
    await rig.start()
    got = (await rig.get("/health")).json()
    assert got["status"] == got["gateway"]["status"] == "ok"
    assert got["orchestrator"] == {"connected": True}
    assert got["instances"] == [{"model": "mistral", "state": "ready", "resident": True}]
    await rig.orchestrator.stop()
    await until(lambda: not rig.worker.admission.connected)
    away = await rig.get("/health")
    assert (away.status, away.json()["status"]) == (503, "waiting for the orchestrator")


async def test_status_tells_of_models_and_requests(rig: Rig) -> None:
    """Current model, what waits and runs, and the leases."""
    rig.orchestrator.models = (CatalogModel(name="mistral", state="ready", resident=True), CatalogModel(name="coder"))
    await rig.start()
    engine = await rig.engine()
    await (await rig.wire()).send(post(ask("coder")))
    await rig.orchestrator.hears(Want)
    got = (await rig.get("/status")).json()
    assert got["current_model"] == "mistral"
    assert got["waiting"] == {"coder": 1, "mistral": 0}
    assert got["in_flight"] == {"coder": 0, "mistral": 0}
    (lease,) = got["worker"]["leases"]
    assert (lease["model"], lease["state"], lease["slots"]) == ("mistral", "open", 8)
    assert lease["address"] == f"127.0.0.1:{engine.port}"


async def test_metrics_are_there_from_the_start(rig: Rig) -> None:
    """Prometheus' text format, with every configured model at zero."""
    await rig.start()
    got = await rig.get("/metrics")
    assert (got.header("content-type") or "").startswith("text/plain; version=0.0.4")
    text = got.body.decode()
    for name in ("in_flight", "waiting", "faults_total"):
        assert f'modelswap_gateway_{name}{{model="coder"}} 0\n' in text
    assert "modelswap_gateway_client_connections 1\n" in text
    assert "modelswap_gateway_orchestrator_connected 1\n" in text


async def test_workers_answer_for_each_other(rig: Rig) -> None:
    """Any worker's metrics and status are the sum over all."""
    await rig.start()
    await rig.engine()
    other = await rig.start_worker()
    await rig.call(post(ask()))
    rig.worker.publish_gauges()
    text = other.metrics.render(["mistral"]).decode()
    name = "modelswap_gateway_requests_total"
    assert f'{name}{{model="mistral",path="/v1/chat/completions",status="200"}} 1\n' in text
    await until(lambda: other.admission.connected)
    other.publish_gauges()
    assert "modelswap_gateway_orchestrator_connected 2\n" in (await rig.get("/metrics")).body.decode()


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("POST", "/health", 405, "GET, HEAD"),
        ("DELETE", "/v1/models/mistral", 405, "GET, HEAD"),
        ("GET", "/v1/chat/completions", 405, "POST"),
        ("GET", "/chat/completions", 405, "POST"),
        ("OPTIONS", "/v1/chat/completions", 405, "POST"),
        ("OPTIONS", "*", 404, None),
        ("GET", "/", 404, None),
        ("GET", "/v1/nothing", 404, None),
        ("POST", "/sleep", 404, None),
        ("POST", "/v1/../sleep", 404, None),
        ("PUT", "/v1/completions", 405, "POST"),
    ],
)
async def test_what_is_not_served(rig: Rig, method: str, path: str, status: int, allow: str | None) -> None:
    """Errors say what there is; no CORS headers are ever sent, and the connection goes on."""
    await rig.start()
    wire = await rig.wire()
    for _ in range(2):
        await wire.send(f"{method} {path} HTTP/1.1\r\nOrigin: http://evil\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        got = await wire.response()
        assert (got.status, got.header("allow")) == (status, allow)
        assert got.code == ("method_not_allowed" if status == 405 else "not_found")
        assert not any(name.startswith("access-control") for name, _ in got.headers)


async def test_head_has_no_body(rig: Rig) -> None:
    """HEAD is answered as GET, without the body."""
    await rig.start()
    wire = await rig.wire()
    await wire.send(b"HEAD /health HTTP/1.1\r\n\r\nHEAD /v1/models HTTP/1.1\r\n\r\n")
    for _ in range(2):
        got = await wire.response(has_body=False)
        assert got.status == 200
        assert int(got.header("content-length") or 0) > 0


async def test_unwanted_body_ends_the_connection(rig: Rig) -> None:
    """A body that comes with a refused request isn't waited for."""
    await rig.start()
    wire = await rig.wire()
    await wire.send(b"POST /nothing HTTP/1.1\r\nContent-Length: 100000\r\n\r\nabc")
    got = await wire.response()
    assert (got.status, got.header("connection")) == (404, "close")
    assert await wire.rest() == b""
