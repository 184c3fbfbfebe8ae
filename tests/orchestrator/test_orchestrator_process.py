"""The whole orchestrator as a process, over real engines' processes (the simulated engine)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from modelswap.orchestrator.main import serve
from modelswap.protocol.codec import decode_from_orchestrator, encode
from modelswap.protocol.messages import Catalog, Close, Heartbeat, HeldLease, Hello, Open, OrchestratorMessage
from modelswap.runtimes.process import ProcessRuntime
from modelswap.spec.load import load
from modelswap.testing.engine.options import Options, command
from modelswap.testing.ledger import Ledger
from tests.orchestrator.fakes import DEADLINE

pytestmark = pytest.mark.long

RUN = "import sys; from pathlib import Path; from modelswap.orchestrator.main import run; run(Path(sys.argv[1]))"
GIB = 1 << 30
TERM = 1.0


class Rig:
    """A config file and a state folder, on which orchestrator processes are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.file = folder / "modelswap.yaml"
        self.ledger = Ledger.create(folder / "ledger.json", 10 * GIB, release_delay=0.1)
        self.port = 0
        self.process: asyncio.subprocess.Process | None = None
        self.log: list[str] = []
        self._reading: asyncio.Task[None] | None = None
        self._beating: list[asyncio.Task[None]] = []
        self.url = ""
        self.models: dict[str, dict[str, Any]] = {name: self.engine(name) for name in ("a", "b")}

    def engine(self, name: str, **options: Any) -> dict[str, Any]:
        """Return the config of a simulated engine that takes most of the device."""
        given = Options(model=name, gpu_ledger=str(self.ledger.path), gpu_bytes=8 * GIB, **options)
        return {"engine": "custom", "command": command(given), "memory": "8GiB", "canary": "chat", "stop_grace": 5}

    def write(self) -> None:
        """Write the config file (JSON is YAML)."""
        text = {
            "models": self.models,
            "orchestrator": {"port": self.port, "state_dir": str(self.state), "term": TERM},
            "device": {"kind": "simulated", "ledger": str(self.ledger.path)},
        }
        self.file.write_text(json.dumps(text))

    async def start(self) -> None:
        """Run an orchestrator process and wait until it serves."""
        self.write()
        self.log = []
        env = {key: value for key, value in os.environ.items() if key != "MODELSWAP_TOKEN"}
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", RUN, str(self.file), stderr=asyncio.subprocess.PIPE, env=env
        )
        self._reading = asyncio.create_task(self._read(self.process))
        line = await self.says("serving")
        self.url = next(word[4:] for word in line.split() if word.startswith("url="))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        async for line in process.stderr:
            self.log.append(line.decode().rstrip())

    async def says(self, word: str) -> str:
        """Return the log line with ``word``, once it is there."""
        async with asyncio.timeout(DEADLINE):
            while True:
                for line in self.log:
                    if word in line:
                        return line
                assert self.process is not None and self.process.returncode is None, "\n".join(self.log)
                await asyncio.sleep(0.005)

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Send the process a signal and return its exit status."""
        assert self.process is not None and self._reading is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(DEADLINE):
            status = await self.process.wait()
            await self._reading
        return status

    async def ask(self, method: str, path: str, body: object | None = None) -> tuple[int, Any]:
        """Return status and JSON of an answer."""
        async with aiohttp.ClientSession() as http, http.request(method, self.url + path, json=body) as answer:
            return answer.status, await answer.json()

    async def ensure(self, model: str) -> dict[str, Any]:
        """Make a model resident."""
        status, body = await self.ask("POST", "/ensure_model", {"model": model})
        assert status == 200, body
        found: dict[str, Any] = body
        return found

    async def status_when(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Return ``GET /status`` once ``condition`` holds."""
        async with asyncio.timeout(DEADLINE):
            while True:
                _, body = await self.ask("GET", "/status")
                if condition(body):
                    found: dict[str, Any] = body
                    return found
                await asyncio.sleep(0.01)

    async def connect(
        self, http: aiohttp.ClientSession, gateway: str, *leases: HeldLease
    ) -> aiohttp.ClientWebSocketResponse:
        """Return a gateway's connection, on which it said what it holds, and is never silent."""
        token = (self.state / "token").read_text().strip()
        headers = {"authorization": f"Bearer {token}"}
        connection = await http.ws_connect(self.url + "/gateway", headers=headers)
        await connection.send_str(encode(Hello(gateway=gateway, leases=leases)).decode())
        self._beating.append(asyncio.create_task(self._beat(connection)))
        return connection

    async def _beat(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            while not connection.closed:
                await connection.send_str(encode(Heartbeat()).decode())
                await asyncio.sleep(TERM / 5)

    async def close(self) -> None:
        """End what runs."""
        for task in self._beating:
            task.cancel()
        await asyncio.gather(*self._beating, return_exceptions=True)
        if self.process is not None:
            await self.end(signal.SIGKILL)
        await ProcessRuntime(self.state, 1 << 20).sweep(set())


async def heard(connection: aiohttp.ClientWebSocketResponse, kind: type[OrchestratorMessage]) -> Any:
    """Return the next message of a kind."""
    async with asyncio.timeout(DEADLINE):
        while True:
            message = decode_from_orchestrator(await connection.receive_str())
            if isinstance(message, kind):
                return message


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """Leaves no process behind."""
    made = Rig(tmp_path)
    yield made
    await made.close()


async def test_models_take_turns_and_never_meet_on_the_device(rig: Rig) -> None:
    """Swaps between two engines that don't fit together, whose memory comes back late."""
    await rig.start()
    answers = [await rig.ensure(name) for name in ("a", "b", "a", "b")]
    assert [answer["previous_model"] for answer in answers] == [None, "a", "b", "a"]
    assert len({answer["address"] for answer in answers}) == 4
    account = rig.ledger.read()
    assert account.overlaps == account.overcommits == 0
    _, status = await rig.ask("GET", "/status")
    assert status["devices"][0]["memory"]["total"] == 10 * GIB
    assert await rig.ask("POST", "/shutdown", {"now": False}) == (200, {"status": "finished"})
    assert await rig.end() == 0
    assert rig.ledger.read().instances == set()
    assert not [line for line in rig.log if "Traceback" in line or "[error" in line]


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL], ids=["told to end", "killed"])
async def test_an_engine_outlives_its_orchestrator_and_is_adopted(rig: Rig, ending: signal.Signals) -> None:
    """Same process, same address, nothing loaded anew; the gateway that comes back gets a lease on it."""
    await rig.start()
    async with aiohttp.ClientSession() as http:
        gateway = await rig.connect(http, "g1")
        await heard(gateway, Catalog)
        first = await rig.ensure("a")
        opened = await heard(gateway, Open)
        await rig.end(ending)
        await gateway.close()
        await rig.start()
        await rig.says("adopted")
        gateway = await rig.connect(http, "g1")
        again = await heard(gateway, Open)
        assert (again.host, again.port) == (opened.host, opened.port)
        assert again.epoch > opened.epoch
        await gateway.close()
    second = await rig.ensure("a")
    assert second["mechanism"] == "resident" and second["address"] == first["address"]
    assert rig.ledger.read().overlaps == 0


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL], ids=["told to end", "killed"])
async def test_an_orchestrator_that_ends_amid_a_drain_cuts_nothing(rig: Rig, ending: signal.Signals) -> None:
    """What still streams goes on: its engine is stopped neither by the old orchestrator nor by the next one."""
    await rig.start()
    async with aiohttp.ClientSession() as http:
        gateway = await rig.connect(http, "g1")
        first = await rig.ensure("a")
        opened = await heard(gateway, Open)
        await rig.ask("POST", "/ensure_model", {"model": "b", "wait": False})
        await heard(gateway, Close)
        await rig.end(ending)
        await rig.start()
        held = HeldLease(model="a", epoch=opened.epoch, slots=opened.slots, in_flight=1, closing=True)
        gateway = await rig.connect(http, "g1", held)
        await rig.status_when(lambda s: s["begun"])
        assert (await rig.ensure("a"))["address"] == first["address"]
        await rig.ask("POST", "/ensure_model", {"model": "b", "wait": False})
        await heard(gateway, Close)
        await rig.status_when(lambda s: s["swaps"] and s["swaps"][0]["phase"] == "drain")
        assert [i["state"] for i in (await rig.ask("GET", "/status"))[1]["instances"]] == ["draining"]
        await gateway.close()
    await rig.status_when(lambda s: s["current_model"] == "b")
    assert rig.ledger.read().overlaps == 0


