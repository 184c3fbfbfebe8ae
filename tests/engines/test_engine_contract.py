"""What every `Engine` must do, run against small servers that answer as the real ones do.

To put another engine under the contract, write its fake as a function from a `Script` to a `web.Application`, and add
a `Case` to ``CASES``.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from modelswap.engines.base import Address, CanaryFailed, Engine
from modelswap.engines.registry import engine_for
from modelswap.spec.config import EngineName, Model

KEY = "sesame"
NAME = "ours"


@dataclass
class Script:
    """What a fake shall do, and what it was asked."""

    loading: bool = False
    serves: str = NAME
    redirects: bool = False
    refuses_key: bool = False
    hangs: bool = False
    canary: Callable[[], web.Response] | None = None
    running: int = 0
    waiting: int = 0
    keys: set[str | None] = field(default_factory=set)
    canaries: list[tuple[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """An engine under the contract.

    ``fake`` answers as its server does. ``tells_model`` and ``checks_key``: whether it can notice a server that serves
    another model, or refuses the key, from what is asked for readiness. ``ready_slots`` is what a ready fake tells.
    """

    kind: EngineName
    model: Model
    fake: Callable[[Script], web.Application]
    canary: str
    tells_model: bool = True
    checks_key: bool = True
    ready_slots: int | None = None
    counts_running: bool = True
    counts_waiting: bool = True


def application(script: Script, routes: dict[str, Callable[[Script], Any]], loads_first: bool) -> web.Application:
    """Return a server with ``routes`` (path to JSON or text) and OpenAI's three paths, doing what ``script`` says.

    ``loads_first``: it listens while it loads, answering 503 to everything; else 503 from ``/health`` alone.
    """

    @web.middleware
    async def behave(request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]) -> web.StreamResponse:
        script.keys.add(request.headers.get("authorization"))
        if script.hangs:
            await asyncio.Event().wait()
        if script.redirects:
            raise web.HTTPFound("/elsewhere")
        if script.loading and (loads_first or request.path == "/health"):
            return web.json_response({"error": {"message": "Loading model", "code": 503}}, status=503)
        if script.refuses_key and request.path != "/health":
            return web.json_response({"error": {"message": "Invalid API Key"}}, status=401)
        response = await handler(request)
        assert isinstance(response, web.StreamResponse)
        return response

    def answering(make: Callable[[Script], Any]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(_: web.Request) -> web.Response:
            value = make(script)
            return web.Response(text=value) if isinstance(value, str) else web.json_response(value)

        return handle

    async def infer(request: web.Request) -> web.Response:
        script.canaries.append((request.path, await request.json()))
        if script.canary is not None:
            return script.canary()
        if request.path == "/v1/embeddings":
            return web.json_response({"data": [{"embedding": [0.0], "index": 0}]})
        return web.json_response({"choices": [{"index": 0, "text": "!"}]})

    app = web.Application(middlewares=[behave])
    for path, make in routes.items():
        app.router.add_get(path, answering(make))
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        app.router.add_post(path, infer)
    return app


def fake_vllm(script: Script) -> web.Application:
    """Answer as vLLM 0.33 does; its samples' labels hold spaces and braces on purpose."""
    metrics = (
        "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
        'vllm:num_requests_running{{engine="0",model_name="a {{b}} c"}} {0.running}.0\n'
        'vllm:num_requests_waiting{{engine="0",model_name="a {{b}} c"}} {0.waiting}.0\n'
        'vllm:num_requests_waiting_by_reason{{engine="0",reason="capacity"}} 77.0\n'
    )
    routes: dict[str, Callable[[Script], Any]] = {
        "/health": lambda _: "",
        "/v1/models": lambda s: {"object": "list", "data": [{"id": s.serves, "object": "model"}, {"id": "extra"}]},
        "/metrics": metrics.format,
    }
    return application(script, routes, loads_first=False)


def fake_llamacpp(script: Script) -> web.Application:
    """Answer as llama-server of llama.cpp 0.6.0-dev does."""
    routes: dict[str, Callable[[Script], Any]] = {
        "/health": lambda _: {"status": "ok"},
        "/props": lambda s: {"total_slots": 3, "model_alias": s.serves, "chat_template": "{{ x }}"},
        "/slots": lambda s: [{"id": n, "is_processing": n < s.running} for n in range(8)],
    }
    return application(script, routes, loads_first=True)


