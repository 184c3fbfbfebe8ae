"""The runtimes that the contract is tested on, and what drives them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from modelswap.engines.base import Address, Launch
from modelswap.runtimes.base import Running, Runtime, StartOrder
from modelswap.runtimes.portable import PsutilTable
from modelswap.runtimes.process import ProcessRuntime
from modelswap.runtimes.processes import ProcessTable
from modelswap.spec.config import Model
from tests.runtimes import saying

ENGINE = Path(__file__).with_name("engine_script.py")
SPEC = Model(engine="custom", command=["stand-in"])


class Host:
    """Drives one runtime: makes orders for stand-in engines, and waits for what they say."""

    def __init__(self, state_dir: Path, renew: Callable[[], ProcessRuntime]) -> None:
        self.state_dir = state_dir
        self.renew = renew
        self.process_runtime = renew()

    @property
    def runtime(self) -> Runtime:
        """The runtime under test, by its contract."""
        return self.process_runtime

    def launch(self, behaviour: str, argument: object = "", env: dict[str, str] | None = None) -> Launch:
        """Return how to start a stand-in engine."""
        return Launch((sys.executable, "-S", "-E", str(ENGINE), behaviour, str(argument)), env or {})

    def order(self, launch: Launch, address: Address, model: str = "some/model") -> StartOrder:
        """Return an order with an instance id of its own."""
        instance = uuid.uuid4().hex
        return StartOrder(
            instance=instance, model=model, definition="digest", spec=SPEC, launch=launch, address=address
        )

    async def allocate(self) -> Address:
        """Return an address for a start."""
        return (await self.runtime.allocate(SPEC)).address

    async def start(self, behaviour: str, argument: object = None, model: str = "some/model") -> Running:
        """Start a stand-in engine; its argument is the port if not told otherwise."""
        address = await self.allocate()
        launch = self.launch(behaviour, address.port if argument is None else argument)
        return await self.runtime.start(self.order(launch, address, model))

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Return when the condition holds; fails after `saying.DEADLINE` seconds."""
        await saying.until(condition)

    async def says(self, running: Running, word: str) -> list[str]:
        """Return the log's words after ``word``, once the engine has said it."""
        return await saying.says(self.runtime, running, word)


@contextlib.asynccontextmanager
async def process_host(table: str, state_dir: Path) -> AsyncIterator[Host]:
    """Give a host for a way of looking at processes; nothing is left over when the test is done."""

    def renew() -> ProcessRuntime:
        chosen: ProcessTable | None = PsutilTable() if table == "psutil" else None
        return ProcessRuntime(state_dir, 64 * 1024, table=chosen)

    host = Host(state_dir, renew)
    yield host
    await host.process_runtime.sweep(set())
    assert await host.process_runtime.sweep(set()) == []


@pytest.fixture(params=["procfs", "psutil"])
async def host(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Host]:
    """Give a host for each way of looking at processes."""
    async with process_host(request.param, tmp_path / "state") as host:
        yield host


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """Give a process that is none of ours, leading a session of its own."""
    script = "import time, sys; print(flush=True); time.sleep(1000)"
    argv = [sys.executable, "-S", "-E", "-c", script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True) as popen:
        assert popen.stdout is not None
        popen.stdout.read(1)
        yield popen
        popen.kill()
