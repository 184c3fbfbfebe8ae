# ruff: noqa: D102 - the Protocol says what these methods do
"""Which of its runtimes `Hosts` asks, and when it opens Docker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from modelswap.devices.amdcards import Nodes
from modelswap.engines.base import Address, Launch, Place, StandbyPlan
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.base import (
    Exit,
    Known,
    Report,
    Running,
    StandbyState,
    StartFailed,
    StartOrder,
    Told,
    Unkillable,
)
from modelswap.runtimes.docker.records import Start, Starts
from modelswap.runtimes.hosts import Containers, DockerNotOpen, Hosts, hosts_of
from modelswap.spec.config import Config, Device, Docker, Model, Orchestrator

PROCESS = Model(engine="custom", command=["serve"])
MANAGED = Model(engine="custom", image="engine:1")
ADOPTED = Model(engine="custom", container="llm")
ADDRESS = Address("127.0.0.1", 20001)


class Recording:
    """A runtime that notes what it is asked, and answers with its own name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.container = "" if name == "process" else "c0ffee"
        self.asked: list[tuple[str, object]] = []
        self.models: list[str] = []
        self.appearances: asyncio.Queue[Running] = asyncio.Queue()
        self.configure_error: ModelswapError | None = None
        self.sweep_error: ModelswapError | None = None
        self.logs: dict[str, list[str]] = {}
        self.pids: set[int] = set()
        self.plans: list[str] = []

    def running(self, model: str) -> Running:
        return Running(
            instance=f"{model}.{self.name}", model=model, definition="d", address=ADDRESS, container=self.container
        )

    async def configure(self, models: Mapping[str, Known]) -> None:
        if self.configure_error is not None:
            raise self.configure_error
        self.models = list(models)

    async def fetch(self, name: str, spec: Model, report: Report) -> None:
        self.asked.append(("fetch", name))
        report(self.name, None)

    async def allocate(self, spec: Model) -> Place:
        return Place(ADDRESS, program=(self.name,))

    async def create(self, order: StartOrder) -> None:
        self.asked.append(("create", order.model))

    async def start(self, order: StartOrder) -> Running:
        return self.running(order.model)

    async def stand_by(self, plans: Sequence[StandbyPlan]) -> None:
        self.plans = [plan.key for plan in plans]

    def standbys(self) -> list[StandbyState]:
        return [StandbyState(key=key) for key in self.plans]

    async def wait(self, running: Running) -> Exit:
        self.asked.append(("wait", running.model))
        return Exit(0)

    async def stop(self, running: Running, grace: float) -> Exit:
        self.asked.append(("stop", running.model))
        return Exit(-15)

    async def listening(self, running: Running) -> bool:
        self.asked.append(("listening", running.model))
        return True

    async def host_bytes(self, running: Running) -> int:
        self.asked.append(("host_bytes", running.model))
        return 5

    async def told(self, running: Running) -> Told | None:
        self.asked.append(("told", running.model))
        return None

    async def instances(self) -> list[Running]:
        return [self.running(self.name)]

    def foreign(self, running: Running) -> bool:
        return self.name == "docker"

    async def appeared(self) -> Running:
        return await self.appearances.get()

    def shares_cache(self, spec: Model) -> bool:
        return spec.container == "llm"

    def owns(self, pid: int) -> bool:
        return pid in self.pids

    async def log_tail(self, model: str, lines: int, instance: str | None = None) -> list[str]:
        return self.logs.get(model, [])

    async def sweep(self, keep: set[str]) -> list[str]:
        if self.sweep_error is not None:
            raise self.sweep_error
        return [f"of {self.name}"]

    async def rotate(self) -> None:
        self.asked.append(("rotate", ""))