def fake_sglang(script: Script) -> web.Application:
    """Answer as SGLang 0.5 does."""
    routes: dict[str, Callable[[Script], Any]] = {
        "/health": lambda _: "",
        "/server_info": lambda _: {"version": "0.5", "internal_states": [{}]},
        "/v1/models": lambda s: {"object": "list", "data": [{"id": s.serves, "object": "model"}]},
        "/v1/loads": lambda s: {
            "loads": [
                {"dp_rank": 0, "num_running_reqs": s.running, "num_waiting_reqs": 0},
                {"dp_rank": 1, "num_running_reqs": 0, "num_waiting_reqs": s.waiting},
            ]
        },
    }
    return application(script, routes, loads_first=True)


def fake_custom(script: Script) -> web.Application:
    """Answer the least that a server can."""
    return application(script, {"/health": lambda _: "ready"}, loads_first=True)


CASES = [
    Case(
        "vllm",
        Model(engine="vllm", model="org/model", program=["/opt/vllm"], api_key=SecretStr(KEY), env={"A": "1"}),
        fake_vllm,
        canary="/v1/completions",
    ),
    Case(
        "llamacpp",
        Model(engine="llamacpp", model="org/model", program=["/opt/llama"], api_key=SecretStr(KEY), env={"A": "1"}),
        fake_llamacpp,
        canary="/v1/completions",
        ready_slots=3,
        counts_waiting=False,
    ),
    Case(
        "sglang",
        Model(engine="sglang", model="org/model", program=["/opt/sglang"], api_key=SecretStr(KEY), env={"A": "1"}),
        fake_sglang,
        canary="/v1/completions",
    ),
    Case(
        "custom",
        Model(
            engine="custom",
            command=["serve", "--listen", "{host}:{port}"],
            canary="chat",
            api_key=SecretStr(KEY),
            env={"A": "1"},
        ),
        fake_custom,
        canary="/v1/chat/completions",
        tells_model=False,
        checks_key=False,
        counts_running=False,
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.kind)
def case(request: pytest.FixtureRequest) -> Case:
    """Each engine in turn."""
    assert isinstance(request.param, Case)
    return request.param


@asynccontextmanager
async def serving(case: Case, script: Script) -> AsyncIterator[tuple[Engine, aiohttp.ClientSession, Address]]:
    """Run the case's fake; yield what its engine needs to ask it."""
    async with TestServer(case.fake(script)) as server, aiohttp.ClientSession() as http:
        assert server.port is not None
        yield engine_for(case.kind), http, Address("127.0.0.1", server.port)


def closed_port() -> Address:
    """Return an address where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Address("127.0.0.1", probe.getsockname()[1])


def test_the_registry_knows_it(case: Case) -> None:
    """The config's word leads to the engine, always the same one."""
    assert engine_for(case.kind).kind == case.kind
    assert engine_for(case.kind) is engine_for(case.kind)


def test_the_command_line_has_the_address_and_no_secret(case: Case) -> None:
    """Whoever lists processes sees where it listens, and never the key."""
    launch = engine_for(case.kind).launch(NAME, case.model, Address("127.0.0.1", 43210))
    line = " ".join(launch.argv)
    assert "43210" in line and "127.0.0.1" in line
    assert KEY not in line
    assert launch.env["A"] == "1"


def test_the_config_goes_before_what_the_engine_thinks(case: Case) -> None:
    """Concurrency, grace and memory of the config file win; without them there are usable defaults."""
    engine = engine_for(case.kind)
    assert engine.slots(case.model) >= 1 and engine.stop_grace(case.model) > 0
    told = case.model.model_copy(update={"concurrency": 5, "stop_grace": 0.0, "memory": 7})
    assert engine.slots(told) == 5
    assert engine.stop_grace(told) == 0.0
    assert engine.device_bytes(told, 100) == 7


async def test_a_refused_connection_is_not_ready_yet(case: Case) -> None:
    """An engine that doesn't listen yet is on its way, not broken."""
    async with aiohttp.ClientSession() as http:
        readiness = await engine_for(case.kind).readiness(http, NAME, case.model, closed_port())
    assert not readiness.ready and readiness.problem is None


async def test_a_loading_engine_is_not_ready_yet(case: Case) -> None:
    """503 while loading is no problem, and no success."""
    async with serving(case, Script(loading=True)) as (engine, http, address):
        readiness = await engine.readiness(http, NAME, case.model, address)
        assert not await engine.healthy(http, case.model, address)
    assert not readiness.ready and readiness.problem is None


async def test_a_ready_engine_is_ready(case: Case) -> None:
    """It serves our model, says its slots if it can, and every question carried the key."""
    script = Script()
    async with serving(case, script) as (engine, http, address):
        readiness = await engine.readiness(http, NAME, case.model, address)
        assert await engine.healthy(http, case.model, address)
    assert readiness.ready and readiness.problem is None
    assert readiness.slots == case.ready_slots
    assert script.keys == {f"Bearer {KEY}"}


async def test_a_redirect_is_not_ready(case: Case) -> None:
    """A login page somewhere else is no healthy engine."""
    async with serving(case, Script(redirects=True)) as (engine, http, address):
        assert not (await engine.readiness(http, NAME, case.model, address)).ready
        assert not await engine.healthy(http, case.model, address)


async def test_another_model_is_a_problem(case: Case) -> None:
    """An engine that serves another model never becomes ready as ours; the problem names both."""
    async with serving(case, Script(serves="theirs")) as (engine, http, address):
        readiness = await engine.readiness(http, NAME, case.model, address)
    assert readiness.ready is not case.tells_model
    if case.tells_model:
        assert readiness.problem is not None and "theirs" in readiness.problem and NAME in readiness.problem


async def test_a_refused_key_is_a_problem(case: Case) -> None:
    """An engine that wants another key never becomes ready; the key isn't in the problem."""
    if not case.checks_key:
        return
    async with serving(case, Script(refuses_key=True)) as (engine, http, address):
        readiness = await engine.readiness(http, NAME, case.model, address)
    assert not readiness.ready and readiness.problem is not None
    assert "api_key" in readiness.problem and KEY not in readiness.problem


async def test_a_hung_engine_leaves_nothing_behind(case: Case) -> None:
    """A question that is given up is over at once, and the session goes on working."""
    script = Script(hangs=True)
    async with serving(case, script) as (engine, http, address):
        for question in (
            engine.readiness(http, NAME, case.model, address),
            engine.healthy(http, case.model, address),
            engine.canary(http, NAME, case.model, address),
        ):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(question, 0.05)
        script.hangs = False
        assert (await engine.readiness(http, NAME, case.model, address)).ready


async def test_the_canary_names_the_model_as_the_engine_does(case: Case) -> None:
    """It is one short request to the path that fits the model."""
    script = Script()
    async with serving(case, script) as (engine, http, address):
        await engine.canary(http, NAME, case.model, address)
    ((path, body),) = script.canaries
    assert path == case.canary
    assert body["model"] == (engine.upstream_name(NAME, case.model) or NAME)
    assert body["max_tokens"] == 1


@pytest.mark.parametrize("kind", ["completion", "chat", "embedding"])
async def test_the_configured_canary_is_sent(case: Case, kind: str) -> None:
    """What the config says goes before what the engine would choose; ``none`` sends nothing."""
    script = Script()
    async with serving(case, script) as (engine, http, address):
        await engine.canary(http, NAME, case.model.model_copy(update={"canary": kind}), address)
        await engine.canary(http, NAME, case.model.model_copy(update={"canary": "none"}), address)
    paths = {"completion": "/v1/completions", "chat": "/v1/chat/completions", "embedding": "/v1/embeddings"}
    assert [path for path, _ in script.canaries] == [paths[kind]]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda: web.json_response({"error": {"message": "CUDA error"}}, status=500), "500: CUDA error"),
        (lambda: web.Response(status=500, text="Internal Server Error"), "500: Internal Server Error"),
        (lambda: web.Response(status=500), r"500: \(nothing\)"),
        (lambda: web.Response(text="<html>"), "no '.*' in answer: <html>"),
        (lambda: web.json_response({"choices": [], "data": []}), "no '.*' in answer"),
        (lambda: web.json_response([1]), "no '.*' in answer"),
    ],
    ids=["500", "500 text", "500 empty", "html", "empty", "list"],
)
async def test_a_bad_canary_says_how(case: Case, answer: Callable[[], web.Response], said: str) -> None:
    """An engine that says it is ready but answers with an error or nonsense is found out, with its own words."""
    async with serving(case, Script(canary=answer)) as (engine, http, address):
        with pytest.raises(CanaryFailed, match=said):
            await engine.canary(http, NAME, case.model, address)


