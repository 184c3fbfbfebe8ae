"""The orchestrator's API, metrics and reload, as users and Prometheus meet them on a real ``modelswap up``."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import yaml
from prometheus_client.parser import text_string_to_metric_families

from modelswap.testing.engine.behaviour import Behaviour
from modelswap.testing.engine.options import Options, command
from tests.system.stack import GIB, MODELS, Stack, until

ODD = "org/llävä-1.5"


def sim(
    folder: Path, name: str, *, gpu: bool = True, behaviour: Behaviour | None = None, **keys: Any
) -> dict[str, Any]:
    """Return one more model on a simulated engine."""
    options = Options(
        model=name,
        load_seconds=0.05,
        tokens=4,
        gpu_ledger=str(folder / "gpu.json"),
        gpu_bytes=6 * GIB if gpu else 0,
        quiet=True,
        behaviour=behaviour or Behaviour(),
    )
    return {"engine": "custom", "command": command(options), **keys}


def rewrite(stack: Stack, change: dict[str, Any]) -> None:
    """Change models in the config file; None removes one."""
    config = yaml.safe_load(stack.config.read_text())
    for name, model in change.items():
        if model is None:
            del config["models"][name]
        else:
            config["models"][name] = model
    stack.config.write_text(yaml.safe_dump(config))


async def ensure(stack: Stack, model: str, **more: Any) -> dict[str, Any]:
    """POST /ensure_model."""
    return await stack.post("/ensure_model", {"model": model, **more})


async def read(http: aiohttp.ClientSession, url: str, body: dict[str, Any] | None, lines: list[bytes]) -> None:
    """Collect a stream's lines until it ends."""
    async with http.request("POST" if body else "GET", url, json=body) as stream:
        assert stream.status == 200
        while line := await stream.content.readline():
            lines.append(line)


async def state_of(stack: Stack, model: str) -> dict[str, Any]:
    """Return a model as ``GET /models`` tells it."""
    models = (await stack.get("/models", orchestrator=True))["models"]
    return next(found for found in models if found["name"] == model)