class Rig:
    """Hosts over two recording runtimes; ``opened`` and ``closed`` count the docker one's context."""

    def __init__(self) -> None:
        self.process, self.docker = Recording("process"), Recording("docker")
        self.opened = self.closed = 0
        self.tasks: list[asyncio.Task[Any] | None] = []
        self.away: Exception | None = None
        self.remaining = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.end_error: Exception | None = None
        self.hosts = Hosts(self.process, self.open, lambda: self.remaining)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Containers]:
        self.opened += 1
        self.tasks.append(asyncio.current_task())
        try:
            await self.gate.wait()
            if self.away is not None:
                raise self.away
            yield self.docker
            if self.end_error is not None:
                raise self.end_error
        finally:
            self.closed += 1
            self.tasks.append(asyncio.current_task())

    async def configure(self, **models: Model) -> None:
        await self.hosts.configure({name: Known(spec, "d") for name, spec in models.items()})


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """Give hosts; whatever was opened is closed in the end, and no task is left."""
    made = Rig()
    async with made.hosts:
        yield made
    assert made.opened == made.closed
    await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


def order(model: str, spec: Model) -> StartOrder:
    return StartOrder(instance="i", model=model, definition="d", spec=spec, launch=Launch((), {}), address=ADDRESS)


def quiet(stage: str, fraction: float | None) -> None:
    """Tell nobody."""


async def test_without_a_container_docker_is_not_touched(rig: Rig) -> None:
    """A config of processes never opens Docker, and everything still works."""
    await rig.configure(a=PROCESS)
    assert [running.model for running in await rig.hosts.instances()] == ["process"]
    assert await rig.hosts.sweep(set()) == ["of process"]
    await rig.hosts.rotate()
    rig.process.logs["a"] = ["line"]
    assert await rig.hosts.log_tail("a", 5) == ["line"]
    assert rig.opened == 0
    with pytest.raises(DockerNotOpen):
        await rig.hosts.allocate(MANAGED)


async def test_each_runtime_learns_its_own_models(rig: Rig) -> None:
    """Managed and adopted models are Docker's, the rest are processes; a reload moves them."""
    await rig.configure(a=PROCESS, m=MANAGED, d=ADOPTED)
    assert (rig.process.models, rig.docker.models) == (["a"], ["m", "d"])
    await rig.configure(a=ADOPTED, m=PROCESS)
    assert (rig.process.models, rig.docker.models) == (["m"], ["a"])
    await rig.configure(m=PROCESS)
    assert (rig.docker.models, rig.opened, rig.closed) == ([], 1, 0)


@pytest.mark.parametrize(("spec", "name"), [(PROCESS, "process"), (MANAGED, "docker"), (ADOPTED, "docker")])
async def test_each_model_is_hosted_by_its_own_runtime(rig: Rig, spec: Model, name: str) -> None:
    """By its config before it runs, and by its identity once it does."""
    await rig.configure(x=spec, m=MANAGED)
    stages: list[str] = []
    await rig.hosts.fetch("x", spec, lambda stage, _: stages.append(stage))
    assert stages == [name]
    assert (await rig.hosts.allocate(spec)).program == (name,)
    await rig.hosts.create(order("x", spec))
    running = await rig.hosts.start(order("x", spec))
    assert running.instance == f"x.{name}"
    await rig.hosts.wait(running)
    await rig.hosts.listening(running)
    assert await rig.hosts.host_bytes(running) == 5
    assert await rig.hosts.told(running) is None
    await rig.hosts.stop(running, 1.0)
    assert rig.hosts.foreign(running) == (name == "docker")
    own = rig.docker if name == "docker" else rig.process
    other = rig.process if name == "docker" else rig.docker
    assert own.asked == [(what, "x") for what in ("fetch", "create", "wait", "listening", "host_bytes", "told", "stop")]
    assert other.asked == []


async def test_standbys_wait_where_their_models_are_started(rig: Rig) -> None:
    """A plan says whether it is for a container; without Docker only processes wait."""
    plans = [StandbyPlan("p", (), Path("s"), {}), StandbyPlan("c", (), Path("s"), {}, spec=MANAGED)]
    await rig.configure(plain=PROCESS)
    await rig.hosts.stand_by(plans)
    assert [state.key for state in rig.hosts.standbys()] == ["p"]
    await rig.configure(plain=PROCESS, managed=MANAGED)
    await rig.hosts.stand_by(plans)
    assert (rig.process.plans, rig.docker.plans) == (["p"], ["c"])
    assert [state.key for state in rig.hosts.standbys()] == ["p", "c"]
    await rig.hosts.stand_by([])
    assert rig.hosts.standbys() == []


