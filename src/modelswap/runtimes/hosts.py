"""The runtime that is made of several: processes of this machine, and containers where a model needs them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

import msgspec
import structlog

from modelswap.devices.amdcards import Nodes
from modelswap.engines.base import Place, StandbyPlan
from modelswap.engines.registry import engine_for
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.base import Exit, Known, Report, Running, Runtime, StandbyState, StartOrder, Told
from modelswap.runtimes.process import ProcessRuntime
from modelswap.spec.config import Config, Model

_NOT_OPEN: Final = "the connection to Docker isn't open: no configured model needs it"

_STARTS: Final = "docker/starts"

_log = structlog.get_logger(__name__)


class DockerNotOpen(ModelswapError):
    """Something of Docker is asked for that no configured model needs."""

    code = Code.INTERNAL


class Containers(Runtime, Protocol):
    """What `Hosts` needs of the runtime that hosts containers."""

    def shares_cache(self, spec: Model) -> bool:
        """Return whether a container that somebody else made loads its weights from our Hugging Face cache."""
        ...


def hosts_of(
    state_dir: Path,
    config: Callable[[], Config],
    *,
    amd: Sequence[Nodes] = (),
    on_lost: Callable[[ModelswapError], None] = lambda _: None,
) -> Hosts:
    """Return what hosts engines on this machine, with its records in ``state_dir``; ``config`` is the one that holds.

    Docker is opened as the config says that holds then. ``amd`` are all AMD GPUs if the device is one. ``on_lost`` is
    told if another orchestrator has taken over that Docker (`runtimes.docker.opening.open_runtime`).
    """
    orchestrator = config().orchestrator

    def open_docker() -> AbstractAsyncContextManager[Containers]:
        from modelswap.runtimes.docker.opening import open_runtime

        now = config()
        return open_runtime(
            state_dir,
            now.docker,
            gpu=now.device.index,
            amd=amd,
            port_of=lambda kind: engine_for(kind).port(),
            ports=now.orchestrator.ports,
            on_lost=on_lost,
        )

    process = ProcessRuntime(state_dir, int(orchestrator.log_size), ports=orchestrator.ports)
    return Hosts(process, open_docker, remains=lambda: any(map(_open_end, (state_dir / _STARTS).glob("*.json"))))


class _Start(msgspec.Struct, frozen=True):
    """What matters here of `docker.records.Start`, read without loading anything of Docker."""

    ended: float = 0.0


def _open_end(record: Path) -> bool:
    try:
        return not msgspec.json.decode(record.read_bytes(), type=_Start).ended
    except (OSError, msgspec.DecodeError):
        return False


class Hosts:
    """`Runtime` over two: each model's instances are hosted by the one that its config says.

    ``open_docker`` is entered when a configured model first needs a container, and left with us; until then nothing of
    Docker is touched. Where ``remains`` says that an earlier run left containers, it is entered for their sake, too.
    """

    def __init__(
        self,
        process: Runtime,
        open_docker: Callable[[], AbstractAsyncContextManager[Containers]],
        remains: Callable[[], bool] = lambda: False,
    ) -> None:
        self._process = process
        self._open_docker = open_docker
        self._remains = remains
        self._docker: Containers | None = None
        self._dockers: frozenset[str] = frozenset()
        self._keeper: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._opened = asyncio.Event()
        self._appearing: dict[asyncio.Task[Running], Runtime] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._appearing:
            task.cancel()
        await asyncio.gather(*self._appearing, return_exceptions=True)
        self._appearing.clear()
        await self._close_docker()

    async def configure(self, models: Mapping[str, Known]) -> None:
        """See `Runtime`. Opens Docker if it is needed now; raises `ModelswapError` and changes nothing if it's away."""
        dockers = {name: known for name, known in models.items() if known.spec.runtime != "process"}
        docker = self._docker
        if docker is not None:
            await docker.configure(dockers)
        elif dockers:
            await self._begin_docker(dockers)
        elif self._remains():
            try:
                await self._begin_docker(dockers)
            except ModelswapError as away:
                _log.warning("containers of an earlier run can't be looked after", reason=str(away))
        await self._process.configure({name: known for name, known in models.items() if name not in dockers})
        self._dockers = frozenset(dockers)

    async def fetch(self, name: str, spec: Model, report: Report) -> None:
        """See `Runtime`."""
        await self._of(spec).fetch(name, spec, report)

    async def allocate(self, spec: Model) -> Place:
        """See `Runtime`."""
        return await self._of(spec).allocate(spec)

    async def create(self, order: StartOrder) -> None:
        """See `Runtime`."""
        await self._of(order.spec).create(order)

    async def start(self, order: StartOrder) -> Running:
        """See `Runtime`."""
        return await self._of(order.spec).start(order)

    async def stand_by(self, plans: Sequence[StandbyPlan]) -> None:
        """See `Runtime`. Plans for containers wait until Docker is open."""
        await self._process.stand_by([plan for plan in plans if plan.spec is None])
        if self._docker is not None:
            await self._docker.stand_by([plan for plan in plans if plan.spec is not None])

    def standbys(self) -> list[StandbyState]:
        """See `Runtime`."""
        return [state for runtime in self._all() for state in runtime.standbys()]

    async def wait(self, running: Running) -> Exit:
        """See `Runtime`."""
        return await self._hosting(running).wait(running)

    async def stop(self, running: Running, grace: float) -> Exit:
        """See `Runtime`."""
        return await self._hosting(running).stop(running, grace)

    async def listening(self, running: Running) -> bool:
        """See `Runtime`."""
        return await self._hosting(running).listening(running)

    async def host_bytes(self, running: Running) -> int:
        """See `Runtime`."""
        return await self._hosting(running).host_bytes(running)

    async def told(self, running: Running) -> Told | None:
        """See `Runtime`."""
        return await self._hosting(running).told(running)

    async def instances(self) -> list[Running]:
        """See `Runtime`."""
        return [running for runtime in self._all() for running in await runtime.instances()]

    def foreign(self, running: Running) -> bool:
        """See `Runtime`."""
        return self._hosting(running).foreign(running)

    async def appeared(self) -> Running:
        """See `Runtime`. What appears while nobody waits, or while a wait is cancelled, is told by the next one."""
        while True:
            asked = set(self._appearing.values())
            for runtime in self._all():
                if runtime not in asked:
                    self._appearing[asyncio.ensure_future(runtime.appeared())] = runtime
            opened = asyncio.ensure_future(self._opened.wait())
            more = {opened} if self._docker is None else set[asyncio.Task[bool]]()
            try:
                await asyncio.wait({*self._appearing, *more}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                opened.cancel()
            for task in self._appearing:
                if task.done():
                    del self._appearing[task]
                    return task.result()

    def shares_cache(self, spec: Model) -> bool:
        """Return whether a container that somebody else made loads its weights from our Hugging Face cache."""
        return self._docker is not None and self._docker.shares_cache(spec)

    def owns(self, pid: int) -> bool:
        """See `Runtime`."""
        return any(runtime.owns(pid) for runtime in self._all())

    async def log_tail(self, model: str, lines: int, instance: str | None = None) -> list[str]:
        """See `Runtime`; of a model that isn't configured any more, whichever has a log."""
        if self._docker is None:
            return await self._process.log_tail(model, lines, instance)
        first, second = self._process, self._docker
        if model in self._dockers:
            first, second = second, first
        # A model may just have moved from one to the other.
        return await first.log_tail(model, lines, instance) or await second.log_tail(model, lines, instance)

    async def sweep(self, keep: set[str]) -> list[str]:
        """See `Runtime`."""
        swept: list[str] = []
        stuck: ModelswapError | None = None
        for runtime in self._all():
            try:
                swept += await runtime.sweep(keep)
            except ModelswapError as error:
                if stuck is not None:
                    _log.error("can't be swept", reason=str(stuck))
                stuck = error
        if stuck is not None:
            raise stuck
        return swept

    async def rotate(self) -> None:
        """See `Runtime`."""
        for runtime in self._all():
            await runtime.rotate()

    def _all(self) -> list[Runtime]:
        return [self._process] if self._docker is None else [self._process, self._docker]

    def _of(self, spec: Model) -> Runtime:
        return self._process if spec.runtime == "process" else self._sure()

    def _hosting(self, running: Running) -> Runtime:
        return self._sure() if running.container else self._process

    def _sure(self) -> Containers:
        if self._docker is None:
            raise DockerNotOpen(_NOT_OPEN)
        return self._docker

    async def _begin_docker(self, models: Mapping[str, Known]) -> None:
        """Open Docker; a task of its own enters and leaves the context, since whoever configures us comes and goes."""
        opened: asyncio.Future[Containers] = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep(opened), name="docker")
        try:
            docker = await opened
            await docker.configure(models)
        except BaseException:
            if opened.cancelled():
                self._keeper.cancel()
            await self._close_docker()
            raise
        self._docker = docker
        self._opened.set()

    async def _keep(self, opened: asyncio.Future[Containers]) -> None:
        try:
            async with self._open_docker() as docker:
                if not opened.done():
                    opened.set_result(docker)
                await self._closing.wait()
        except Exception as error:  # noqa: BLE001 - told to whoever waits for Docker, else in the log
            if opened.done():
                _log.error("the connection to Docker has ended", exc_info=error)
            else:
                opened.set_exception(error)

    async def _close_docker(self) -> None:
        keeper, self._keeper, self._docker = self._keeper, None, None
        if keeper is not None:
            self._closing.set()
            await asyncio.wait([keeper])
            self._closing.clear()
