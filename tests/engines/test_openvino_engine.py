from __future__ import annotations

import asyncio
import importlib.util
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
import uvicorn

from modelswap.engines.base import Address, CanaryFailed, Engine
from modelswap.engines.openvino import CannotServe, OpenVino
from modelswap.engines.openvino_server.api import Api
from modelswap.engines.openvino_server.pipeline import Params, Prompt, Result
from modelswap.engines.openvino_server.worker import Worker
from modelswap.engines.programs import NoSuchModel, NotInstalled
from modelswap.spec.config import Model

PATIENCE = 30.0
SOMEWHERE = Address("127.0.0.1", 4242)


class OneWord:
    """A model that always says the same."""

    def __init__(self) -> None:
        self.asked: list[tuple[Prompt, Params]] = []

    def generate(self, prompt: Prompt, params: Params, on_text: Callable[[str], bool]) -> Result:
        """See `Pipeline.generate`."""
        self.asked.append((prompt, params))
        on_text("word")
        return Result("length", 1, 1)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Return the engine with its cache in a temporary folder."""
    return OpenVino({"XDG_CACHE_HOME": str(tmp_path / "cache")})


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Return a file that passes for a model until it is read."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    return path


def described(**fields: object) -> Model:
    """Return a model of this engine."""
    return Model.model_validate({"engine": "openvino", **fields})


def test_command_line(engine: Engine, weights: Path, tmp_path: Path) -> None:
    """Our Python runs the server under our name and aliases; what we decide comes after the user's own arguments."""
    model = described(
        model=str(weights), aliases=["a", "b"], args=["--threads", "1"], env={"K": "v"}, cwd=tmp_path, stop_grace=3.0
    )
    launch = engine.launch("smol", model, SOMEWHERE)
    assert launch.argv == (
        *(sys.executable, "-m", "modelswap.engines.openvino_server"),
        *("--cache-dir", str(tmp_path / "cache" / "modelswap" / "openvino")),
        *("--threads", "1"),
        *("--model", str(weights)),
        *("--served-name", "smol", "--served-name", "a", "--served-name", "b"),
        *("--host", "127.0.0.1", "--port", "4242"),
        *("--grace", "2"),
    )
    assert launch.env == {"K": "v"}
    assert launch.cwd == str(tmp_path)


def test_a_relative_path_is_seen_from_the_working_folder(engine: Engine, weights: Path) -> None:
    """A relative path works with `cwd`, where the engine will look for it, too."""
    launch = engine.launch("smol", described(model=weights.name, cwd=weights.parent), SOMEWHERE)
    assert launch.argv[launch.argv.index("--model") + 1] == weights.name
    assert launch.cwd == str(weights.parent)


