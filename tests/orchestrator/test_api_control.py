"""The endpoints that change something."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from modelswap.engines.base import CanaryFailed, Diagnosis, Readiness
from modelswap.orchestrator.api import reading
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import StartFailed
from modelswap.spec.errors import ConfigError, Problem
from tests.orchestrator.conftest import Api, serving
from tests.orchestrator.fakes import Bench, config, until


def code_of(body: dict[str, object]) -> object:
    """Return the error code of an answer in OpenAI's shape."""
    error = body["error"]
    assert isinstance(error, dict) and set(error) == {"message", "type", "param", "code"}
    return error["code"]


async def test_ensure_model_returns_when_it_is_ready(api: Api, bench: Bench) -> None:
    """With the model that was put out, how long it took and where it listens; then it is resident."""
    status, first = await api.post("/ensure_model", {"model": "b"})
    assert (status, first["previous_model"], first["mechanism"]) == (200, None, "cold")
    status, second = await api.post("/ensure_model", {"model": "first", "wait": True})
    (running,) = bench.runtime.living.values()
    assert status == 200
    assert second.pop("seconds") > 0  # type: ignore[operator]
    assert second == {
        "model": "a",
        "previous_model": "b",
        "mechanism": "cold",
        "address": f"127.0.0.1:{running.address.port}",
        "status": "ready",
    }
    status, third = await api.post("/ensure_model", {"model": "a"})
    assert third["mechanism"] == "resident" and third["previous_model"] is None


async def test_ensure_model_without_waiting_is_accepted(api: Api) -> None:
    """The swap goes on by itself."""
    status, body = await api.post("/ensure_model", {"model": "a", "wait": False})
    assert (status, body) == (202, {"model": "a", "status": "accepted"})
    await until(lambda: api.service.shell.snapshot().devices[0].resident == "a")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "nope"}, 404, "model_not_found"),
        ({}, 400, "missing_model"),
        ({"model": ""}, 400, "missing_model"),
        ({"model": 7}, 400, "bad_request"),
        ({"model": "a", "wait": "yes"}, 400, "bad_request"),
        (["a"], 400, "invalid_json"),
        ({"model": "a", "junk": "x" * reading.LARGEST_BODY}, 413, "body_too_large"),
    ],
)
async def test_what_is_asked_wrongly_is_answered_in_openais_shape(
    api: Api, body: object, status: int, code: str
) -> None:
    """By the one table."""
    got, answer = await api.post("/ensure_model", body)
    assert (got, code_of(answer)) == (status, code)


async def test_an_unknown_model_is_answered_with_the_names_there_are(api: Api) -> None:
    """So that a typing mistake explains itself."""
    _, answer = await api.post("/ensure_model", {"model": "nope"})
    assert "there are: a, b" in str(answer)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 5000])
async def test_bad_json_is_400(api: Api, content: bytes) -> None:
    """Whatever is bad about it."""
    headers = {"content-type": "application/json"}
    async with api.http.post(api.url + "/ensure_model", data=content, headers=headers) as answer:
        assert answer.status == 400 and code_of(await answer.json()) == "invalid_json"


