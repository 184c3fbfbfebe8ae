"""Containers that wait for their model: a stand-in script instead of vLLM's, on a real Docker Engine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from modelswap.engines.base import StandbyPlan
from modelswap.runtimes.base import Exit, Running, StandbyState, StartOrder
from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.body import OWNER, STANDBY
from modelswap.spec.config import Model
from tests.runtimes.docker_host import PORT, DockerHost, docker_host
from tests.runtimes.saying import until

pytestmark = pytest.mark.docker

GRACE = 20.0
WAITER = """
import json, os, socket, sys
what, path = sys.argv[1:3]
mode = os.environ.get("MODE", "")
if what == "tell":
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    connection.sendall(sys.stdin.buffer.readline())
    sys.stdout.write(connection.makefile().readline())
    sys.exit()
if mode == "unfit":
    sys.exit("standby: this vLLM has no such thing")
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
while True:
    connection, _ = listener.accept()
    said = json.loads(connection.makefile("rb").readline())
    if said.get("ask"):
        connection.sendall(b'{"ready": true, "version": "1"}\\n')
        connection.close()
        continue
    if mode == "refuse":
        connection.sendall(b'{"error": "not today"}\\n')
        connection.close()
        continue
    if mode == "vanish":
        os._exit(1)
    connection.sendall(b'{"taken": true}\\n')
    connection.close()
    break
os.environ.update(said["env"])
sys.argv = said["argv"][3:]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


class Bench:
    """A host whose runtime keeps stand-ins waiting."""

    def __init__(self, host: DockerHost, script: Path) -> None:
        self.host = host
        self.script = script
        script.write_text(WAITER)

    def plan(self, mode: str = "", spec: Model | None = None) -> StandbyPlan:
        """Return how a stand-in waits in a container of the host's model."""
        spec = spec or self.host.models[self.host.model].spec
        return StandbyPlan(self.host.name, ("python3", "-S", "-E"), self.script, {"MODE": mode}, spec=spec)

    @property
    def state(self) -> StandbyState | None:
        """Return the only state there is."""
        states = self.host.runtime.standbys()
        return states[0] if states else None

    async def settled(self, mode: str = "") -> StandbyState:
        """Have one wait, and return its state once it is ready or known not to be made."""
        await self.host.runtime.stand_by([self.plan(mode)])

        async def ready() -> bool:
            return self.state is not None and (self.state.ready or bool(self.state.problem))

        await until(ready)
        assert self.state is not None
        return self.state

    async def order(self, behaviour: str, argument: object = "", mode: str = "", **env: str) -> StartOrder:
        """Return an order for a stand-in engine in the one that waits."""
        order = await self.host.order_of(behaviour, argument)
        return msgspec.structs.replace(
            order, standby=self.plan(mode), launch=msgspec.structs.replace(order.launch, env=env)
        )

    async def start(self, behaviour: str, argument: object = "", mode: str = "", **env: str) -> Running:
        """Start a stand-in engine in the one that waits."""
        return await self.host.runtime.start(await self.order(behaviour, argument, mode, **env))

    async def standbys(self) -> list[dict[str, Any]]:
        """Return the containers, spent ones included, that were made to wait."""
        params = {"all": "1", "filters": api.filters(label=[f"{STANDBY}={self.host.name}"])}
        listed: list[dict[str, Any]] = await api.call(self.host.docker, "GET", "containers/json", params=params)
        return listed


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with docker_host(tmp_path / "state") as host:
        made = Bench(host, tmp_path / "waiter.py")
        try:
            yield made
        finally:
            await host.runtime.stand_by([])
            for each in await made.standbys():
                with contextlib.suppress(Exception):  # the host removes what has its name
                    await api.call(host.docker, "DELETE", f"containers/{each['Id']}", params={"force": "1"})


async def test_a_start_spends_the_container_that_waits(bench: Bench) -> None:
    """The container that waited becomes the engine, reached at its port, with the engine's log and exit status."""
    state = await bench.settled()
    assert state.ready and state.host_bytes > 0
    [waiting] = await bench.standbys()
    assert await bench.host.runtime.instances() == []
    running = await bench.start("answer", f"{PORT},hello")
    assert (running.mechanism, running.container) == ("standby", waiting["Id"])
    assert running.address.host == "127.0.0.1"
    await bench.host.says(running, "ready")
    assert await bench.host.runtime.listening(running)
    assert await bench.host.runtime.instances() == [running]
    assert not bench.host.runtime.foreign(running)
    assert bench.host.runtime.standbys() == []
    assert await bench.host.runtime.stop(running, GRACE) == Exit(-15)
    assert await bench.host.runtime.instances() == []
    assert await bench.host.runtime.log_tail(running.model, 1, running.instance) == ["ready"]


