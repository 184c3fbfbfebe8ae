# ruff: noqa: D102 - the Protocols say what these methods do
"""Stand-ins for the outside world: an engine, a runtime and a device that do as they are told."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from modelswap.core import events
from modelswap.devices.base import Holder, Reading
from modelswap.engines.base import Address, Diagnosis, Launch, Place, Readiness, StandbyPlan
from modelswap.orchestrator.facts import Configured
from modelswap.orchestrator.hosting import Hosted, Outside, engine_session
from modelswap.orchestrator.journal import Journal
from modelswap.orchestrator.measurements import Measurements
from modelswap.orchestrator.preparing import NoWeights, Weights
from modelswap.orchestrator.service import Parts, Service, running
from modelswap.orchestrator.store import Store
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import Exit, Known, Report, Running, StandbyState, StartOrder, Told, Unkillable
from modelswap.spec.config import Config, Model

DEADLINE = 30.0
TOKEN = "gateways-token"


async def until(condition: Callable[[], bool]) -> None:
    """Return when ``condition`` holds; fails after `DEADLINE` seconds."""
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110 - conditions look at many things
            await asyncio.sleep(0.002)


def config(text: dict[str, Any] | None = None, **models: dict[str, Any]) -> Config:
    """Return a config with these models (by default ``a`` and ``b``), all of engine ``custom``."""
    named = models or {"a": {"aliases": ["first"]}, "b": {}}
    full = {name: {"engine": "custom", "command": ["serve", name], **model} for name, model in named.items()}
    return Config.model_validate({"models": full, **(text or {})}, strict=False)


class FakeEngine:
    """An `Engine` whose answers are attributes."""

    kind = "custom"

    def __init__(self) -> None:
        self.said = Readiness(ready=True, stage="ready")
        self.launch_error: ModelswapError | None = None
        self.readiness_error: Exception | None = None
        self.canary_error: Exception | None = None
        self.canary_gate = asyncio.Event()
        self.canary_gate.set()
        self.standby_plan: StandbyPlan | None = None
        self.canaries = 0
        self.well = True
        self.health_answers: list[bool] = []
        """Given first, one each."""
        self.health_error: Exception | None = None
        self.health_checks = 0
        self.counts: list[int | None] = []
        self.count_error: Exception | None = None
        self.needs: int | None = None
        self.levels: tuple[int, ...] = ()
        self.sleeps = False
        self.sleep_errors: list[Exception] = []
        """Raised first, one each."""
        self.wake_errors: list[Exception] = []
        """Raised first, one each."""
        self.sleep_gate = asyncio.Event()
        self.sleep_gate.set()
        self.slumber: list[str] = []
        """What it was told, e.g. ``sleep 1``."""
        self.greedy_answer: tuple[str, ...] | None = None
        self.greedy_answers: list[tuple[str, ...] | None] = []
        """Given first, one each."""
        self.diagnosis = Diagnosis("it ran out of luck; give it more", permanent=False)
        self.diagnosed: list[tuple[int | None, list[str]]] = []

    def launch(self, name: str, model: Model, address: Address, program: Sequence[str] | None = None) -> Launch:
        if self.launch_error is not None:
            raise self.launch_error
        return Launch(tuple(model.command or ()), dict(model.env))

    def standby(self, model: Model, launch: Launch, weights: Path | None = None) -> StandbyPlan | None:
        return self.standby_plan

    def caches(self) -> tuple[()]:
        return ()

    def port(self) -> int:
        return 8000

    def slots(self, model: Model) -> int:
        return 3

    def upstream_name(self, name: str, model: Model) -> str | None:
        return f"upstream-{name}"

    def stop_grace(self, model: Model) -> float:
        return 7.0

    def device_bytes(self, model: Model, total: int) -> int | None:
        return self.needs

    async def readiness(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> Readiness:
        if self.readiness_error is not None:
            raise self.readiness_error
        return self.said

    async def running(self, http: aiohttp.ClientSession, model: Model, address: Address) -> int | None:
        if self.count_error is not None:
            raise self.count_error
        return self.counts.pop(0) if self.counts else None

    async def healthy(self, http: aiohttp.ClientSession, model: Model, address: Address) -> bool:
        self.health_checks += 1
        if self.health_error is not None:
            raise self.health_error
        return self.health_answers.pop(0) if self.health_answers else self.well

    async def canary(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> None:
        self.canaries += 1
        await self.canary_gate.wait()
        if self.canary_error is not None:
            raise self.canary_error

    def sleep_levels(self, model: Model) -> tuple[int, ...]:
        return self.levels

    async def sleep(self, http: aiohttp.ClientSession, model: Model, address: Address, level: int) -> None:
        self.slumber.append(f"sleep {level}")
        await self.sleep_gate.wait()
        if self.sleep_errors:
            raise self.sleep_errors.pop(0)
        self.sleeps = True

    async def wake(self, http: aiohttp.ClientSession, model: Model, address: Address, level: int) -> None:
        self.slumber.append(f"wake {level}")
        await self.sleep_gate.wait()
        if self.wake_errors:
            raise self.wake_errors.pop(0)
        self.sleeps = False

    async def asleep(self, http: aiohttp.ClientSession, model: Model, address: Address) -> bool | None:
        return self.sleeps

    async def greedy(
        self, http: aiohttp.ClientSession, name: str, model: Model, address: Address, tokens: int
    ) -> tuple[str, ...] | None:
        return self.greedy_answers.pop(0) if self.greedy_answers else self.greedy_answer

    def diagnose(self, exit_code: int | None, log: Sequence[str]) -> Diagnosis:
        self.diagnosed.append((exit_code, list(log)))
        return self.diagnosis


class FakeRuntime:
    """A runtime whose instances are listening sockets of this process."""

    def __init__(self) -> None:
        self.orders: list[StartOrder] = []
        self.stops: list[tuple[str, float]] = []
        self.living: dict[str, Running] = {}
        self.start_error: ModelswapError | None = None
        self.start_gate = asyncio.Event()
        self.start_gate.set()
        self.starting = asyncio.Event()
        self.survives = 0
        """How many more times stopping fails."""
        self.sweep_error: Unkillable | None = None
        self.listens = True
        self.commands: dict[str, Told] = {}
        """What somebody else starts models with."""
        self.told_error: ModelswapError | None = None
        self.taken: dict[str, int] = defaultdict(int)
        """Host memory by instance."""
        self.log = ["first line", "last line"]
        self.rotations = 0
        self.known: dict[str, Known] = {}
        self.fetched: list[str] = []
        self.fetch_gate = asyncio.Event()
        self.fetch_gate.set()
        self.fetch_error: ModelswapError | None = None
        self.fetch_reports: list[tuple[str, float | None]] = [("pulling", 0.5)]
        self.configure_error: ModelswapError | None = None
        self.create_error: Exception | None = None
        self.wait_errors: list[ModelswapError] = []
        """Raised first, one each."""
        self.listening_error: ModelswapError | None = None
        self.created: list[StartOrder] = []
        self.plans: list[StandbyPlan] = []
        """What stands by; each is ready at once."""
        self.appearances: asyncio.Queue[Running] = asyncio.Queue()
        self._exits: dict[str, asyncio.Future[Exit]] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._pid = 1000

    async def configure(self, models: Mapping[str, Known]) -> None:
        if self.configure_error is not None:
            raise self.configure_error
        self.known = dict(models)

    async def fetch(self, name: str, spec: Model, report: Report) -> None:
        self.fetched.append(name)
        for stage, fraction in self.fetch_reports:
            report(stage, fraction)
        await self.fetch_gate.wait()
        if self.fetch_error is not None:
            raise self.fetch_error

    async def create(self, order: StartOrder) -> None:
        if self.create_error is not None:
            raise self.create_error
        self.created.append(order)

    def foreign(self, running: Running) -> bool:
        return running.instance.startswith("foreign.")

    async def appeared(self) -> Running:
        return await self.appearances.get()

    def owns(self, pid: int) -> bool:
        return any(running.pid == pid for running in self.living.values())

    async def allocate(self, spec: Model) -> Place:
        bound = socket.socket()
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        self._sockets[port] = bound
        return Place(Address("127.0.0.1", port))

    async def stand_by(self, plans: Sequence[StandbyPlan]) -> None:
        self.plans = list(plans)

    def standbys(self) -> list[StandbyState]:
        return [StandbyState(key=plan.key, ready=True) for plan in self.plans]

    async def start(self, order: StartOrder) -> Running:
        self.starting.set()
        await self.start_gate.wait()
        if self.start_error is not None:
            raise self.start_error
        self.orders.append(order)
        running = self.spawn(order.instance, order.model, order.definition, order.address)
        if order.standby not in self.plans:
            return running
        self.living[order.instance] = msgspec.structs.replace(running, mechanism="standby")
        return self.living[order.instance]

    def spawn(
        self, instance: str, model: str, definition: str, address: Address | None = None, container: str = ""
    ) -> Running:
        """Have an instance alive; in a ``container`` if one is named."""
        if address is None:
            bound = socket.socket()
            bound.bind(("127.0.0.1", 0))
            address = Address("127.0.0.1", bound.getsockname()[1])
            self._sockets[address.port] = bound
        self._sockets[address.port].listen()
        self._pid += 1
        started = Running(
            instance=instance,
            model=model,
            definition=definition,
            address=address,
            pid=0 if container else self._pid,
            born=float(self._pid),
            container=container,
        )
        self.living[instance] = started
        return started

    def die(self, instance: str, code: int = 1, *, oom: bool = False) -> None:
        """Have an instance end."""
        gone = self.living.pop(instance, None)
        if gone is not None:
            self._sockets.pop(gone.address.port).close()
        exit_ = self._exit(instance)
        if not exit_.done():
            exit_.set_result(Exit(code, oom=oom))

    def _exit(self, instance: str) -> asyncio.Future[Exit]:
        if instance not in self._exits:
            self._exits[instance] = asyncio.get_running_loop().create_future()
        return self._exits[instance]

    async def wait(self, running: Running) -> Exit:
        if self.wait_errors:
            raise self.wait_errors.pop(0)
        return await asyncio.shield(self._exit(running.instance))

    async def stop(self, running: Running, grace: float) -> Exit:
        self.stops.append((running.instance, grace))
        if self.survives:
            self.survives -= 1
            raise Unkillable("PID 7 survived SIGKILL")
        self.die(running.instance, -15)
        return await self._exit(running.instance)

    async def listening(self, running: Running) -> bool:
        if self.listening_error is not None:
            raise self.listening_error
        return self.listens and running.instance in self.living

    async def host_bytes(self, running: Running) -> int:
        return self.taken[running.instance]

    async def told(self, running: Running) -> Told | None:
        if self.told_error is not None:
            raise self.told_error
        return self.commands.get(running.model)

    async def instances(self) -> list[Running]:
        return list(self.living.values())

    async def log_tail(self, model: str, lines: int, instance: str | None = None) -> list[str]:
        return self.log[-lines:] if lines else []

    async def sweep(self, keep: set[str]) -> list[str]:
        gone = [name for name, running in self.living.items() if name not in keep and not self.foreign(running)]
        for instance in gone:
            self.die(instance, -9)
        if self.sweep_error is not None:
            raise self.sweep_error
        return gone

    async def rotate(self) -> None:
        self.rotations += 1

    def close(self) -> None:
        """Close what is still open."""
        for bound in self._sockets.values():
            bound.close()
        self._sockets.clear()


class FakeDevice:
    """A device with the memory it is given; None where nothing can be read."""

    kind = "fake"
    name = "fake device"

    def __init__(self, total: int = 100, free: int = 100) -> None:
        self.reading: Reading | None = Reading(total=total, free=free)
        self.error: Exception | None = None
        self.reads = 0

    def hold(self, size: int) -> None:
        """Have someone hold ``size`` bytes."""
        assert self.reading is not None
        total = self.reading.total
        self.reading = Reading(total=total, free=total - size, holders=(Holder(4121, "python", size),))

    async def read(self) -> Reading | None:
        self.reads += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return self.reading


class World:
    """The outside world of executors, and the events they post."""

    def __init__(self, folder: Path) -> None:
        self.runtime = FakeRuntime()
        self.device = FakeDevice()
        self.engine = FakeEngine()
        self.events: list[events.Event] = []
        self.store = Store(folder / "modelswap.db")
        self.journal = Journal(self.store)
        self.measurements = Measurements(self.store)
        self.outside: Outside

    def host(self, instance: str = "a.1.1", model: str = "a", **settings: Any) -> Hosted:
        """Return a new instance, registered."""
        spec = config(**{model: settings}).models[model]
        hosted = Hosted(instance=instance, model=model, definition="digest", spec=spec, engine=self.engine)
        self.outside.hosted[instance] = hosted
        return hosted

    def host_running(self, instance: str = "a.1.1", model: str = "a", container: str = "", **settings: Any) -> Hosted:
        """Return an instance that runs and is ready; in a ``container`` if one is named."""
        hosted = self.host(instance, model, **settings)
        hosted.running = self.runtime.spawn(instance, model, "digest", container=container)
        hosted.address = hosted.running.address
        hosted.ready = True
        return hosted

    def of(self, kind: type[events.Event]) -> list[Any]:
        """Return the events of one kind, in order."""
        return [event for event in self.events if type(event) is kind]


@contextlib.asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    """Give a `World`."""
    made = World(folder)
    await made.store.open()
    try:
        async with engine_session() as http:
            made.outside = Outside(
                runtime=made.runtime,
                device=made.device,
                http=http,
                journal=made.journal,
                measurements=made.measurements,
                post=made.events.append,
                clock=time.monotonic,
            )
            yield made
    finally:
        made.runtime.close()
        await made.store.close()


class Bench:
    """Runs orchestrators over the same fake outside world and state folder, one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = FakeRuntime()
        self.device = FakeDevice()
        self.engine = FakeEngine()
        self.config = config()
        self.load_error: ModelswapError | None = None
        self.weights: Weights = NoWeights()

    def _load(self, path: Path) -> Config:
        if self.load_error is not None:
            raise self.load_error
        return self.config

    def parts(self) -> Parts:
        """Return what an orchestrator is to be made of."""
        return Parts(
            runtime=self.runtime,
            device=self.device,
            engine_for=lambda _kind: self.engine,
            load=self._load,
            token=TOKEN,
            database=self.folder / "modelswap.db",
            weights=self.weights,
        )

    def configured(self) -> Configured:
        """Return the config with what follows from it."""
        return Configured.of(self.config, lambda _kind: self.engine)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Service]:
        """Run an orchestrator without its API."""
        async with running(self.folder / "modelswap.yaml", self.config, self.parts()) as service:
            yield service