async def test_a_failed_start_is_503_with_reason_log_and_retry(api: Api, bench: Bench) -> None:
    """And `x-should-retry: false` while the cause is permanent."""
    bench.engine.canary_error = CanaryFailed("status 500")
    async with api.http.post(api.url + "/ensure_model", json={"model": "a"}) as answer:
        body = await answer.json()
        assert answer.status == 503 and code_of(body) == "model_start_failed"
        assert "status 500" in body["error"]["message"] and "last line" in body["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1 and "x-should-retry" not in answer.headers
    bench.engine.said = Readiness(ready=False, problem="it serves 'c'")
    async with api.http.post(api.url + "/ensure_model", json={"model": "b"}) as answer:
        assert code_of(await answer.json()) == "model_broken"
        assert answer.headers["x-should-retry"] == "false"


async def test_a_client_that_leaves_withdraws_its_request(api: Api, bench: Bench) -> None:
    """Nobody waits any more, so nothing is swapped for it."""
    await api.post("/ensure_model", {"model": "b"})
    bench.engine.said = Readiness(ready=False, stage="weights")
    with pytest.raises(TimeoutError):
        await api.http.post(api.url + "/ensure_model", json={"model": "a"}, timeout=aiohttp.ClientTimeout(total=0.2))
    await until(lambda: all(model.waiting == 0 for model in api.service.shell.snapshot().models))
    bench.engine.said = Readiness(ready=True)


async def test_unload_stops_one_or_all(api: Api, bench: Bench) -> None:
    """And says what was stopped; nothing to do is no error."""
    await api.post("/ensure_model", {"model": "a"})
    status, body = await api.post("/unload", {"model": "first"})
    assert status == 200 and body["model"] == "a" and body["previous_model"] == "a" and body["mechanism"] == "stop"
    assert bench.runtime.living == {}
    await api.post("/ensure_model", {"model": "b"})
    status, body = await api.post("/unload", {})
    assert status == 200 and body["status"] == "unloaded" and body["previous_model"] == "b"
    status, body = await api.post("/unload", {})
    assert status == 200 and body["mechanism"] == "absent"
    status, body = await api.post("/unload", {"model": "nope"})
    assert status == 404


async def test_unload_needs_no_body(api: Api) -> None:
    """Only to say that it is JSON."""
    async with api.http.post(api.url + "/unload", headers={"content-type": "application/json"}) as answer:
        assert answer.status == 200


async def test_reload_tells_what_changed_and_leaves_the_rest_running(api: Api, bench: Bench) -> None:
    """A model whose definition is the same goes on untouched; a changed one is put out."""
    await api.post("/ensure_model", {"model": "a"})
    before = dict(bench.runtime.living)
    bench.config = config(
        {"orchestrator": {"port": 9999}}, a={"aliases": ["renamed"], "priority": 5, "stop_grace": 1.5}, c={}
    )
    status, body = await api.post("/reload", {})
    assert (status, body) == (
        200,
        {
            "status": "reloaded",
            "added": ["c"],
            "removed": ["b"],
            "changed": [],
            "kept": ["a"],
            "restart_needed": ["orchestrator.port"],
        },
    )
    assert bench.runtime.living == before
    models = (await api.json("/models"))["models"]
    assert [(m["name"], m["aliases"], m["state"]) for m in models] == [
        ("a", ["renamed"], "ready"),
        ("c", [], "absent"),
    ]
    health = await api.json("/health")
    assert "needs a restart: orchestrator.port" in str(health["warnings"])
    (hosted,) = api.service.outside.hosted.values()
    assert hosted.spec.stop_grace == 1.5
    bench.config = config(a={"command": ["serve", "anew"]})
    await api.post("/reload", {})
    await until(lambda: not bench.runtime.living)


async def test_a_bad_config_changes_nothing(api: Api, bench: Bench) -> None:
    """It is told with its problems."""
    bench.load_error = ConfigError([Problem("modelswap.yaml", 3, 1, "models.a.engin", "unknown key", "engine?")])
    status, body = await api.post("/reload", {})
    assert status == 400 and "modelswap.yaml:3" in str(body) and "stays as it was" in str(body)
    assert len((await api.json("/models"))["models"]) == 2
    bench.load_error = ModelswapError("the disk is gone")
    status, body = await api.post("/reload", {})
    assert status == 500


async def test_a_reload_that_docker_does_not_allow_changes_nothing(api: Api, bench: Bench) -> None:
    """The first model in a container needs Docker; without it the models stay as they are."""
    bench.runtime.configure_error = StartFailed("Docker can't be reached; is dockerd running?")
    bench.config = config(c={"command": None, "container": "llm"})
    status, body = await api.post("/reload", {})
    assert (status, code_of(body)) == (503, "model_start_failed")
    assert "the config stays as it was: Docker can't be reached; is dockerd running?" in str(body)
    assert [model["name"] for model in (await api.json("/models"))["models"]] == ["a", "b"]


async def test_dockers_settings_need_a_restart_once_they_are_used(api: Api, bench: Bench) -> None:
    """Before a model needs Docker they are nobody's."""
    container = {"command": None, "container": "llm"}
    restarts = []
    for host, second in (("tcp://one:1", {}), ("tcp://two:2", container), ("tcp://three:3", {})):
        bench.config = config({"docker": {"host": host}}, a={}, c=second)
        _, body = await api.post("/reload", {})
        restarts.append(body["restart_needed"])
    assert restarts == [[], [], ["docker"]]


async def test_shutdown_stops_everything_and_answers_then(api: Api, bench: Bench) -> None:
    """Drained, stopped, and nothing is started any more."""
    await api.post("/ensure_model", {"model": "a"})
    assert await api.post("/shutdown", {"now": False}) == (200, {"status": "finished"})
    assert bench.runtime.living == {} and bench.runtime.stops[-1][1] == 7.0
    status, body = await api.post("/ensure_model", {"model": "a"})
    assert (status, code_of(body)) == (503, "shutting_down")
    assert await api.post("/shutdown", {"now": True}) == (200, {"status": "finished"})


async def test_shutdown_now_waits_for_nothing(api: Api, bench: Bench) -> None:
    """Engines are killed."""
    await api.post("/ensure_model", {"model": "a"})
    assert await api.post("/shutdown", {"now": True}) == (200, {"status": "finished"})
    assert bench.runtime.stops[-1][1] == 0.0


async def test_whoever_waits_is_let_go_when_the_orchestrator_ends(bench: Bench) -> None:
    """With an error that says to ask the next one; the engine goes on loading."""
    bench.engine.said = Readiness(ready=False)
    async with serving(bench) as api:
        asking = asyncio.create_task(api.post("/ensure_model", {"model": "a"}))
        await until(lambda: bool(bench.runtime.living))
        api.service.end()
        status, body = await asking
        assert (status, code_of(body)) == (503, "orchestrator_away")
    assert bench.runtime.living and bench.runtime.stops == []


async def test_a_bring_in_of_what_the_config_has_lost_is_refused(bench: Bench) -> None:
    """The scheduler may still want what a reload has just taken away."""
    from modelswap.core import effects

    async with bench.running() as service:
        carry = service.shell._carry
        posted: list[object] = []
        service.outside.post = posted.append
        carry(effects.BringIn(instance="z.1", model="z", definition="d"))
        carry(effects.BringIn(instance="a.1", model="a", definition="older"))
        assert [type(event).__name__ for event in posted] == ["BringInFailed", "BringInFailed"]
        with pytest.raises(TypeError, match="nobody carries out"):
            carry(effects.Effect())


async def test_a_diagnosis_reaches_the_client(api: Api, bench: Bench) -> None:
    """An engine that ends while loading is told with what its kind makes of it."""
    bench.engine.said = Readiness(ready=False)
    bench.engine.diagnosis = Diagnosis("out of memory; lower gpu_memory_utilization", permanent=False)
    asking = asyncio.create_task(api.post("/ensure_model", {"model": "a"}))
    await until(lambda: bool(bench.runtime.living))
    bench.runtime.die(next(iter(bench.runtime.living)), 1)
    status, body = await asking
    assert status == 503 and "lower gpu_memory_utilization" in str(body)
