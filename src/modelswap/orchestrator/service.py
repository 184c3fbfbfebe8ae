"""One orchestrator: its parts put together, begun and ended in order."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import structlog

from modelswap.core import events
from modelswap.core.scheduler import Scheduler
from modelswap.devices.base import Device, Reading
from modelswap.engines.base import Engine
from modelswap.orchestrator import adoption, appearances, hostmemory, preparing, sleepers
from modelswap.orchestrator.abilities import learn, sleep_levels
from modelswap.orchestrator.answers import Answers
from modelswap.orchestrator.calibration import Calibrator
from modelswap.orchestrator.carrying import Carrier
from modelswap.orchestrator.facts import DEVICE, Configured
from modelswap.orchestrator.feed import Feed
from modelswap.orchestrator.history import History
from modelswap.orchestrator.hosting import Hosted, Outside, engine_session
from modelswap.orchestrator.journal import Journal
from modelswap.orchestrator.links import Links
from modelswap.orchestrator.measurements import Measurements, sleeping
from modelswap.orchestrator.metrics import Metrics
from modelswap.orchestrator.preparing import NoWeights, Weights
from modelswap.orchestrator.reading_ahead import ReadingAhead
from modelswap.orchestrator.shell import Shell
from modelswap.orchestrator.store import Store
from modelswap.orchestrator.tasks import Tasks
from modelswap.orchestrator.ways import Chooser
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.base import Runtime
from modelswap.spec.config import Config, EngineName

READ_EVERY: Final = 2.0
ROTATE_EVERY: Final = 10.0
_APPLIED_WITHIN: Final = 5.0
_WEIGH_EVERY: Final = 15

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What an orchestrator is made of; tests give their own. ``load`` reads the config file."""

    runtime: Runtime
    device: Device
    engine_for: Callable[[EngineName], Engine]
    load: Callable[[Path], Config]
    token: str
    database: Path
    clock: Callable[[], float] = time.monotonic
    weights: Weights = field(default_factory=NoWeights)