def test_not_installed(engine: Engine, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without openvino-genai a start is refused with the command that installs it; nothing is imported to find out."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotInstalled, match=r"pip install 'modelswap\[openvino\]'"):
        engine.launch("smol", described(model=str(weights)), SOMEWHERE)
    launch = engine.launch("smol", described(model=str(weights), program=["/opt/python", "-m", "server"]), SOMEWHERE)
    assert launch.argv[:3] == ("/opt/python", "-m", "server")


def test_what_it_can_not_serve(engine: Engine, weights: Path) -> None:
    """A start that can't go well is refused before anything is put out for it."""
    for name in (None, "org/name", f"{weights}.gone"):
        with pytest.raises(NoSuchModel):
            engine.launch("smol", described(model=name), SOMEWHERE)
    for model in (described(model=str(weights), adapters=["a"]), described(model=str(weights), canary="embedding")):
        with pytest.raises(CannotServe):
            engine.launch("smol", model, SOMEWHERE)


def test_facts(engine: Engine) -> None:
    """It has one slot, knows our names, ends quickly, and takes device memory only if told to use the device."""
    model = described()
    assert engine.slots(model) == 1
    assert engine.slots(described(concurrency=3)) == 3
    assert engine.upstream_name("smol", model) is None
    assert engine.stop_grace(model) == 10.0
    assert engine.stop_grace(described(stop_grace=0.0)) == 0.0
    assert engine.device_bytes(model, 100) == 0
    assert engine.device_bytes(described(args=["--device=GPU.0"]), 100) is None
    assert engine.device_bytes(described(args=["--device", "GPU"], memory=64), 100) == 64


@pytest.mark.parametrize(
    ("exit_code", "log", "words", "permanent"),
    [
        (1, ["error: cannot load /m.gguf: there is no such file or folder"], "cannot load /m.gguf: there is no", True),
        (1, ["error: cannot import openvino_genai (x): pip install 'modelswap[openvino]'"], "pip install", True),
        (1, ["error: cannot load /m.gguf: out of host memory"], "out of host memory", False),
        (-6, ["terminate called after throwing an instance of 'std::bad_alloc'"], "out of host memory", False),
        (-9, ["loading"], "host memory", False),
        (-11, [], "may be damaged", True),
        (2, ["usage: x [-h]", "x: error: unrecognized arguments: --no"], "unrecognized arguments: --no", True),
        (1, ["[Errno 98] error while attempting to bind: address already in use"], "another", False),
        (None, [], "did not become ready", False),
        (7, [], "status 7", False),
    ],
)
def test_diagnosis(engine: Engine, exit_code: int | None, log: list[str], words: str, permanent: bool) -> None:
    """Known failures are named with their remedy, and told apart from those that another try may mend."""
    found = engine.diagnose(exit_code, log)
    assert words in found.reason
    assert found.permanent is permanent


class Served:
    """The real server with a small model, on a real port of this process."""

    def __init__(self) -> None:
        self.pipeline = OneWord()
        self.worker = Worker()
        app = Api(self.worker, ["smol", "alias"], 16, 0).app()
        self.server = uvicorn.Server(uvicorn.Config(app, lifespan="off", ws="none", log_config=None))

    async def serve(self, listener: socket.socket) -> None:
        """Serve until told to end."""
        await self.server.serve([listener])


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """Return a session without a time limit of its own."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout()) as session:
        yield session


@pytest.fixture
async def served() -> AsyncIterator[tuple[Served, Address]]:
    """Return a server whose model isn't loaded yet."""
    served = Served()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1])
        serving = asyncio.create_task(served.serve(listener))
        yield served, address
        served.server.should_exit = True
        async with asyncio.timeout(PATIENCE):
            await serving
    served.worker.close()


async def test_life_over_http(engine: Engine, served: tuple[Served, Address], http: aiohttp.ClientSession) -> None:
    """From loading over ready to the canary, it understands its own server."""
    server, address = served
    model = described(aliases=["alias"])
    assert not (await engine.readiness(http, "smol", model, address)).ready
    assert not await engine.healthy(http, model, address)
    server.worker.pipeline = server.pipeline
    ready = await engine.readiness(http, "smol", model, address)
    assert ready.ready
    assert ready.problem is None
    assert await engine.healthy(http, model, address)
    assert await engine.running(http, model, address) == 0
    await engine.canary(http, "smol", model, address)
    prompt, params = server.pipeline.asked[-1]
    assert prompt.messages
    assert (params.max_tokens, params.temperature) == (1, 0)
    await engine.canary(http, "smol", described(canary="completion"), address)
    assert not server.pipeline.asked[-1][0].messages
    await engine.canary(http, "smol", described(canary="none"), address)
    assert len(server.pipeline.asked) == 2


async def test_another_model_answers(
    engine: Engine, served: tuple[Served, Address], http: aiohttp.ClientSession
) -> None:
    """A server that serves another name is a problem, and fails the canary."""
    server, address = served
    server.worker.pipeline = server.pipeline
    found = await engine.readiness(http, "other", described(), address)
    assert not found.ready
    assert found.problem
    assert "smol" in found.problem
    with pytest.raises(CanaryFailed, match="404"):
        await engine.canary(http, "other", described(), address)


async def test_nobody_listens(engine: Engine, http: aiohttp.ClientSession) -> None:
    """A refused connection means that it isn't ready yet; a health check passes the error on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1])
    assert not (await engine.readiness(http, "smol", described(), address)).ready
    with pytest.raises(aiohttp.ClientConnectorError):
        await engine.healthy(http, described(), address)
