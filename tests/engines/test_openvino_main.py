from __future__ import annotations

import asyncio
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.ports import free_port

PATIENCE = 60.0
ENDLESS = 1_000_000

# The real start-up and end, with a model that loads when told to and says x every few milliseconds.
SERVER = """
import pathlib, sys, time
from modelswap.engines.openvino_server.main import main
from modelswap.engines.openvino_server.pipeline import CannotLoad, Result

class Slow:
    def generate(self, prompt, params, on_text):
        count = 0
        for count in range(1, params.max_tokens + 1):
            time.sleep(0.005)
            if not on_text("x"):
                break
        return Result("length", 1, count)

def load(options):
    told = options.model.with_name("load")
    while not told.exists():
        time.sleep(0.005)
    match told.read_text():
        case "fail":
            raise CannotLoad("it is only a test")
        case "import":
            raise ImportError("no such library")
        case "break":
            raise ValueError("who knows")
    return Slow()

sys.exit(main(sys.argv[1:], load))
"""


class Server:
    """A server in a process of its own."""

    def __init__(self, folder: Path, http: aiohttp.ClientSession) -> None:
        self.folder = folder
        self.http = http
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: Process | None = None

    async def start(self, load: str | None = "", *args: str) -> None:
        """Start it; with a model that loads unless ``load`` is None."""
        (self.folder / "server.py").write_text(SERVER)
        if load is not None:
            self.load(load)
        words = ["--model", str(self.folder / "model"), "--served-name", "m", "--port", str(self.port), *args]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, str(self.folder / "server.py"), *words, stderr=PIPE
        )

    def load(self, how: str) -> None:
        """Let the model load."""
        unseen = self.folder / "load.new"
        unseen.write_text(how)
        unseen.replace(self.folder / "load")

    async def health(self, status: int) -> None:
        """Wait until health answers with ``status``."""
        assert self.process
        async with asyncio.timeout(PATIENCE):
            while True:
                assert self.process.returncode is None
                try:
                    async with self.http.get(f"{self.url}/health") as response:
                        if response.status == status:
                            return
                except aiohttp.ClientConnectorError:
                    pass
                await asyncio.sleep(0.01)

    def ask(self, tokens: int, *, stream: bool = False) -> Any:
        """Return a request for so many tokens."""
        body = {"model": "m", "prompt": "p", "max_tokens": tokens, "stream": stream}
        return self.http.post(f"{self.url}/v1/completions", json=body)

    async def count(self, name: str, wanted: int) -> None:
        """Wait until a count in the metrics is as wanted."""
        async with asyncio.timeout(PATIENCE):
            while True:
                async with self.http.get(f"{self.url}/metrics") as response:
                    if f"openvino_requests_{name} {wanted}\n" in await response.text():
                        return
                await asyncio.sleep(0.01)

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal."""
        assert self.process
        self.process.send_signal(number)

    async def ended(self) -> tuple[int, str]:
        """Return its exit status and what it said."""
        assert self.process
        async with asyncio.timeout(PATIENCE):
            _, said = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, said.decode()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """Return a server that isn't started; end it in any case."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as http:
        server = Server(tmp_path, http)
        yield server
        if server.process and server.process.returncode is None:
            server.process.kill()
            await server.process.communicate()


async def test_it_answers_while_it_loads(server: Server) -> None:
    """It listens before the model is loaded, then serves; idle, it ends with status 0 when asked."""
    await server.start(None)
    await server.health(503)
    server.load("")
    await server.health(200)
    async with server.ask(3) as response:
        assert (await response.json())["choices"][0]["text"] == "xxx"
    server.signal()
    status, said = await server.ended()
    assert status == 0
    assert f"loaded {server.folder / 'model'} in" in said


async def test_told_to_end_while_it_loads(server: Server) -> None:
    """A model that is half loaded holds nothing up."""
    await server.start(None)
    await server.health(503)
    server.signal()
    assert (await server.ended())[0] == 0


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("fail", "error: cannot load {model}: it is only a test\n"),
        ("import", "error: cannot import openvino_genai (no such library): pip install 'modelswap[openvino]'\n"),
        ("break", "error: cannot load {model}: ValueError: who knows\n"),
    ],
)
async def test_a_model_that_can_not_be_loaded(server: Server, how: str, reason: str) -> None:
    """It ends by itself with status 1 and one line that says why."""
    await server.start(how)
    status, said = await server.ended()
    assert status == 1
    assert reason.format(model=server.folder / "model") in said


async def test_a_port_that_is_taken(server: Server) -> None:
    """It ends by itself, and says that the address is in use."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", server.port))
        taken.listen()
        await server.start()
        status, said = await server.ended()
    assert status > 0
    assert "address already in use" in said


async def test_wrong_arguments(server: Server) -> None:
    """It ends by itself, and says what it doesn't know."""
    await server.start("", "--nonsense")
    status, said = await server.ended()
    assert status == 2
    assert "unrecognized arguments: --nonsense" in said


async def test_told_to_end_while_it_generates(server: Server) -> None:
    """The running answer is finished, the waiting request is refused with a hint, and then it ends."""
    await server.start()
    await server.health(200)
    async with server.ask(200, stream=True) as running:
        assert (await running.content.readline()).startswith(b"data: ")
        waiting = asyncio.create_task(status_of(server.ask(3)))
        await server.count("waiting", 1)
        server.signal()
        rest = await running.content.read()
        assert rest.endswith(b"data: [DONE]\n\n")
    assert await waiting == 503
    assert (await server.ended())[0] == 0


async def status_of(request: Any) -> int:
    """Return the status that a request is answered with."""
    async with request as response:
        await response.read()
        return int(response.status)


async def test_past_its_grace(server: Server) -> None:
    """An answer that takes longer than the grace is cut off."""
    await server.start("", "--grace", "0.2")
    await server.health(200)
    async with server.ask(ENDLESS, stream=True) as running:
        await running.content.readline()
        server.signal()
        with pytest.raises(aiohttp.ClientError):
            await running.content.read()
    assert (await server.ended())[0] == 0


async def test_told_to_end_twice(server: Server) -> None:
    """The second time, it ends at once."""
    await server.start("", "--grace", str(2 * PATIENCE))
    await server.health(200)
    async with server.ask(ENDLESS, stream=True) as running:
        await running.content.readline()
        server.signal(signal.SIGINT)
        server.signal(signal.SIGTERM)
        status, _ = await server.ended()
    assert status == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_frees_the_model(server: Server, stream: bool) -> None:
    """Over a real connection too: when it closes, an endless generation stops and the next request is served."""
    await server.start()
    await server.health(200)
    leaving = asyncio.create_task(status_of(server.ask(ENDLESS, stream=stream)))
    await server.count("running", 1)
    leaving.cancel()
    await asyncio.wait([leaving])
    assert await status_of(server.ask(3)) == 200
    await server.count("running", 0)


async def test_the_module_runs(server: Server) -> None:
    """`python -m` runs the server, which says that there is no such file."""
    words = ["--model", str(server.folder / "none.gguf"), "--served-name", "m", "--port", str(server.port)]
    server.process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "modelswap.engines.openvino_server", *words, stderr=PIPE
    )
    status, said = await server.ended()
    assert status == 1
    assert "there is no such file or folder" in said
