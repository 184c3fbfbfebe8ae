"""Engines in containers: what an image is told, and what is expected of somebody else's container."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from modelswap.engines.base import Address, CanaryFailed
from modelswap.engines.custom import Custom
from modelswap.engines.llamacpp import LlamaCpp
from modelswap.engines.programs import only_wraps
from modelswap.engines.registry import engine_for
from modelswap.engines.vllm import Vllm
from modelswap.protocol.errors import ModelswapError
from modelswap.spec.config import EngineName, Model

INSIDE = Address("0.0.0.0", 8000)
MODULE = ("python3", "-m", "vllm.entrypoints.openai.api_server")
TAIL = ("--served-model-name", "ours", "x", "--host", "0.0.0.0", "--port", "8000")


def managed(**given: Any) -> Model:
    """Return a model with an image."""
    return Model.model_validate({"model": "org/m", "image": "i", **given})


def adopted(**given: Any) -> Model:
    """Return a model in somebody else's container."""
    return Model.model_validate({"container": "llm", **given})


@pytest.mark.parametrize(
    ("entrypoint", "begins"),
    [
        (("vllm", "serve"), ("vllm", "serve", "org/m")),
        (("/usr/bin/vllm",), ("/usr/bin/vllm", "serve", "org/m")),
        (MODULE, (*MODULE, "--model", "org/m")),
        ((), ("vllm", "serve", "org/m")),
        (("/usr/bin/tini", "--"), ("/usr/bin/tini", "--", "vllm", "serve", "org/m")),
        (("/opt/nvidia/nvidia_entrypoint.sh",), ("/opt/nvidia/nvidia_entrypoint.sh", "vllm", "serve", "org/m")),
        (("tini", "--", "vllm", "serve"), ("tini", "--", "vllm", "serve", "org/m")),
        (("/start.sh",), ("/start.sh", "--model", "org/m")),
    ],
)
def test_an_image_of_vllm_is_told_the_model_as_its_entrypoint_wants(
    entrypoint: tuple[str, ...], begins: tuple[str, ...]
) -> None:
    """The command, the module, an image without either, and inits that run whatever they are given."""
    model = managed(args=["--max-model-len", "8192"], aliases=["x"], api_key="k3y", env={"A": "1"})
    launch = Vllm().launch("ours", model, INSIDE, entrypoint)
    assert launch.argv == (*begins, "--max-model-len", "8192", *TAIL)
    assert launch.env == {"A": "1", "VLLM_API_KEY": "k3y"}


def test_paths_of_a_container_are_left_alone(tmp_path: Path) -> None:
    """What lies on this machine under the same path has nothing to do with it."""
    (tmp_path / "m").mkdir()
    for text in ("~/m", "m", "/models/m"):
        assert text in Vllm().launch("ours", managed(model=text, cwd=tmp_path), INSIDE, ("vllm", "serve")).argv
    launch = LlamaCpp().launch(
        "ours", managed(engine="llamacpp", model="/no/such.gguf"), INSIDE, ("/app/llama-server",)
    )
    assert launch.argv[:3] == ("/app/llama-server", "-m", "/no/such.gguf")


@pytest.mark.parametrize(
    ("entrypoint", "begins"),
    [
        (("/app/llama-server",), ("/app/llama-server",)),
        (("/app/tools.sh",), ("/app/tools.sh", "--server")),
        ((), ("llama-server",)),
        (("tini", "--"), ("tini", "--", "llama-server")),
    ],
)
def test_an_image_of_llamacpp_is_told_the_model(entrypoint: tuple[str, ...], begins: tuple[str, ...]) -> None:
    """The ``server`` and ``full`` images, and one that has only the program."""
    model = managed(engine="llamacpp", model="org/m-GGUF:Q4_K_M", args=["-c", "4096"], api_key="k3y")
    launch = LlamaCpp().launch("ours", model, INSIDE, entrypoint)
    tail = ("-c", "4096", "--alias", "ours", "--host", "0.0.0.0", "--port", "8000")
    assert launch.argv == (*begins, "-hf", "org/m-GGUF:Q4_K_M", *tail)
    assert launch.env == {"LLAMA_API_KEY": "k3y"}


@pytest.mark.parametrize(("model", "option"), [("m.gguf", "-m"), ("/m", "-m"), ("org/m", "-hf")])
def test_a_file_in_a_container_is_known_by_its_look(model: str, option: str) -> None:
    """Nobody can look into the container beforehand."""
    launch = LlamaCpp().launch("ours", managed(engine="llamacpp", model=model), INSIDE, ("llama-server",))
    assert launch.argv[1:3] == (option, model)


def test_a_custom_image_is_told_command_and_args_after_its_entrypoint() -> None:
    """As compose's ``command``; with the address inside the container, and alone if there is nothing to add."""
    model = managed(engine="custom", command=["--listen", "{host}:{port}"], args=["-v"], env={"PORT": "{port}"})
    launch = Custom().launch("ours", model, INSIDE, ("tgi",))
    assert launch.argv == ("tgi", "--listen", "0.0.0.0:8000", "-v") and launch.env == {"PORT": "8000"}
    assert Custom().launch("ours", managed(engine="custom"), INSIDE, ("tgi", "run")).argv == ("tgi", "run")
    assert Custom().launch("ours", managed(engine="custom", command=["serve"]), INSIDE, ()).argv == ("serve",)


def test_a_custom_image_that_starts_nothing_needs_a_command() -> None:
    """The message says that the image is the reason."""
    with pytest.raises(ModelswapError, match="needs a 'command': its image has no entrypoint"):
        Custom().launch("ours", managed(engine="custom"), INSIDE, ())