async def test_docker_tells_which_containers_share_our_cache(rig: Rig) -> None:
    """As long as it isn't open, none does."""
    assert not rig.hosts.shares_cache(ADOPTED)
    await rig.configure(a=ADOPTED)
    assert rig.hosts.shares_cache(ADOPTED) and not rig.hosts.shares_cache(MANAGED)


async def test_what_concerns_all_asks_all(rig: Rig) -> None:
    """Instances, sweeping, keeping house and owning are of both."""
    await rig.configure(a=PROCESS, m=MANAGED)
    assert [running.model for running in await rig.hosts.instances()] == ["process", "docker"]
    assert await rig.hosts.sweep(set()) == ["of process", "of docker"]
    await rig.hosts.rotate()
    assert rig.process.asked == rig.docker.asked == [("rotate", "")]
    rig.process.pids, rig.docker.pids = {1}, {2}
    assert [rig.hosts.owns(pid) for pid in (1, 2, 3)] == [True, True, False]


async def test_both_are_swept_even_if_one_is_stuck(rig: Rig) -> None:
    """The failure is told after everything was tried."""
    await rig.configure(a=PROCESS, m=MANAGED)
    rig.process.sweep_error = Unkillable("PID 7")
    rig.docker.sweep_error = StartFailed("Docker is away")
    with pytest.raises(StartFailed, match="Docker is away"):
        await rig.hosts.sweep(set())


async def test_logs_are_looked_for_where_the_model_is_first(rig: Rig) -> None:
    """A model that has just moved has its last lines in the other one."""
    await rig.configure(a=PROCESS, m=MANAGED)
    rig.docker.logs = {"m": ["docker's"], "a": ["older"]}
    rig.process.logs = {"m": ["older"]}
    assert await rig.hosts.log_tail("m", 5) == ["docker's"]
    assert await rig.hosts.log_tail("a", 5) == ["older"]
    assert await rig.hosts.log_tail("gone", 5) == []


async def test_no_appearance_is_lost_to_a_cancelled_wait(rig: Rig) -> None:
    """What a cancelled wait had asked for is told to the next one, from either runtime."""
    await rig.configure(a=PROCESS, m=MANAGED)
    waiting = asyncio.create_task(rig.hosts.appeared())
    await asyncio.sleep(0)
    rig.docker.appearances.put_nowait(rig.docker.running("m"))
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert (await rig.hosts.appeared()).model == "m"
    rig.process.appearances.put_nowait(rig.process.running("a"))
    rig.docker.appearances.put_nowait(rig.docker.running("d"))
    assert {(await rig.hosts.appeared()).model for _ in range(2)} == {"a", "d"}


async def test_a_runtime_opened_meanwhile_is_heard_too(rig: Rig) -> None:
    """Whoever waits for an appearance hears of the first container's, after a reload has opened Docker."""
    await rig.configure(a=PROCESS)
    waiting = asyncio.create_task(rig.hosts.appeared())
    await asyncio.sleep(0)
    await rig.configure(m=MANAGED)
    rig.docker.appearances.put_nowait(rig.docker.running("m"))
    async with asyncio.timeout(5):
        assert (await waiting).model == "m"


async def test_a_reload_fails_and_changes_nothing_when_docker_is_away(rig: Rig) -> None:
    """The first container's model needs Docker; without it, the models stay as they were, and it may be tried again."""
    await rig.configure(a=PROCESS)
    rig.away = StartFailed("Docker can't be reached; is dockerd running?")
    with pytest.raises(StartFailed, match="is dockerd running"):
        await rig.configure(b=PROCESS, m=MANAGED)
    assert rig.process.models == ["a"] and rig.closed == 1
    rig.away = None
    await rig.configure(b=PROCESS, m=MANAGED)
    assert (rig.process.models, rig.docker.models) == (["b"], ["m"])


