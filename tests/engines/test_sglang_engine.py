"""SGLang's own ways: its command line, its counts, and why it did not start."""

from __future__ import annotations

import importlib.util
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from modelswap.engines.base import Address
from modelswap.engines.programs import NotInstalled
from modelswap.engines.sglang import SGLang
from modelswap.spec.config import Model

MODULE = ("python3", "-m", "sglang.launch_server")
INSIDE = Address("0.0.0.0", 30000)
REPLICA = {"num_running_reqs": 2, "num_waiting_reqs": 1}
TAIL = ("--served-model-name", "ours", "--host", "0.0.0.0", "--port", "30000")


def model(**given: Any) -> Model:
    """Return a model for SGLang."""
    return Model.model_validate({"engine": "sglang", "model": "org/m", **given})


@pytest.mark.parametrize(
    ("entrypoint", "begins"),
    [
        ((), MODULE),
        (("/opt/nvidia/nvidia_entrypoint.sh",), ("/opt/nvidia/nvidia_entrypoint.sh", *MODULE)),
        (MODULE, MODULE),
        (("/usr/bin/sglang",), ("/usr/bin/sglang", "serve")),
        (("sglang", "serve"), ("sglang", "serve")),
        (("/start.sh",), ("/start.sh",)),
    ],
)
def test_an_image_is_told_the_model_as_its_entrypoint_wants(
    entrypoint: tuple[str, ...], begins: tuple[str, ...]
) -> None:
    """The usual images have no program of their own; others have the module or the command."""
    launch = SGLang().launch("ours", model(image="i", args=["--tp", "2"], api_key="k3y"), INSIDE, entrypoint)
    assert launch.argv == (*begins, "--model-path", "org/m", "--tp", "2", *TAIL)
    assert launch.env == {}


def test_it_has_one_name_without_a_colon() -> None:
    """What follows a colon would be taken for an adapter; aliases become the one name."""
    given = model(program=["/x"], aliases=["other"])
    launch = SGLang().launch("qwen:7b", given, INSIDE)
    assert launch.argv[launch.argv.index("--served-model-name") + 1] == "qwen-7b"
    assert "other" not in launch.argv
    assert SGLang().upstream_name("qwen:7b", given) == "qwen-7b"
    assert SGLang().upstream_name("qwen:7b", model(container="c")) == "org/m"


def test_numbers_come_from_its_arguments() -> None:
    """Slots and memory as given there, else the defaults; of somebody else's container no memory is known."""
    engine = SGLang()
    assert (engine.slots(model()), engine.slots(model(args=["--max-running-requests", "8"]))) == (256, 8)
    assert (engine.device_bytes(model(), 100), engine.port()) == (85, 30000)
    assert engine.device_bytes(model(args=["--mem-fraction-static=0.5"]), 100) == 50
    assert engine.device_bytes(model(container="c"), 100) is None


def test_without_it_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is looked for as a module and on PATH."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(NotInstalled, match="pip install sglang"):
        SGLang().launch("a", model(env={"PATH": "/nowhere"}), INSIDE)


@pytest.mark.parametrize(
    ("routes", "count"),
    [
        ({"/v1/loads": {"loads": [REPLICA, REPLICA]}}, 6),
        ({"/get_load": [{"dp_rank": 0, "num_reqs": 3, "num_waiting_reqs": 1}]}, 3),
        ({"/v1/loads": {"loads": []}, "/get_load": [{"num_reqs": 1}]}, 1),
        ({"/v1/loads": {"loads": [{"num_running_reqs": "many"}]}}, None),
        ({"/get_load": ["?"]}, None),
        ({}, None),
    ],
)
async def test_requests_are_counted_in_new_and_old_versions(routes: dict[str, Any], count: int | None) -> None:
    """Both paths, every replica; nonsense is no count."""
    app = web.Application()
    for path, answer in routes.items():

        async def reply(_: web.Request, said: Any = answer) -> web.Response:
            return web.json_response(said)

        app.router.add_get(path, reply)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        assert server.port is not None
        assert await SGLang().running(http, model(), Address("127.0.0.1", server.port)) == count


@pytest.mark.parametrize(("path", "well"), [("/server_info", True), ("/get_server_info", True), ("/health", False)])
async def test_health_generates_nothing(path: str, well: bool) -> None:
    """New and old versions are asked for their scheduler's state, and never for ``/health``."""
    app = web.Application()
    asked: list[str] = []

    async def reply(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({})

    app.router.add_get(path, reply)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        assert server.port is not None
        assert await SGLang().healthy(http, model(), Address("127.0.0.1", server.port)) is well
    assert "/health" not in asked


@pytest.mark.parametrize(
    ("line", "reason", "permanent"),
    [
        (
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
            "raise --mem-fraction",
            True,
        ),
        ("ValueError: The memory capacity is unbalanced. Some GPUs may be occupied", "another program holds", False),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0", "2.00 GiB more", True),
        ("ImportError: No module named 'torch_memory_saver'", "pip install torch-memory-saver", True),
        ("launch_server.py: error: unrecognized arguments: --foo", "--foo", True),
        ("OSError: org/x is not a local folder and is not a valid model identifier", "called org/x", True),
        ("/usr/bin/python3: No module named sglang", "'program' has no sglang", True),
        ("RuntimeError: No CUDA GPUs are available", "no usable GPU", True),
    ],
)
def test_known_causes_have_a_remedy(line: str, reason: str, permanent: bool) -> None:
    """What is left of a failed start is told in words for the user."""
    found = SGLang().diagnose(1, ["[2026-01-01 10:00:00] INFO", line])
    assert reason in found.reason
    assert found.permanent is permanent