def test_what_only_wraps() -> None:
    """An init with options runs what follows; with a program behind it, it is that program."""
    assert only_wraps(()) and only_wraps(("/sbin/tini", "-g", "--"))
    assert not only_wraps(("/sbin/tini", "--", "serve")) and not only_wraps(("serve",))


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("vllm", {}, "ours"),
        ("vllm", {"model": "org/m"}, "org/m"),
        ("llamacpp", {}, None),
        ("llamacpp", {"model": "org/m"}, "org/m"),
        ("custom", {}, "ours"),
        ("custom", {"model": "org/m"}, "org/m"),
    ],
)
def test_somebody_elses_container_is_asked_for_what_it_serves(
    kind: EngineName, given: dict[str, str], expected: str | None
) -> None:
    """It was started without our names: ``model`` says its own; llama.cpp answers to any."""
    assert engine_for(kind).upstream_name("ours", adopted(engine=kind, aliases=["x"], **given)) == expected


def test_an_image_is_told_our_names() -> None:
    """Requests to a container that we made need no rewriting."""
    assert Vllm().upstream_name("ours", managed()) is None
    assert LlamaCpp().upstream_name("ours", managed(engine="llamacpp")) is None


def test_numbers_of_somebody_elses_container_come_from_the_config() -> None:
    """Its options are unknown: slots and memory are what the config says, else usual or untold."""
    assert Vllm().slots(adopted()) == 256 and Vllm().slots(adopted(concurrency=8)) == 8
    assert Vllm().device_bytes(adopted(), 1000) is None
    assert Vllm().device_bytes(adopted(memory=7), 1000) == 7
    assert Vllm().device_bytes(managed(args=["--gpu-memory-utilization", "0.5"]), 1000) == 500


def test_every_engine_has_a_usual_port() -> None:
    """Where a container listens if nobody says otherwise."""
    kinds: tuple[EngineName, ...] = ("vllm", "llamacpp", "custom")
    assert [engine_for(kind).port() for kind in kinds] == [8000, 8080, 8000]


@asynccontextmanager
async def serving(
    serves: str, answers: dict[str, int], asked: list[tuple[str, str]], *, props: bool = False
) -> AsyncIterator[tuple[aiohttp.ClientSession, Address]]:
    """Run a server that serves the model called ``serves`` and answers inference paths with ``answers``."""

    async def infer(request: web.Request) -> web.Response:
        asked.append((request.path, (await request.json())["model"]))
        return web.json_response({"choices": [{}], "data": [{}]}, status=answers.get(request.path, 404))

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": serves}, {"id": "z-adapter"}] if serves else []})

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def told(_: web.Request) -> web.Response:
        return web.json_response({"total_slots": 3, "model_alias": serves} if props else {})

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/props", told)
    app.router.add_post("/{path:.*}", infer)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        yield http, Address("127.0.0.1", server.port or 0)


async def test_vllm_of_somebody_else_must_serve_what_the_config_says() -> None:
    """By its own name it is ready; by another it never will be, and the message says what to write."""
    async with serving("org/m", {}, []) as (http, address):
        assert (await Vllm().readiness(http, "ours", adopted(model="org/m"), address)).ready
        unsaid = await Vllm().readiness(http, "ours", adopted(), address)
        wrong = await Vllm().readiness(http, "ours", adopted(model="org/other"), address)
        made_by_us = await Vllm().readiness(http, "ours", managed(), address)
    assert unsaid.problem == "it serves org/m, z-adapter, not ours; say model: org/m"
    assert wrong.problem == "it serves org/m, z-adapter, not org/other; say model: org/m"
    assert made_by_us.problem == "it serves org/m, z-adapter, not ours"


async def test_vllm_of_somebody_else_that_serves_nothing() -> None:
    """There is nothing to suggest then."""
    async with serving("", {}, []) as (http, address):
        told = await Vllm().readiness(http, "ours", adopted(model="org/m"), address)
    assert told.problem == "it serves no model, not org/m"


@pytest.mark.parametrize("props", [True, False])
async def test_llamacpp_of_somebody_else_is_ready_by_any_name_unless_one_is_said(props: bool) -> None:
    """Without ``model`` whatever it serves is meant; with one, another is a problem. Old servers likewise."""
    async with serving("weights.gguf", {}, [], props=props) as (http, address):
        assert (await LlamaCpp().readiness(http, "ours", adopted(engine="llamacpp"), address)).ready
        named = adopted(engine="llamacpp", model="weights.gguf")
        assert (await LlamaCpp().readiness(http, "ours", named, address)).ready
        other = await LlamaCpp().readiness(http, "ours", adopted(engine="llamacpp", model="other"), address)
        made_by_us = await LlamaCpp().readiness(http, "ours", managed(engine="llamacpp"), address)
    assert other.problem is not None and "weights.gguf" in other.problem
    assert made_by_us.problem is not None


@pytest.mark.parametrize("kind", ["vllm", "llamacpp"])
async def test_the_canary_of_somebody_elses_container_finds_what_it_can(kind: EngineName) -> None:
    """Whether it completes, chats or embeds isn't known from options; the first that works is enough."""
    engine = engine_for(kind)
    paths = ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]
    for works in range(3):
        asked: list[tuple[str, str]] = []
        async with serving("org/m", {paths[works]: 200}, asked) as (http, address):
            await engine.canary(http, "ours", adopted(engine=kind, model="org/m"), address)
        assert asked == [(path, "org/m") for path in paths[: works + 1]]
    async with serving("org/m", {}, []) as (http, address):
        with pytest.raises(CanaryFailed, match="the completion canary was answered with 404"):
            await engine.canary(http, "ours", adopted(engine=kind, model="org/m"), address)
        with pytest.raises(CanaryFailed, match="the embedding canary"):
            await engine.canary(http, "ours", adopted(engine=kind, canary="embedding"), address)