async def test_docker_that_cannot_be_configured_is_closed_again(rig: Rig) -> None:
    """A reload that fails there leaves no connection behind."""
    await rig.configure(a=PROCESS)
    rig.docker.configure_error = ModelswapError("no", code=Code.BAD_REQUEST)
    with pytest.raises(ModelswapError):
        await rig.configure(m=MANAGED)
    assert (rig.opened, rig.closed, rig.process.models) == (1, 1, ["a"])
    assert len(await rig.hosts.instances()) == 1


async def test_opening_may_be_given_up(rig: Rig) -> None:
    """Whoever cancels a reload that waits for Docker leaves nothing open."""
    rig.gate.clear()
    configuring = asyncio.create_task(rig.configure(m=MANAGED))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert rig.opened == 1
    configuring.cancel()
    await asyncio.wait([configuring])
    assert configuring.cancelled() and rig.closed == 1


async def test_docker_is_entered_and_left_by_the_same_task(rig: Rig) -> None:
    """Whoever configures us may be gone by the time it is left, and contexts may own tasks."""
    async with rig.hosts:
        await asyncio.create_task(rig.configure(m=MANAGED))
    assert rig.tasks[0] is rig.tasks[1] and rig.tasks[0] is not asyncio.current_task()


async def test_a_failure_in_leaving_is_no_failure_of_ours(rig: Rig) -> None:
    """It is logged; whoever leaves has other things to close."""
    rig.end_error = RuntimeError("unforeseen")
    async with rig.hosts:
        await rig.configure(m=MANAGED)
    assert rig.closed == 1


async def test_containers_of_an_earlier_run_are_looked_after(rig: Rig) -> None:
    """Docker is opened for what an earlier config left, but its absence is then no reason not to run."""
    rig.remaining = True
    rig.away = StartFailed("away")
    await rig.configure(a=PROCESS)
    assert rig.process.models == ["a"] and len(await rig.hosts.instances()) == 1
    rig.away = None
    await rig.configure(a=PROCESS)
    assert await rig.hosts.sweep(set()) == ["of process", "of docker"]


async def test_docker_is_opened_as_the_config_says_that_holds_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload that brings the first container may bring Docker's address, too."""
    opened: list[tuple[Any, ...]] = []
    recording = Recording("docker")

    @contextlib.asynccontextmanager
    async def open_runtime(state_dir: Path, docker: Docker, **given: Any) -> AsyncIterator[Containers]:
        told = (given["gpu"], given["amd"], given["port_of"]("vllm"), given["ports"])
        opened.append((state_dir, docker.host, *told))
        yield recording

    monkeypatch.setattr("modelswap.runtimes.docker.opening.open_runtime", open_runtime)
    latest = Config(models={"a": PROCESS})
    amd = (Nodes(("/dev/kfd",)),)
    async with hosts_of(tmp_path, lambda: latest, amd=amd) as hosts:
        await hosts.configure({"a": Known(PROCESS, "d")})
        assert (await hosts.allocate(PROCESS)).address.host == "127.0.0.1"
        assert opened == []
        latest = Config(
            models={"m": MANAGED},
            docker=Docker(host="tcp://there:2375"),
            device=Device(index=3),
            orchestrator=Orchestrator(engine_ports="20000-20009"),
        )
        await hosts.configure({"m": Known(MANAGED, "d")})
    assert opened == [(tmp_path, "tcp://there:2375", 3, amd, 8000, range(20000, 20010))]


async def test_docker_is_opened_for_what_an_earlier_run_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its containers would hold the device for ever; what is known to have ended doesn't count."""
    opened = 0

    @contextlib.asynccontextmanager
    async def open_runtime(*_: Any, **__: Any) -> AsyncIterator[Containers]:
        nonlocal opened
        opened += 1
        yield Recording("docker")

    monkeypatch.setattr("modelswap.runtimes.docker.opening.open_runtime", open_runtime)
    records = Starts(tmp_path / "docker" / "starts")
    start = Start(instance="m.1", model="m", definition="d", container="c0ffee", port=8000)
    for one, times in ((start.finished(5.0), 0), (start, 1), (start.finished(5.0), 1)):
        records.write(one)
        (tmp_path / "docker" / "starts" / "broken.json").write_text("{")
        async with hosts_of(tmp_path, lambda: Config(models={})) as hosts:
            await hosts.configure({})
        assert opened == times
