"""The endpoints that only tell, and those that go on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from starlette.requests import Request

from modelswap.core import events
from modelswap.orchestrator import feed as feeds
from modelswap.orchestrator import service as services
from modelswap.orchestrator.api import streams
from modelswap.orchestrator.api.failures import on_bug
from modelswap.orchestrator.api.streams import added
from modelswap.orchestrator.api.views import INDEX
from modelswap.orchestrator.feed import Feed
from tests.orchestrator.conftest import Api, serving
from tests.orchestrator.fakes import Bench, config, until


async def test_the_index_names_every_endpoint(api: Api) -> None:
    """And each of them exists."""
    body = await api.json("/")
    assert body["endpoints"] == INDEX
    routes = {getattr(route, "path", "") for route in _routes(api)}
    assert {line.split()[1] for line in INDEX} | {"/", "/gateway"} == {path.replace(":path", "") for path in routes}


def _routes(api: Api) -> list[object]:
    from modelswap.orchestrator.api.app import admin_app
    from modelswap.orchestrator.api.guard import KnownHosts

    return list(admin_app(api.service, lambda: KnownHosts("127.0.0.1", [])).routes)


async def test_status_tells_everything(api: Api) -> None:
    """Instances with states, the queue, swaps with their phases, devices with memory, gateways."""
    await api.post("/ensure_model", {"model": "b"})
    await api.post("/ensure_model", {"model": "a"})
    await until(lambda: api.service.reading is not None)
    status = await api.json("/status")
    assert status["current_model"] == "a" and status["begun"] is True and status["problems"] == []
    swaps = status["last_swaps"]
    assert isinstance(swaps, list)
    assert (swaps[0]["source"], swaps[0]["target"], swaps[0]["outcome"]) == ("b", "a", "ok")
    assert set(swaps[0]["phases"]) == {"drain", "out", "release", "in", "canary"} and swaps[0]["at"] > 0
    (instance,) = status["instances"]
    assert (instance["model"], instance["state"], instance["resident"]) == ("a", "ready", True)
    (device,) = status["devices"]
    assert device["memory"] == {"total": 100, "free": 100, "holders": []} and device["title"] == "fake device"
    models = status["models"]
    assert isinstance(models, list) and models[0]["aliases"] == ["first"] and models[0]["in_flight"] == 0
    assert status["queue"] == [] and status["gateways"] == [] and status["timings"]


async def test_status_tells_what_hosts_each_model(bench: Bench) -> None:
    """Its container's name or its image, and of what runs the container's id as `docker ps` shows it."""
    bench.config = config(
        a={"command": None, "container": "mistral-llm"},
        b={"command": None, "compose_service": "coder-llm"},
        c={"command": None, "image": "engine:1"},
        d={},
    )
    bench.runtime.spawn("foreign.a", "a", bench.configured().definitions["a"], container="0123456789abcdef")
    async with serving(bench) as api:
        await until(lambda: any(view.resident for view in api.service.shell.snapshot().instances))
        status = await api.json("/status")
        hosts = [(model["runtime"], model["container"], model["image"]) for model in status["models"]]
        assert hosts == [
            ("adopted", "mistral-llm", None),
            ("adopted", "coder-llm", None),
            ("managed", "modelswap-c", "engine:1"),
            ("process", None, None),
        ]
        assert [instance["container"] for instance in status["instances"]] == ["0123456789ab"]
        assert status["models"] == (await api.json("/models"))["models"]


async def test_status_tells_how_far_a_model_is_made_ready(bench: Bench) -> None:
    """Its stage and fraction, while its image comes."""
    bench.config = config(a={"command": None, "image": "engine:1"})
    bench.runtime.fetch_gate.clear()
    async with serving(bench) as api:
        await api.post("/ensure_model", {"model": "a", "wait": False})
        await until(lambda: bool(api.service.shell.snapshot().models[0].prepare_stage))
        (model,) = (await api.json("/models"))["models"]
        assert (model["preparation"], model["prepare_stage"]) == ("under way", "pulling")
        assert model["prepare_fraction"] == 0.5


async def test_status_shows_who_waits(api: Api, bench: Bench) -> None:
    """The queue lists models with waiting requests and the age of the oldest."""
    bench.engine.canary_gate.clear()
    asking = asyncio.create_task(api.post("/ensure_model", {"model": "a"}))
    await until(lambda: bool(bench.engine.canaries))
    status = await api.json("/status")
    (waiting,) = status["queue"]
    assert waiting["model"] == "a" and waiting["waiting"] == 1 and waiting["oldest_seconds"] >= 0
    (swap,) = status["swaps"]
    assert swap["target"] == "a" and swap["phase"] == "in"
    bench.engine.canary_gate.set()
    await asking


async def test_health_is_503_with_the_problems(api: Api) -> None:
    """When the scheduler fails."""
    assert (await api.json("/health"))["status"] == "ok"
    api.service.post(events.Adopted(
        at=0, instance="x", model="no such model", definition="", host="", port=1, slots=1
    ))  # fmt: skip
    await until(lambda: api.service.shell.failures == 1)
    status, text = await api.get("/health")
    assert status == 503 and json.loads(text)["healthy"] is False and "KeyError" in text
    assert 'orchestrator_failures_total{part="scheduler"} 1.0' in (await api.get("/metrics"))[1]


async def test_health_warns_without_failing(api: Api, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that isn't kept, a device that can't be read, tasks that failed."""
    bench.device.error = RuntimeError("fell off the bus")
    monkeypatch.setattr(services, "READ_EVERY", 0.001)
    await until(lambda: bool(api.service.warnings()))

    async def fail() -> None:
        raise RuntimeError("unforeseen")

    api.service.tasks.start(fail(), "failing")
    api.service.store.problem = "the disk is full"
    await until(lambda: len(api.service.warnings()) == 3)
    health = await api.json("/health")
    assert health["status"] == "ok" and "fell off the bus" in str(health["warnings"])
    bench.device.error = None
    await until(lambda: len(api.service.warnings()) == 2)


