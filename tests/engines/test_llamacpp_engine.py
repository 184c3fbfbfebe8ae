"""llama-server's command line, slots and last words."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from modelswap.engines.base import Address
from modelswap.engines.llamacpp import LlamaCpp
from modelswap.engines.programs import NoSuchModel, NotInstalled
from modelswap.spec.config import Model

ADDRESS = Address("127.0.0.1", 8123)


def model(**given: Any) -> Model:
    """Return a llama.cpp model whose program is said, so that nothing is looked for."""
    return Model.model_validate({"engine": "llamacpp", "model": "org/m:Q4", "program": ["/opt/llama-server"], **given})


@asynccontextmanager
async def answering(answers: dict[str, Callable[[], web.Response]]) -> AsyncIterator[tuple[Any, Address]]:
    """Serve ``answers`` by path, 404 for the rest; yield a session and the address."""

    async def handle(request: web.Request) -> web.Response:
        make = answers.get(request.path)
        return make() if make else web.json_response({"error": {"message": "File Not Found"}}, status=404)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        yield http, Address("127.0.0.1", server.port or 0)


def test_a_file_and_a_hub_id(tmp_path: Path) -> None:
    """A file goes to ``-m``, anything that can't be one to ``-hf``; our options come last, where they win."""
    file = tmp_path / "m.gguf"
    file.touch()
    tail = ("--alias", "ours,b,a", "--host", "127.0.0.1", "--port", "8123")
    launch = LlamaCpp().launch("ours", model(model=str(file), args=["--port", "1"], aliases=["b", "a"]), ADDRESS)
    assert launch.argv == ("/opt/llama-server", "-m", str(file), "--port", "1", *tail)
    launch = LlamaCpp().launch("ours", model(aliases=["b", "a"]), ADDRESS)
    assert launch.argv == ("/opt/llama-server", "-hf", "org/m:Q4", *tail)


def test_a_file_seen_from_the_working_folder_and_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path counts from ``cwd``, where the engine runs; ``~`` is replaced."""
    (tmp_path / "m.gguf").touch()
    launch = LlamaCpp().launch("ours", model(model="m.gguf", cwd=str(tmp_path)), ADDRESS)
    assert launch.argv[1:3] == ("-m", "m.gguf") and launch.cwd == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LlamaCpp().launch("ours", model(model="~/m.gguf"), ADDRESS).argv[2] == str(tmp_path / "m.gguf")


@pytest.mark.parametrize("path", ["/models/none.gguf", "none.gguf", "./none", "~/none"])
def test_a_file_that_is_not_there_is_told_before_anything_starts(path: str, tmp_path: Path) -> None:
    """What can only be a file must exist."""
    with pytest.raises(NoSuchModel, match=r"there is no file .*mend 'model'"):
        LlamaCpp().launch("ours", model(model=path, cwd=str(tmp_path)), ADDRESS)


def test_the_program_is_found_or_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    """PATH is searched when ``program`` isn't given."""
    with pytest.raises(NotInstalled, match=r"not on PATH.*program: \["):
        LlamaCpp().launch("ours", model(program=None, env={"PATH": str(tmp_path)}), ADDRESS)
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    launch = LlamaCpp().launch("ours", model(program=None, env={"PATH": str(tmp_path)}), ADDRESS)
    assert launch.argv[0] == str(program)


def test_names_with_commas_are_no_aliases() -> None:
    """The server would take them for two names; it answers to any name, so they work all the same."""
    launch = LlamaCpp().launch("a,b", model(aliases=["c"]), ADDRESS)
    assert launch.argv[launch.argv.index("--alias") + 1] == "c"
    assert "--alias" not in LlamaCpp().launch("a,b", model(), ADDRESS).argv


def test_the_key_is_in_the_environment() -> None:
    """The key is never an argument."""
    launch = LlamaCpp().launch("ours", model(api_key="k3y", env={"A": "b"}), ADDRESS)
    assert launch.env == {"A": "b", "LLAMA_API_KEY": "k3y"}
    assert LlamaCpp().upstream_name("ours", model()) is None
    assert LlamaCpp().device_bytes(model(), 1000) is None


@pytest.mark.parametrize(
    ("given", "slots"),
    [
        ({}, 1),
        ({"args": ["-np", "4"]}, 4),
        ({"args": ["--parallel=3"]}, 3),
        ({"args": ["--n-parallel", "2"]}, 2),
        ({"args": ["-np", "-1"]}, 1),
        ({"env": {"LLAMA_ARG_N_PARALLEL": "6"}}, 6),
    ],
)
def test_slots_before_it_could_be_asked(given: dict[str, Any], slots: int) -> None:
    """What is said on the command line or in the environment counts, else one until ``/props`` tells."""
    assert LlamaCpp().slots(model(**given)) == slots


async def test_its_first_alias_by_the_alphabet_is_ours_too() -> None:
    """llama-server reports the alphabetically first of its aliases; older ones all in one text."""
    given = model(aliases=["a"])
    for alias in ("a", "ours", "ours,a", ""):
        props = {"total_slots": 0, "model_alias": alias}
        async with answering({"/props": functools.partial(web.json_response, props)}) as (http, address):
            readiness = await LlamaCpp().readiness(http, "ours", given, address)
            assert readiness.ready and readiness.slots is None