async def test_its_own_count_of_requests(case: Case) -> None:
    """Where the engine counts, running and (if it tells) waiting requests are in it."""
    async with serving(case, Script(running=2, waiting=5)) as (engine, http, address):
        running = await engine.running(http, case.model, address)
    expected = 2 + (5 if case.counts_waiting else 0)
    assert running == (expected if case.counts_running else None)


async def test_a_greedy_answer_is_tokens(case: Case) -> None:
    """It asks for the likeliest tokens, where the canary asks for text, and is over after as many as were wanted."""
    script = Script(canary=lambda: web.json_response({"choices": [{"logprobs": {"tokens": ["a", " b", " c"]}}]}))
    async with serving(case, script) as (engine, http, address):
        assert await engine.greedy(http, NAME, case.model, address, 2) == ("a", " b")
    ((path, body),) = script.canaries
    assert path == case.canary
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (2, 0, 0)
    assert body["model"] == (engine.upstream_name(NAME, case.model) or NAME)


@pytest.mark.parametrize("kind", ["embedding", "none"])
async def test_what_makes_no_text_has_no_greedy_answer(case: Case, kind: str) -> None:
    """An embedder, and a model that isn't to be asked, are left alone."""
    script = Script()
    async with serving(case, script) as (engine, http, address):
        model = case.model.model_copy(update={"canary": kind})
        assert await engine.greedy(http, NAME, model, address, 2) is None
    assert script.canaries == []