async def samples(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Scrape ``/metrics``; the parser refuses what Prometheus would."""
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/metrics") as answer:
        assert answer.headers["content-type"].startswith("text/plain")
        text = await answer.text()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


async def test_an_operator_drives_it_with_curl(tmp_path: Path) -> None:
    """Names, aliases, waiting or not, failures, odd names, logs, events, unload: each as the README says."""
    stack = Stack(tmp_path)
    rewrite(
        stack,
        {
            ODD: sim(tmp_path, ODD, aliases=["odd"]),
            "beside": sim(tmp_path, "beside", gpu=False, device="none"),
            "missing": {"engine": "custom", "command": ["/no/such/program", "{port}"]},
        },
    )
    async with stack, aiohttp.ClientSession() as http:
        lines: list[bytes] = []
        events = f"http://127.0.0.1:{stack.orchestrator_port}/events"
        listening = asyncio.create_task(read(http, events, None, lines))
        await until(lambda: bool(lines), "the event stream is open")

        first = await ensure(stack, "mistral-alias")
        assert (first["model"], first["previous_model"], first["mechanism"]) == ("mistral", None, "cold")
        assert first["seconds"] > 0 and first["address"].startswith("127.0.0.1:")
        again = await ensure(stack, "mistral")
        assert (again["mechanism"], again["address"]) == ("resident", first["address"])

        odd = await ensure(stack, "odd")
        assert (odd["model"], odd["previous_model"]) == (ODD, "mistral")
        assert (await stack.status())["current_model"] == ODD
        async with http.get(f"http://127.0.0.1:{stack.orchestrator_port}/logs/{quote(ODD)}?lines=1") as answer:
            assert answer.status == 200 and len((await answer.text()).splitlines()) == 1

        beside = await ensure(stack, "beside")
        assert beside["mechanism"] == "cold" and (await stack.status())["current_model"] == ODD

        assert (await ensure(stack, "coder", wait=False))["status"] == "accepted"

        async def is_current() -> bool:
            return bool((await stack.status())["current_model"] == "coder")

        await until(is_current, "a swap that nobody waits for is made")

        unknown = (await ensure(stack, "mistrall"))["error"]
        assert unknown["code"] == "model_not_found" and "mistral" in unknown["message"]
        for expected in (1, 2):  # while it backs off, too
            broken = (await ensure(stack, "missing"))["error"]
            assert broken["code"] == "model_broken", expected
            assert "no program /no/such/program" in broken["message"]

        assert (await stack.post("/unload", {}))["status"] == "unloaded"
        assert (await state_of(stack, "beside"))["state"] == "absent"
        assert stack.engines() == []
        await until(
            lambda: any(b'"before":"stopping","after":"absent"' in line for line in lines), "the last event is told"
        )
        kinds = {line.removeprefix(b"event: ").strip() for line in lines if line.startswith(b"event: ")}
        assert {b"transition", b"swap"} <= kinds
        swaps = [json.loads(line[6:]) for line in lines if line.startswith(b"data: ") and b'"phases"' in line]
        assert {"drain", "out", "release", "in", "canary"} == set(swaps[1]["phases"])
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        stack.assert_never_overlapped()


async def test_no_web_page_can_drive_it(tmp_path: Path) -> None:
    """Another Host (DNS rebinding), another Origin, and what a form can send are refused."""
    async with Stack(tmp_path) as stack, aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{stack.orchestrator_port}"
        body = json.dumps({"model": "mistral"}).encode()
        good = {"content-type": "application/json"}
        for headers, status in (
            ({**good, "host": "evil.example"}, 403),
            ({**good, "origin": "http://evil.example"}, 403),
            ({**good, "origin": "null"}, 403),
            ({"content-type": "text/plain"}, 415),
            ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ):
            async with http.post(f"{url}/ensure_model", data=body, headers=headers) as answer:
                assert answer.status == status, headers
        for path in ("/status", "/metrics", "/events", "/logs/mistral"):
            async with http.get(url + path, headers={"host": "evil.example"}) as answer:
                assert answer.status == 403, path
        async with http.options(f"{url}/ensure_model", headers={"origin": "http://localhost:3000"}) as answer:
            assert answer.status == 405 and "access-control-allow-origin" not in answer.headers
        assert stack.engines() == []


async def test_metrics_have_the_promised_names_and_labels(tmp_path: Path) -> None:
    """At zero from the start, for every configured model; counted after a swap; one current model."""
    stack = Stack(tmp_path, workers=2)
    rewrite(stack, {"beside": sim(tmp_path, "beside", gpu=False, device="none")})
    async with stack:
        names = {*MODELS, "beside"}
        zero = await samples(stack.orchestrator_port)
        for name in names:
            label = frozenset({("model", name)})
            for gauge in (
                "orchestrator_current_model",
                "orchestrator_queue_depth",
                "orchestrator_queue_oldest_seconds",
            ):
                assert zero[gauge, label] == 0, (gauge, name)
            assert zero["orchestrator_queue_wait_seconds_count", label] == 0
            swap = {("from", "none"), ("to", name), ("mechanism", "cold"), ("outcome", "ok")}
            assert zero["orchestrator_model_swaps_total", frozenset(swap)] == 0
        buckets = sorted(
            float(dict(labels)["le"]) for name, labels in zero if name == "orchestrator_swap_duration_seconds_bucket"
        )
        assert buckets[0] == 0.05 and buckets[-2:] == [600.0, float("inf")]

        for model in ("mistral", "coder", "beside"):
            await ensure(stack, model)
        after = await samples(stack.orchestrator_port)
        current = {
            dict(labels)["model"]: value for (name, labels), value in after.items() if name.endswith("rrent_model")
        }
        assert current == {name: float(name == "coder") for name in names}
        swap = {("from", "mistral"), ("to", "coder"), ("mechanism", "cold"), ("outcome", "ok")}
        assert after["orchestrator_model_swaps_total", frozenset(swap)] == 1
        assert after["orchestrator_swap_duration_seconds_count", frozenset()] == 3

        gateway = await samples(stack.gateway_port)
        request = {("model", "coder"), ("path", "/v1/chat/completions"), ("status", "200")}
        assert gateway["modelswap_gateway_requests_total", frozenset(request)] == 0
        async with aiohttp.ClientSession() as http:
            asked = {"model": "coder-alias", "messages": [{"role": "user", "content": "hi"}]}
            async with http.post(f"{stack.base_url}/chat/completions", json=asked) as answer:
                assert answer.status == 200
        gateway = await samples(stack.gateway_port)

        async def counted() -> bool:
            found = await samples(stack.gateway_port)  # the other worker may be asked, which is told at each tick
            return found["modelswap_gateway_requests_total", frozenset(request)] == 1

        await until(counted, "the request is counted under its model's name")


async def test_reload_touches_only_what_changed(tmp_path: Path) -> None:
    """SIGHUP to `up`: same process for an unchanged model, 404 for a removed one; a broken file changes nothing."""
    async with Stack(tmp_path) as stack:
        assert stack.up is not None
        await ensure(stack, "mistral")
        (before,) = stack.engines()

        good = stack.config.read_text()
        stack.config.write_text(good + "modles: {}\n")
        refused = (await stack.post("/reload", {}))["error"]["message"]
        assert "modles: unknown key; did you mean 'models'?" in refused
        stack.config.write_text(good)

        rewrite(stack, {"llava": None, "newcomer": sim(tmp_path, "newcomer")})
        stack.up.send_signal(signal.SIGHUP)

        async def listed() -> bool:
            return {model["id"] for model in (await stack.get("/v1/models"))["data"]} == {
                "mistral",
                "coder",
                "newcomer",
            }

        await until(listed, "the gateway knows the new models")
        assert [engine.pid for engine in stack.engines()] == [before.pid]
        assert (await ensure(stack, "llava"))["error"]["code"] == "model_not_found"
        assert (await ensure(stack, "newcomer"))["status"] == "ready"

        # A changed definition: what runs is drained and stopped, and started anew for the next request.
        rewrite(stack, {"newcomer": sim(tmp_path, "newcomer", env={"CHANGED": "1"})})
        assert (await stack.post("/reload", {}))["changed"] == ["newcomer"]
        await until(lambda: not stack.engines(), "the old definition's engine is put out")
        await ensure(stack, "newcomer")
        (engine,) = stack.engines()
        assert engine.environ()["CHANGED"] == "1"
        stack.assert_never_overlapped()


async def test_memory_that_a_stranger_holds_is_named(tmp_path: Path) -> None:
    """Strict: the request is answered with the holder's PID, and the model comes when the stranger has gone."""
    stack = Stack(tmp_path, device={"release_timeout": 0.3})
    rewrite(stack, {"mistral": sim(tmp_path, "mistral", memory="6GiB")})
    async with stack:
        stack.ledger.add_foreign(4 * GIB, pid=4121, name="python")
        refused = (await ensure(stack, "mistral"))["error"]
        assert refused["code"] == "memory_not_released"
        assert "PID 4121, python, 4.0 GiB, not ours" in refused["message"]
        stack.ledger.remove_foreign(pid=4121)

        async def ready() -> bool:
            return (await ensure(stack, "mistral")).get("status") == "ready"

        await until(ready, "it is served when the memory is back")


async def test_memory_that_comes_back_late_is_waited_for(tmp_path: Path) -> None:
    """The next engine starts only when the ledger says the memory is free, which the `release` phase shows."""
    stack = Stack(tmp_path)
    rewrite(stack, {"mistral": sim(tmp_path, "mistral", behaviour=Behaviour(late_release=0.7))})
    async with stack:
        await ensure(stack, "mistral")
        assert (await ensure(stack, "coder"))["previous_model"] == "mistral"
        assert (await stack.status())["last_swaps"][0]["phases"]["release"] >= 0.5
        stack.assert_never_overlapped()


async def test_a_bounded_drain_ends_what_still_runs(tmp_path: Path) -> None:
    """`on_drain_timeout: abort`: the stream gets a retryable error event, and the swap goes on."""
    limits = {"drain_timeout": 0.3, "on_drain_timeout": "abort"}
    async with Stack(tmp_path, scheduling=limits) as stack, aiohttp.ClientSession() as http:
        body = {"model": "mistral", "stream": True, "messages": [], "sim": {"tokens": 10_000, "tokens_per_second": 10}}
        lines: list[bytes] = []
        reading = asyncio.create_task(read(http, f"{stack.base_url}/chat/completions", body, lines))
        await until(lambda: bool(lines), "the stream has begun")
        assert (await ensure(stack, "coder"))["previous_model"] == "mistral"
        await asyncio.wait([reading])
        # Closed without the last chunk, as every stream that broke off.
        assert isinstance(reading.exception(), aiohttp.ClientPayloadError)
        error = json.loads([line for line in lines if line.startswith(b"data: ")][-1][6:])["error"]
        assert error["code"] == "drain_aborted" and error["retry_after_ms"] > 0


async def test_two_orchestrators_never_share_a_state_folder(tmp_path: Path) -> None:
    """The second says whose it is and ends with 2; the first doesn't notice."""
    async with Stack(tmp_path) as stack:
        (owner,) = stack.orchestrators()
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "modelswap.cli.main", "orchestrator", "--config", str(stack.config)),
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await second.communicate()
        assert second.returncode == 2
        assert f"another orchestrator (PID {owner.pid}) uses" in said.decode()
        assert (await ensure(stack, "mistral"))["status"] == "ready"