async def test_a_start_outlives_a_killed_orchestrator(rig: Rig) -> None:
    """The next one waits for it and opens it."""
    rig.models["a"] = rig.engine("a", load_seconds=1.5)
    await rig.start()
    await rig.ask("POST", "/ensure_model", {"model": "a", "wait": False})
    (first,) = (await rig.status_when(lambda s: [i for i in s["instances"] if i["stage"]]))["instances"]
    await rig.end(signal.SIGKILL)
    await rig.start()
    (second,) = (await rig.status_when(lambda s: s["current_model"] == "a"))["instances"]
    assert second["instance"] == first["instance"]


async def test_an_engine_whose_definition_changed_meanwhile_is_not_adopted(rig: Rig) -> None:
    """It is a stray, and killed before anything else is started."""
    await rig.start()
    await rig.ensure("a")
    await rig.end(signal.SIGKILL)
    rig.models["a"]["env"] = {"CHANGED": "1"}
    await rig.start()
    await rig.says("its model's definition has changed")
    assert (await rig.ensure("a"))["mechanism"] == "cold"
    assert rig.ledger.read().overlaps == 0


async def test_an_engine_that_dies_is_noticed_and_started_again(rig: Rig) -> None:
    """Its log is told."""
    await rig.start()
    first = await rig.ensure("a")
    port = int(first["address"].rpartition(":")[2])
    (running,) = await ProcessRuntime(rig.state, 1 << 20).instances()
    assert running.address.port == port
    os.kill(running.pid, signal.SIGKILL)
    await rig.status_when(lambda s: s["current_model"] is None)
    second = await rig.ensure("a")
    assert second["address"] != first["address"]