async def test_unknown_paths_and_methods_are_told_in_openais_shape(api: Api) -> None:
    """404 and 405, with what is allowed."""
    status, text = await api.get("/nowhere")
    assert status == 404 and json.loads(text)["error"]["code"] == "not_found"
    assert (await api.get("/status/"))[0] == 404
    async with api.http.get(api.url + "/ensure_model") as answer:
        assert answer.status == 405 and answer.headers["allow"] == "POST"
        assert (await answer.json())["error"]["code"] == "method_not_allowed"
    async with api.http.delete(api.url + "/models") as answer:
        assert answer.status == 405


async def test_a_bug_is_a_500_in_openais_shape() -> None:
    """Without the details, which are in the log."""
    response = await on_bug(Request({"type": "http", "headers": []}), ValueError("secret"))
    assert response.status_code == 500 and b"ValueError" in bytes(response.body)
    assert b"secret" not in bytes(response.body)


async def test_logs_are_plain_lines(api: Api, bench: Bench) -> None:
    """The last ``lines`` of them; aliases work; keys are hidden."""
    assert await api.get("/logs/first") == (200, "first line\nlast line\n")
    assert await api.get("/logs/a?lines=1") == (200, "last line\n")
    assert await api.get("/logs/a?lines=0") == (200, "")
    assert (await api.get("/logs/a?lines=-1"))[0] == 400
    assert (await api.get("/logs/nope"))[0] == 404
    bench.config = config(a={"api_key": "hush-hush"}, b={})
    bench.runtime.log = ["key hush-hush"]
    await api.post("/reload", {})
    assert await api.get("/logs/a") == (200, "key ***\n")


async def test_logs_can_be_followed(api: Api, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """New lines come as they are written, until the orchestrator ends."""
    monkeypatch.setattr(streams, "_LOOK_EVERY", 0.001)
    async with api.http.get(api.url + "/logs/a?lines=1&follow=1") as answer:
        assert await answer.content.readline() == b"last line\n"
        bench.runtime.log = [*bench.runtime.log, "newer line"]
        assert await answer.content.readline() == b"newer line\n"
        api.service.end()
        assert await answer.content.read() == b""


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ([], ["a"], ["a"]),
        (["a", "b"], ["a", "b"], []),
        (["a", "b"], ["a", "b", "c"], ["c"]),
        (["a", "b"], ["b", "c", "d"], ["c", "d"]),
        (["a", "b"], ["x"], ["x"]),
        (["a", "b"], [], []),
        (["a", "a"], ["a", "a", "a"], ["a"]),
    ],
)
def test_what_was_added_to_a_log(before: list[str], now: list[str], new: list[str]) -> None:
    """Also when its beginning has been rotated away, or it is another instance's."""
    assert added(before, now) == new


async def _events(answer: aiohttp.ClientResponse, count: int) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    fields: dict[str, str] = {}
    async with asyncio.timeout(30):
        while len(found) < count:
            line = (await answer.content.readline()).decode().rstrip("\n")
            if not line and fields:
                found.append(fields)
                fields = {}
            elif line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                fields[name] = value
    return found


async def test_events_tell_what_happens_and_can_be_taken_up(api: Api) -> None:
    """With ids; a client that comes back with its last one gets what it missed."""
    async with api.http.get(api.url + "/events") as answer:
        assert answer.content_type == "text/event-stream"
        assert await answer.content.readline() == b": modelswap events\n"
        await api.post("/ensure_model", {"model": "a"})
        first, second, third = await _events(answer, 3)
    assert [first["event"], second["event"], third["event"]] == ["transition", "transition", "swap"]
    told = json.loads(second["data"])
    assert (told["model"], told["before"], told["after"]) == ("a", "starting", "ready")
    async with api.http.get(api.url + "/events", headers={"last-event-id": first["id"]}) as answer:
        assert await _events(answer, 2) == [second, third]
    async with api.http.get(api.url + "/events?after=999999") as answer:
        assert await _events(answer, 3) == [first, second, third]