class Service:
    """Everything that the admin API works with; made by `running`."""

    def __init__(
        self,
        config_path: Path,
        configured: Configured,
        parts: Parts,
        *,
        store: Store,
        journal: Journal,
        history: History,
        outside: Outside,
        scheduler: Scheduler,
    ) -> None:
        self.config_path = config_path
        self.configured = configured
        self.device = parts.device
        self.outside = outside
        self.weights = parts.weights
        self.history = history
        self.journal = journal
        self.store = store
        self.clock = parts.clock
        self.began = parts.clock()
        self.answers = Answers()
        self.feed = Feed()
        self.metrics = Metrics()
        self.tasks = Tasks()
        self.reading: Reading | None = None
        self.ending = asyncio.Event()
        """This orchestrator is about to end; whoever streams or waits must be let go."""
        self.finished = asyncio.Event()
        """A `Shutdown` is complete."""
        self._parts = parts
        self._restart_needed: tuple[str, ...] = ()
        self._reading_problem = ""
        self._reloading = asyncio.Lock()
        self.links = Links(
            self._post_if,
            token=parts.token,
            clock=parts.clock,
            term=lambda: self.configured.config.orchestrator.term,
            on_change=self._gateway_changed,
        )
        self.reading_ahead = ReadingAhead(
            outside, parts.weights, self.metrics, self.tasks, configured=lambda: self.configured
        )
        self._carrier = Carrier(
            outside=outside,
            links=self.links,
            answers=self.answers,
            history=history,
            feed=self.feed,
            metrics=self.metrics,
            tasks=self.tasks,
            configured=lambda: self.configured,
            on_finished=self.finished.set,
            weights=parts.weights,
            ahead=self.reading_ahead,
        )
        self.shell = Shell(scheduler, self._carrier.carry, clock=parts.clock, lag=self.metrics.lag)
        self.metrics.configure(configured.config.models, [DEVICE])
        self.chooser = Chooser(outside, lambda: self.configured, lambda: self.reading)
        self.calibrator = Calibrator(
            outside=outside,
            chooser=self.chooser,
            answers=self.answers,
            configured=lambda: self.configured,
            snapshot=self.shell.snapshot,
            reconfigure=lambda: self.post(self._configure(self.configured)),
            publish=self.feed.publish,
        )
        outside.memory.budget = self._host_budget
        outside.memory.available = lambda: hostmemory.available(contained=self._hosts_processes())
        outside.memory.total = hostmemory.total(contained=self._hosts_processes())
        outside.measurements.on_took = self.metrics.took
        outside.measurements.on_change = lambda _model: self.chooser.tell()

    def post(self, event: events.Event) -> None:
        """Give the scheduler an event."""
        self.shell.post(event)

    def resolve(self, name: str) -> str:
        """Return the model that a name, alias or adapter means; raises `ModelswapError` with the names there are."""
        model = self.configured.names.get(name)
        if model is None:
            known = ", ".join(sorted(self.configured.config.models)) or "none"
            raise ModelswapError(f"The model '{name}' does not exist; there are: {known}", code=Code.MODEL_NOT_FOUND)
        return model

    def warnings(self) -> list[str]:
        """Return what is wrong without keeping us from deciding."""
        found = []
        if self.store.problem is not None:
            found.append(f"state is not kept: {self.store.problem}")
        if self._reading_problem:
            found.append(f"the device can't be read: {self._reading_problem}")
        if self._restart_needed:
            found.append(f"changed in the config, but needs a restart: {', '.join(self._restart_needed)}")
        if self.tasks.failures:
            found.append(f"{self.tasks.failures} tasks failed unexpectedly; see the log")
        return found

    async def reload(self) -> dict[str, Any]:
        """Read the config file again, and return what changed; raises `ModelswapError` and changes nothing.

        Models whose definition did not change keep running.
        """
        async with self._reloading:
            config = await asyncio.to_thread(self._parts.load, self.config_path)
            before, after = self.configured, Configured.of(config, self._parts.engine_for)
            try:
                await self.outside.runtime.configure(after.known())
            except ModelswapError as error:
                raise ModelswapError(f"the config stays as it was: {error}", code=error.code) from error
            applied = asyncio.Event()

            def apply() -> bool:
                self._apply(after)
                applied.set()
                return True

            self.shell.post(self._configure(after), still=apply)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_APPLIED_WITHIN):
                    await applied.wait()
            await appearances.look_around(self.outside, self.configured)
            changes = _changes(before, after)
            self._restart_needed = tuple(changes["restart_needed"])
            _log.info("config reloaded", path=str(self.config_path), **changes)
            self.feed.publish("config", **changes)
            return changes

    def end(self) -> None:
        """Decide nothing more, and let go whoever streams or waits, and gateways; engines run on."""
        self.shell.freeze()
        self.ending.set()
        self.feed.close()
        self.links.close()

    async def adopt(self) -> None:
        """Find out what an earlier orchestrator left, kill what has no place, and tell the scheduler to begin."""
        runtime = self.outside.runtime
        await runtime.configure(self.configured.known())
        found = adoption.sort_out(
            await runtime.instances(), self.journal.entries, self.configured, foreign=runtime.foreign
        )
        for stray in found.strays:
            running = stray.running
            if stray.foreign:
                self._carrier.turn_away(running, stray.reason)
                continue
            _log.warning("stray", instance=running.instance, model=running.model, pid=running.pid, reason=stray.reason)
            self.metrics.adoption("killed")
        keep = {adopted.running.instance for adopted in found.adopted}
        try:
            for swept in await runtime.sweep(keep):
                _log.warning("killed", what=swept)
        except ModelswapError as stuck:
            # The device's memory will tell whether that is in anyone's way.
            _log.error("a stray can't be killed", reason=str(stuck))
        for instance in self.journal.entries.keys() - keep:
            self.journal.forget(instance)
        expected = self.journal.gateways
        self.post(self._configure(self.configured))
        for adopted in found.adopted:
            await self._adopt(adopted)
        self.post(events.Begin(at=self.clock(), expected=expected))

    async def _adopt(self, found: adoption.Adoption) -> None:
        running = found.running
        _log.info("adopted", instance=running.instance, model=running.model, pid=running.pid, ready=found.ready)
        self.metrics.adoption("adopted" if found.ready else "resumed")
        if found.foreign:
            self._carrier.take_up(running)
        left = self.outside.measurements.of(running.model, running.definition, sleeping(found.asleep))
        taken = left.host or (await sleepers.process_bytes(self.outside, running) if found.asleep else 0)
        self.outside.hosted[running.instance] = Hosted(
            instance=running.instance,
            model=running.model,
            definition=running.definition,
            spec=self.configured.config.models[running.model],
            engine=self.configured.engines[running.model],
            address=running.address,
            running=running,
            slots=found.slots,
            ready=found.ready,
            asleep=found.asleep,
            residue=(left.residue or 0) if found.asleep else 0,
            host_bytes=taken if found.asleep else 0,
            levels={found.asleep} if found.asleep else set(),
        )
        await learn(self.outside, self.outside.hosted[running.instance])
        self.post(
            events.Adopted(
                at=self.clock(),
                instance=running.instance,
                model=running.model,
                definition=running.definition,
                host=running.address.host,
                port=running.address.port,
                slots=found.slots,
                ready=found.ready,
                asleep=found.asleep,
            )
        )

    def _configure(self, configured: Configured) -> events.Configure:
        return configured.configure(
            self.clock(),
            self.history.swap_seconds,
            lambda model: preparing.needed(model, self._parts.weights),
            self.calibrator.idle,
        )

    def _post_if(self, event: events.Event, still: Callable[[], bool] | None = None) -> None:
        self.shell.post(event, still)

    def _apply(self, configured: Configured) -> None:
        self.configured = configured
        self.outside.memory.total = hostmemory.total(contained=self._hosts_processes())
        for hosted in self.outside.hosted.values():
            if configured.definitions.get(hosted.model) == hosted.definition:
                hosted.spec = configured.config.models[hosted.model]
        for preparing_ in self.outside.preparing.values():
            if configured.definitions.get(preparing_.model) != preparing_.definition and preparing_.job is not None:
                preparing_.job.cancel()
        self.metrics.configure(configured.config.models, [DEVICE])
        self.chooser.tell()

    def _host_budget(self) -> int | None:
        given = self.configured.config.device.host_memory
        return None if given is None else int(given)

    def _hosts_processes(self) -> bool:
        """Return whether engines live within our own container's limits; what Docker hosts does not."""
        return any(model.runtime == "process" for model in self.configured.config.models.values())

    def _gateway_changed(self, gateway: str, connected: bool) -> None:
        if connected:
            self.journal.gateway_came(gateway)
        else:
            self.journal.gateway_went(gateway)
        _log.info("gateway", gateway=gateway, connected=connected)
        self.feed.publish("gateway", gateway=gateway, connected=connected)

    async def forget_gateways(self) -> None:
        """Wait for the earlier orchestrator's gateways for a term, and expect them no more: they have ended."""
        await asyncio.sleep(self.configured.config.orchestrator.term)
        self.journal.forget_unheard()

    async def read_device(self) -> None:
        """Keep ``reading`` fresh, until cancelled."""
        while True:
            try:
                self.reading = await self.device.read()
                self._reading_problem = ""
            except Exception as error:  # noqa: BLE001 - whatever a driver may raise, metrics must go on
                if not self._reading_problem:
                    _log.warning("device can't be read", device=self.device.name, error=repr(error))
                self._reading_problem = repr(error)
            await asyncio.sleep(READ_EVERY)

    async def watch_memory(self) -> None:
        """Every second, give sleepers up if host memory is short, and choose anew how models are put out."""
        for second in itertools.count():
            if second % _WEIGH_EVERY == 0:
                await self._weigh()
            await asyncio.sleep(sleepers.LOOK_EVERY)
            sleepers.keep_within(self.outside)
            self.chooser.tell()

    async def _weigh(self) -> None:
        """Find out how large the weights are of models that may sleep, as soon as they are here."""
        known, configured = self.outside.weights, self.configured
        for name, definition in configured.definitions.items():
            spec = configured.config.models[name]
            if definition in known or not sleep_levels(self.outside, definition, spec, configured.engines[name]):
                continue
            size = await asyncio.to_thread(sleepers.weights_on_disk, spec)
            if size is None:
                size = await self._parts.weights.size(name, spec)
            if size is not None:
                known[definition] = size

    async def rotate_logs(self) -> None:
        """Keep engine logs small, until cancelled."""
        while True:
            await asyncio.sleep(ROTATE_EVERY)
            try:
                await self.outside.runtime.rotate()
            except OSError as error:
                _log.warning("log rotation", error=repr(error))