async def test_servers_without_props_get_the_long_way() -> None:
    """Forks and old builds are ready when they are healthy and list us."""
    listing = {"data": [{"id": "x", "aliases": ["ours", 3]}, "odd", {"id": 3}]}
    answers = {
        "/health": lambda: web.json_response({"status": "ok"}),
        "/v1/models": lambda: web.json_response(listing),
    }
    async with answering(answers) as (http, address):
        assert (await LlamaCpp().readiness(http, "ours", model(), address)).ready
        readiness = await LlamaCpp().readiness(http, "other", model(), address)
        assert readiness.problem == "it serves ours, x, not other"
    async with answering({"/health": lambda: web.Response(status=503)}) as (http, address):
        assert (await LlamaCpp().readiness(http, "ours", model(), address)).stage == "loading"
    async with answering({"/health": lambda: web.Response(), "/v1/models": lambda: web.Response(status=401)}) as asked:
        assert "api_key" in str((await LlamaCpp().readiness(asked[0], "ours", model(), asked[1])).problem)
    async with answering({"/health": lambda: web.Response()}) as (http, address):
        assert (await LlamaCpp().readiness(http, "ours", model(), address)).stage == "loading"


async def test_with_metrics_deferred_requests_count_too() -> None:
    """``--metrics`` gives the whole count; without ``/slots`` or ``/metrics`` there is none."""
    text = "# TYPE llamacpp:requests_processing gauge\nllamacpp:requests_processing 1\nllamacpp:requests_deferred 2\n"
    async with answering({"/metrics": lambda: web.Response(text=text)}) as (http, address):
        assert await LlamaCpp().running(http, model(args=["--metrics"]), address) == 3
        assert await LlamaCpp().running(http, model(), address) is None
    async with answering({}) as (http, address):
        assert await LlamaCpp().running(http, model(args=["--metrics"]), address) is None


async def test_embedders_are_asked_for_an_embedding_and_rerankers_for_nothing() -> None:
    """The canary fits what the server was started for."""
    async with answering({"/v1/embeddings": lambda: web.json_response({"data": [{}]})}) as (http, address):
        await LlamaCpp().canary(http, "ours", model(args=["--embeddings"]), address)
        await LlamaCpp().canary(http, "ours", model(args=["--reranking"]), address)


@pytest.mark.parametrize(
    ("log", "permanent", "said"),
    [
        pytest.param("error: invalid argument: --nope", True, "it doesn't know some of args: invalid argument: --nope"),
        pytest.param(
            'error while handling argument "--parallel": stoi\n\nusage:\n-np, --parallel N',
            True,
            'it doesn\'t accept args: "--parallel": stoi',
        ),
        pytest.param(
            "0.00.004 E gguf_init_from_file: failed to open GGUF file '/m.gguf' (No such file or directory)\n"
            "0.00.005 E srv  llama_server: exiting due to model loading error",
            True,
            "there is no file /m.gguf; mend 'model', or put the file there",
        ),
        pytest.param(
            "0.00.004 E gguf_init_from_reader: invalid magic characters: 'hell', expected 'GGUF'",
            True,
            "the model file is not a whole GGUF file; download it again (a broken download is the usual cause)",
        ),
        pytest.param(
            "llama_model_load: error loading model: unknown model architecture: 'foo5'",
            True,
            "this llama-server doesn't know the architecture foo5; update llama.cpp, or use another model",
        ),
        pytest.param(
            "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 45108.64 MiB on device 0: cudaMalloc failed:"
            " out of memory\nllama_model_load: error loading model: unable to allocate CUDA0 buffer",
            True,
            "device 0 ran out of memory: 45108.64 MiB more were wanted; offload fewer layers (--n-gpu-layers), take a"
            " smaller --ctx-size, or a smaller model",
        ),
        pytest.param(
            "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache",
            True,
            "it ran out of memory; offload fewer layers (--n-gpu-layers), take a smaller --ctx-size,"
            " or a smaller model",
        ),
        pytest.param(
            "E srv start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18433",
            False,
            "its port was taken by another program; the next start uses another port",
        ),
        pytest.param(
            "E llama_model_load_from_file_impl: exactly one out metadata, path_model, and file must be defined",
            True,
            "this llama-server can't download models (it was built without HTTPS); download the file,"
            " and give its path",
        ),
        pytest.param(
            "llama-server: error while loading shared libraries: libllama.so.0: cannot open shared object file",
            True,
            "the program lacks the shared library libllama.so.0; install it, or say where it is with"
            " env: {LD_LIBRARY_PATH: …}",
        ),
        pytest.param(
            "common_download_file_single: failed, status code 401",
            True,
            "Hugging Face refuses the download; accept the model's licence and give a token:"
            ' env: {HF_TOKEN: "${HF_TOKEN}"}',
        ),
    ],
)
def test_the_last_words_become_a_reason_with_a_remedy(log: str, permanent: bool, said: str) -> None:
    """Known causes, in llama.cpp's own words, are told in the user's."""
    diagnosis = LlamaCpp().diagnose(1, log.splitlines())
    assert (diagnosis.reason, diagnosis.permanent) == (said, permanent)


def test_a_build_for_another_processor_is_told_so() -> None:
    """SIGILL has one cause, and it stays."""
    diagnosis = LlamaCpp().diagnose(-4, ["0.00.476 I cmn init: llama threadpool init, n_threads = 2"])
    assert diagnosis.permanent
    assert diagnosis.reason == (
        "it was killed by SIGILL: the program was built for another processor; build or install it for this one"
    )