async def test_the_order_brings_what_the_container_lacks(bench: Bench) -> None:
    """Arguments and environment are the start's, and an exit status is the engine's."""
    await bench.settled()
    running = await bench.start("facts", GREETING="hello")
    assert await bench.host.says(running, "GREETING") == ["hello"]
    await bench.host.runtime.stop(running, GRACE)
    await bench.settled()
    running = await bench.start("exit", 7)
    assert running.mechanism == "standby"
    assert await bench.host.runtime.wait(running) == Exit(7)


async def test_a_spent_container_is_not_used_again(bench: Bench) -> None:
    """The next start is a cold one, and the spent container goes when its log isn't the last one any more."""
    await bench.settled()
    spent = await bench.start("obey")
    await bench.host.runtime.stop(spent, GRACE)
    await bench.host.runtime.rotate()
    assert [each["Id"] for each in await bench.standbys()] == [spent.container]
    cold = await bench.start("obey")
    assert cold.mechanism == "cold" and cold.container != spent.container

    async def removed() -> bool:
        await bench.host.runtime.rotate()
        return await bench.standbys() == []

    await until(removed)
    assert await bench.host.runtime.instances() == [cold]


async def test_a_later_orchestrator_knows_what_became_of_it(bench: Bench) -> None:
    """Who comes after us finds the instance as it is, and sweeps away what a killed one of us left waiting."""
    await bench.settled()
    running = await bench.start("obey")
    labels = {OWNER: (await bench.host.inspect(running.container))["Config"]["Labels"][OWNER]}
    left = await bench.host.make("left", Labels={**labels, STANDBY: bench.host.name})
    await bench.host.post(left, "start")
    assert len(await bench.standbys()) == 2
    await bench.host.reopen()
    assert await bench.host.runtime.instances() == [running]
    assert not bench.host.runtime.foreign(running)
    assert len(await bench.host.runtime.sweep({running.instance})) == 1
    assert [each["Id"] for each in await bench.standbys()] == [running.container]
    assert len(await bench.host.runtime.sweep(set())) == 1
    assert await bench.host.runtime.wait(running) == Exit(-9, killed=True)


async def test_what_waits_ends_with_us(bench: Bench) -> None:
    """Closing the runtime leaves the engine that runs, and nothing that waits."""
    await bench.settled()
    running = await bench.start("obey")
    await bench.settled()
    assert len(await bench.standbys()) == 2
    await bench.host.reopen()
    assert [each["Id"] for each in await bench.standbys()] == [running.container]
    assert await bench.host.runtime.instances() == [running]


@pytest.mark.parametrize("mode", ["refuse", "vanish"])
async def test_a_start_is_cold_if_the_order_is_not_taken(bench: Bench, mode: str) -> None:
    """A standby that refuses or ends instead is removed, and the start happens all the same."""
    assert (await bench.settled(mode)).ready
    running = await bench.start("obey", mode=mode)
    assert running.mechanism == "cold"
    assert await bench.standbys() == []
    assert await bench.host.runtime.instances() == [running]


async def test_a_model_that_is_hosted_otherwise_does_not_take_it(bench: Bench) -> None:
    """A container that differs in what can't be changed any more is not used, whatever the key says."""
    await bench.settled()
    await bench.host.configure(model=bench.host.managed(ulimits={"nofile": 1000}))
    running = await bench.start("obey")
    assert running.mechanism == "cold"
    assert await bench.standbys() == []


async def test_an_image_that_is_not_fit_says_why(bench: Bench) -> None:
    """The last line of what could not wait is the problem; it isn't tried again at once, and leaves nothing."""
    state = await bench.settled("unfit")
    assert state.problem == "standby: this vLLM has no such thing"

    async def removed() -> bool:
        return await bench.standbys() == []

    await until(removed)
    await bench.host.runtime.stand_by([])
    await bench.host.runtime.stand_by([bench.plan("unfit")])
    assert bench.state == state
    assert (await bench.start("obey", mode="unfit")).mechanism == "cold"


async def test_what_nobody_wants_any_more_is_removed(bench: Bench) -> None:
    """Letting go of a standby removes its container, also while it is being made."""
    await bench.settled()
    await bench.host.runtime.stand_by([])
    assert await bench.standbys() == [] and bench.state is None
    await bench.host.runtime.stand_by([bench.plan()])
    await bench.host.runtime.stand_by([])

    async def removed() -> bool:
        await bench.host.runtime.rotate()
        return await bench.standbys() == []

    await until(removed)


async def test_one_that_ends_while_it_waits_is_told(bench: Bench) -> None:
    """If somebody removes the container that waits, the start is a cold one."""
    await bench.settled()
    [waiting] = await bench.standbys()
    await api.call(bench.host.docker, "DELETE", f"containers/{waiting['Id']}", params={"force": "1"})
    running = await bench.start("obey")
    assert running.mechanism == "cold"