@contextlib.asynccontextmanager
async def running(config_path: Path, config: Config, parts: Parts) -> AsyncIterator[Service]:
    """Run an orchestrator, without its API, for as long as the context lasts; engines outlive it."""
    configured = Configured.of(config, parts.engine_for)
    journal: Journal | None = None
    store = Store(parts.database, on_renewed=lambda: journal.write_anew() if journal is not None else None)
    await store.open()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.close)
        journal = Journal(store)
        history = History(store)
        measurements = Measurements(store)
        generation = await journal.begin()
        await history.begin()
        await measurements.begin()
        http = await stack.enter_async_context(engine_session())
        outside = Outside(
            runtime=parts.runtime,
            device=parts.device,
            http=http,
            journal=journal,
            measurements=measurements,
            post=lambda event: service.post(event),
            clock=parts.clock,
        )
        service = Service(
            config_path,
            configured,
            parts,
            store=store,
            journal=journal,
            history=history,
            outside=outside,
            scheduler=Scheduler(generation),
        )
        stack.push_async_callback(service.tasks.close)
        stack.callback(service.end)
        await service.adopt()
        service.tasks.start(service.shell.run(), "scheduler")
        service.tasks.start(service.forget_gateways(), "gateways")
        service.tasks.start(service.read_device(), "device")
        service.tasks.start(service.watch_memory(), "host memory")
        service.tasks.start(appearances.watch_appearances(outside, lambda: service.configured), "starts by others")
        service.tasks.start(service.rotate_logs(), "logs")
        yield service