async def test_idle_streams_show_that_they_live_and_end_with_the_orchestrator(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comments keep proxies from closing them."""
    monkeypatch.setattr("modelswap.orchestrator.main.admin_app", _with_quick_heartbeat)
    async with serving(bench) as api, api.http.get(api.url + "/events?after=junk") as answer:
        lines = [await answer.content.readline() for _ in range(3)]
        assert lines[2] == b": alive\n"
        api.service.end()
        assert b": closed" in await answer.content.read()


def _with_quick_heartbeat(service: services.Service, hosts: Any) -> object:
    from modelswap.orchestrator.api.app import admin_app

    return admin_app(service, hosts, heartbeat=0.01)


def test_a_subscriber_that_does_not_keep_up_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue is bounded; who subscribes after the end gets the end."""
    monkeypatch.setattr(feeds, "_QUEUED", 3)
    feed = Feed()
    with feed.subscribe() as queue:
        for number in range(5):
            feed.publish("n", number=number)
        items = [queue.get_nowait() for _ in range(queue.qsize())]
        assert [item.id if item else None for item in items] == [1, 2, 3, None]
    feed.close()
    with feed.subscribe() as queue:
        assert queue.get_nowait() is None


async def test_metrics_have_every_series_from_the_start(api: Api) -> None:
    """With exactly the promised names and labels."""
    _, text = await api.get("/metrics")
    for line in (
        'orchestrator_model_swaps_total{from="none",mechanism="cold",outcome="ok",to="a"} 0.0',
        'orchestrator_model_swaps_total{from="a",mechanism="cold",outcome="ok",to="b"} 0.0',
        'orchestrator_model_swaps_total{from="a",mechanism="stop",outcome="ok",to="none"} 0.0',
        'orchestrator_swap_duration_seconds_bucket{le="0.05"} 0.0',
        'orchestrator_swap_duration_seconds_bucket{le="600.0"} 0.0',
        'orchestrator_current_model{model="a"} 0.0',
        'orchestrator_queue_depth{model="b"} 0.0',
        'orchestrator_queue_wait_seconds_count{model="b"} 0.0',
        'orchestrator_queue_oldest_seconds{model="a"} 0.0',
        'orchestrator_swap_phase_seconds_count{phase="drain"} 0.0',
        'orchestrator_instance_state{model="a",state="absent"} 1.0',
        'orchestrator_instance_state{model="a",state="ready"} 0.0',
        "orchestrator_gateways_connected 0.0",
        'orchestrator_adoptions_total{outcome="adopted"} 0.0',
        'orchestrator_instance_failures_total{model="a"} 0.0',
        'orchestrator_device_blocked{device="gpu0"} 0.0',
    ):
        assert line in text.splitlines(), line


async def test_metrics_count_swaps_and_show_the_current_model(api: Api, bench: Bench) -> None:
    """1 for the current one, 0 for the others; memory as last read."""
    await api.post("/ensure_model", {"model": "b"})
    await api.post("/ensure_model", {"model": "a"})
    await until(lambda: api.service.reading is not None)
    lines = (await api.get("/metrics"))[1].splitlines()
    for line in (
        'orchestrator_model_swaps_total{from="b",mechanism="cold",outcome="ok",to="a"} 1.0',
        "orchestrator_swap_duration_seconds_count 2.0",
        'orchestrator_current_model{model="a"} 1.0',
        'orchestrator_current_model{model="b"} 0.0',
        'orchestrator_instance_state{model="a",state="ready"} 1.0',
        'orchestrator_instance_state{model="b",state="absent"} 1.0',
        'orchestrator_device_memory_bytes{device="gpu0",kind="total"} 100.0',
    ):
        assert line in lines, line
    bench.config = config(a={}, c={})
    await api.post("/reload", {})
    lines = (await api.get("/metrics"))[1].splitlines()
    assert 'orchestrator_current_model{model="a"} 1.0' in lines
    assert 'orchestrator_current_model{model="c"} 0.0' in lines
    assert not any('current_model{model="b"}' in line for line in lines)
    assert 'orchestrator_instance_state{model="a",state="ready"} 1.0' in lines


async def test_engine_logs_are_rotated_now_and_then(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a failure."""
    monkeypatch.setattr(services, "ROTATE_EVERY", 0.001)
    async with bench.running():
        await until(lambda: bench.runtime.rotations > 1)

        async def fail() -> None:
            bench.runtime.rotations += 1
            raise OSError("disk full")

        monkeypatch.setattr(bench.runtime, "rotate", fail)
        count = bench.runtime.rotations
        await until(lambda: bench.runtime.rotations > count + 1)