async def test_sighup_reads_the_config_and_a_bad_one_changes_nothing(rig: Rig) -> None:
    """What runs and is the same goes on."""
    await rig.start()
    first = await rig.ensure("a")
    rig.file.write_text("models: {a: {engin: custom}}")
    assert rig.process is not None
    rig.process.send_signal(signal.SIGHUP)
    await rig.says("config not reloaded")
    del rig.models["b"]
    rig.write()
    rig.process.send_signal(signal.SIGHUP)
    await rig.says("config reloaded")
    status, _ = await rig.ask("POST", "/ensure_model", {"model": "b"})
    assert status == 404
    assert (await rig.ensure("a"))["address"] == first["address"]
    assert await rig.end(signal.SIGINT) == 0


async def test_two_orchestrators_of_one_state_folder_are_one_too_many(rig: Rig) -> None:
    """The second one says who has it, and touches nothing."""
    await rig.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUN, str(rig.file), stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(DEADLINE):
        _, errors = await process.communicate()
    assert process.returncode != 0 and b"another orchestrator (PID" in errors


async def test_an_orchestrator_can_be_run_inside_another_program(rig: Rig) -> None:
    """`serve` on the standard event loop begins, answers and ends without leaving tasks behind."""
    rig.write()
    stop = asyncio.Event()
    up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(rig.file, load(rig.file), stop=stop, ready=lambda url: up.set_result(url)))
    rig.url = await up
    assert (await rig.ask("GET", "/health"))[1]["status"] == "ok"
    async with aiohttp.ClientSession() as http, http.get(rig.url + "/events") as answer:
        await answer.content.readline()
        stop.set()
        with contextlib.suppress(aiohttp.ClientError):
            await answer.content.read()
    await serving
    assert asyncio.all_tasks() == {asyncio.current_task()}