def _uses_docker(configured: Configured) -> bool:
    return any(model.runtime != "process" for model in configured.config.models.values())


def _changes(before: Configured, after: Configured) -> dict[str, list[str]]:
    old, new = before.definitions, after.definitions
    sections = {
        "gateway": (before.config.gateway, after.config.gateway),
        "device": (before.config.device, after.config.device),
        "docker.hf_cache": (before.config.docker.hf_cache, after.config.docker.hf_cache),
        # Before a model needs Docker, nothing has been made of that section.
        "docker": (before.config.docker, after.config.docker if _uses_docker(before) else before.config.docker),
        "orchestrator.host": (before.config.orchestrator.host, after.config.orchestrator.host),
        "orchestrator.port": (before.config.orchestrator.port, after.config.orchestrator.port),
        "orchestrator.state_dir": (before.config.orchestrator.state_dir, after.config.orchestrator.state_dir),
        "orchestrator.engine_ports": (before.config.orchestrator.ports, after.config.orchestrator.ports),
        "orchestrator.log_size": (before.config.orchestrator.log_size, after.config.orchestrator.log_size),
    }
    return {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
        "kept": sorted(name for name in old.keys() & new.keys() if old[name] == new[name]),
        "restart_needed": [name for name, (was, is_) in sections.items() if was != is_],
    }