async def test_a_greedy_answer_that_is_an_error_raises(case: Case) -> None:
    """A server error is told with its words."""
    script = Script(canary=lambda: web.json_response({"error": {"message": "CUDA error"}}, status=500))
    async with serving(case, script) as (engine, http, address):
        with pytest.raises(CanaryFailed, match="500: CUDA error"):
            await engine.greedy(http, NAME, case.model, address, 2)


def test_it_sleeps_at_known_levels_or_not_at_all(case: Case) -> None:
    """Without a word about sleep it doesn't; with ``sleep: off`` and without a device it never does."""
    engine = engine_for(case.kind)
    assert engine.sleep_levels(case.model) == ()
    willing = case.model.model_copy(update={"sleep": "on"})
    assert set(engine.sleep_levels(willing)) <= {1, 2}
    assert engine.sleep_levels(willing.model_copy(update={"device": "none"})) == ()


@pytest.mark.parametrize("kind", sorted({case.kind for case in CASES}))
def test_a_port_that_was_taken_is_not_the_models_fault(kind: EngineName) -> None:
    """Another program may take a port between its choice and the engine's start: another start may succeed."""
    said = "OSError: [Errno 98] error while attempting to bind on address ('127.0.0.1', 23024): address already in use"
    found = engine_for(kind).diagnose(1, [said])
    assert found.blameless and not found.permanent


async def test_a_dead_engine_raises(case: Case) -> None:
    """Asked for its health or the canary, an engine that is gone is an error of the connection."""
    engine, gone = engine_for(case.kind), closed_port()
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientError):
            await engine.healthy(http, case.model, gone)
        with pytest.raises(aiohttp.ClientError):
            await engine.canary(http, NAME, case.model, gone)


@settings(deadline=None, max_examples=50)
@given(
    kind=st.sampled_from([case.kind for case in CASES]),
    exit_code=st.none() | st.integers(-70, 255),
    log=st.lists(
        st.text(max_size=40) | st.sampled_from(["Traceback (most recent call last):", "usage: x", "error: y"])
    ),
)
def test_every_end_has_a_reason(kind: EngineName, exit_code: int | None, log: list[str]) -> None:
    """Whatever it said last, there are words for the user."""
    diagnosis = engine_for(kind).diagnose(exit_code, log)
    assert diagnosis.reason.strip()
    assert len(diagnosis.reason) < 1000
