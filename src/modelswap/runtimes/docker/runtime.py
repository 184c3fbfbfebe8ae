"""The runtime that hosts engines in containers: those it makes (managed), and those that others made (adopted)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import aiodocker
import structlog

from modelswap.engines.base import Address, Place, StandbyPlan
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
from modelswap.runtimes.docker import api, logs, memory
from modelswap.runtimes.docker.catalogue import Catalogue
from modelswap.runtimes.docker.chores import Chores
from modelswap.runtimes.docker.client import CALL_SECONDS, Trouble, failure, persistently
from modelswap.runtimes.docker.images import ImageUnavailable, local_image, pull
from modelswap.runtimes.docker.inspected import command_of, is_running
from modelswap.runtimes.docker.lives import Life, key_of
from modelswap.runtimes.docker.making import ANYWHERE, Maker
from modelswap.runtimes.docker.owner import Ownership
from modelswap.runtimes.docker.reach import Unreached, address_of, started_at
from modelswap.runtimes.docker.records import LOG_MARGIN, Starts
from modelswap.runtimes.docker.sharing import environment
from modelswap.runtimes.docker.standbys import Standbys
from modelswap.runtimes.docker.starting import Starter
from modelswap.runtimes.docker.stopping import Stopper
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.runtimes.docker.tracking import Tracker
from modelswap.spec.config import Model

_log = structlog.get_logger(__name__)


class DockerRuntime:
    """`Runtime` over containers; made by `opening.open_runtime`.

    Once another orchestrator has taken over this Docker, whatever would change anything there raises `OtherOwner`.

    An instance's identity is its container and when Docker started that; the rest is in our records.
    """

    def __init__(
        self,
        docker: aiodocker.Docker,
        around: Surroundings,
        *,
        catalogue: Catalogue,
        maker: Maker,
        tracker: Tracker,
        starter: Starter,
        stopper: Stopper,
        starts: Starts,
        standbys: Standbys,
        chores: Chores,
        ownership: Ownership,
    ) -> None:
        self._docker = docker
        self._around = around
        self._catalogue = catalogue
        self._maker = maker
        self._tracker = tracker
        self._starter = starter
        self._stopper = stopper
        self._starts = starts
        self._standbys = standbys
        self._chores = chores
        self._ownership = ownership
        tracker.on_unwanted = self._sweep_unwanted

    async def configure(self, models: Mapping[str, Known]) -> None:
        """See `Runtime`. Raises `DockerAway`; what can't be done to single containers now is told in the log."""
        self._ownership.ensure()
        before = self._catalogue.models
        self._catalogue.configure(models)
        try:
            await self._take_in(models)
        except BaseException:
            if before is not None:
                self._catalogue.configure(before)  # whoever asked goes on with the config as it was
            raise
        if before != models:
            self._standbys.reconsider()

    async def _take_in(self, models: Mapping[str, Known]) -> None:
        await self._catalogue.forbid_restarts(self._catalogue.adopted())
        try:
            await persistently(self._tracker.reconcile, "looking at what runs")
            await self._maker.remove_outdated(models)
        except StartFailed as refused:
            _log.warning("an old container can't be removed", reason=str(refused))
        except Trouble as error:
            raise failure(error, "to tell what runs") from error

    async def fetch(self, name: str, spec: Model, report: Report) -> None:
        """See `Runtime`: have the image here. An adopted container must be there, and its image is then, too."""
        if spec.image is None:
            await self._catalogue.find(name, spec)
            return
        ref = spec.image
        try:
            here = (
                None
                if spec.pull == "always"
                else await persistently(lambda: local_image(self._docker, ref), f"looking for image {ref}")
            )
            if here is not None:
                return
            if spec.pull == "never":
                raise ImageUnavailable(
                    f"the image {ref} isn't here, and 'pull: never' forbids to fetch it; build it, load it "
                    "(docker load), or say pull: missing",
                    code=Code.MODEL_BROKEN,
                )
            await pull(self._docker, ref, report)
        except Trouble as error:
            raise failure(error, f"to fetch the image {ref}") from error

    def shares_cache(self, spec: Model) -> bool:
        """Return whether a container that somebody else made loads its weights from our Hugging Face cache."""
        return self._catalogue.shares_cache(spec)

    async def allocate(self, spec: Model) -> Place:
        """See `Runtime`; the address is the container's own. Raises `NotPrepared` if its image isn't here."""
        if spec.runtime == "managed":
            return await self._maker.place(spec)
        port = spec.port
        if port is None:
            name = spec.container or spec.compose_service or ""
            port = self._catalogue.port(spec, await self._catalogue.find(name, spec))
        return Place(Address(ANYWHERE, port), ())

    async def create(self, order: StartOrder) -> None:
        """See `Runtime`."""
        self._ownership.ensure()
        try:
            await self._starter.create(order)
        except Trouble as error:
            raise failure(error, f"to make the container of {order.model}") from error

    async def start(self, order: StartOrder) -> Running:
        """See `Runtime`. When cancelled, what was started is killed first: nobody would know of it."""
        self._ownership.ensure()
        starting = self._chores.start_awaited(self._start(order), f"start {order.instance}")
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            if not starting.cancelled():
                await asyncio.shield(self._chores.start(self._undo(starting), f"undo {order.instance}"))
            raise

    async def stand_by(self, plans: Sequence[StandbyPlan]) -> None:
        """See `Runtime`."""
        # Those that wait are ours to end in any case.
        await self._standbys.keep(plans if self._ownership.lost is None else ())

    def standbys(self) -> list[StandbyState]:
        """See `Runtime`."""
        return self._standbys.states()

    async def wait(self, running: Running) -> Exit:
        """See `Runtime`."""
        life = self._life(running)
        if life is None:
            return Exit(None)
        if life.exit is None:
            # If Docker is away, this is made up for when it's back.
            with contextlib.suppress(*Trouble):
                async with asyncio.timeout(CALL_SECONDS):
                    await self._tracker.settle(life)
        await life.ended.wait()
        assert life.exit is not None  # noqa: S101 - for the type checker
        return life.exit

    async def stop(self, running: Running, grace: float) -> Exit:
        """See `Runtime`. Raises `DockerAway` besides."""
        self._ownership.ensure()
        life = self._life(running)
        return Exit(None) if life is None else await self._stopper.stop(life, grace)

    async def listening(self, running: Running) -> bool:
        """See `Runtime`: whether its address is still this start's (Docker gives it to another container later)."""
        life = self._life(running)
        if life is None or life.exit is not None:
            return False
        try:
            inspected = await persistently(
                lambda: api.inspect(self._docker, running.container), f"looking at {running.model}"
            )
        except aiodocker.DockerError as error:
            raise failure(error, f"to look at the container of {running.model}") from error
        if inspected is None or not is_running(inspected) or started_at(inspected) != running.born:
            return False
        known = (self._catalogue.models or {}).get(running.model)
        port = life.port or (self._catalogue.port(known.spec, inspected) if known else running.address.port)
        try:
            return address_of(inspected, self._around, port) == running.address
        except Unreached:
            return False

    async def host_bytes(self, running: Running) -> int:
        """See `Runtime`."""
        return await memory.of_container(self._docker, running.container)

    async def told(self, running: Running) -> Told | None:
        """See `Runtime`."""
        known = (self._catalogue.models or {}).get(running.model)
        if known is None or known.spec.runtime != "adopted":
            return None
        try:
            inspected = await persistently(
                lambda: api.inspect(self._docker, running.container), f"looking at {running.model}"
            )
        except Trouble as error:
            raise failure(error, f"to look at the container of {running.model}") from error
        return None if inspected is None else Told(tuple(command_of(inspected)), environment(inspected))

    async def instances(self) -> list[Running]:
        """See `Runtime`."""
        try:
            return [life.running for life in await self._tracker.instances()]
        except Trouble as error:
            raise failure(error, "to tell what runs") from error

    def foreign(self, running: Running) -> bool:
        """See `Runtime`."""
        life = self._tracker.lives.get(running.container, running.born)
        return life is not None and life.foreign and life.running.instance == running.instance

    async def appeared(self) -> Running:
        """See `Runtime`."""
        return await self._tracker.appeared()

    def owns(self, pid: int) -> bool:
        """See `Runtime`; in a container ourselves we don't see the processes of others."""
        try:
            groups = Path(f"/proc/{pid}/cgroup").read_text()
        except OSError:
            return False
        return any(life.running.container in groups for life in self._tracker.lives.living())

    async def log_tail(self, model: str, lines: int, instance: str | None = None) -> list[str]:
        """See `Runtime`. Raises `DockerAway`."""
        starts = self._known()
        wanted = [one for one in starts if one[0].model == model and instance in (None, one[0].instance)]
        if not wanted:
            return []
        running, since = max(wanted, key=lambda one: one[0].born)
        later = [s for other, s in starts if other.container == running.container and other.born > running.born]
        return await logs.tail(self._docker, running.container, lines, since, min(later, default=None))

    async def sweep(self, keep: set[str]) -> list[str]:
        """See `Runtime`; what others started of configured models is not ours."""
        self._ownership.ensure()
        try:
            strays = [life for life in await self._tracker.ours() if life.running.instance not in keep]
        except Trouble as error:
            raise failure(error, "to tell what runs") from error
        ends = await asyncio.gather(*(self._stopper.stop(life, 0) for life in strays), return_exceptions=True)
        stuck = [error for error in ends if isinstance(error, BaseException)]
        if stuck:
            raise Unkillable("; ".join(str(error) for error in stuck))
        # What an earlier one of us didn't get to start is nobody's now: a later start of the same container isn't its.
        living = {life.running.instance for life in self._tracker.lives.living()}
        self._starts.close(living, self._tracker.ordering)
        return [
            f"container {life.running.container[:12]} of {life.running.model}, instance {life.running.instance}"
            for life in strays
        ] + await self._sweep_standbys()

    async def rotate(self) -> None:
        """Look whether anything was missed, forget old starts, remove containers that nobody wants any more."""
        if self._ownership.lost is not None:
            return
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await self._tracker.reconcile()
            if self._catalogue.models is not None:
                await self._maker.remove_outdated(self._catalogue.models)
                await self._standbys.tidy()
        except (*Trouble, ModelswapError) as error:
            # It comes again in a few seconds.
            _log.debug("housekeeping", reason=str(error) or repr(error))
        living = {life.running.instance for life in self._tracker.lives.living()}
        self._starts.prune(self._catalogue.models or {}, living)

    async def _sweep_standbys(self) -> list[str]:
        try:
            return await self._standbys.tidy()
        except (*Trouble, ModelswapError) as error:
            # They hold no device, and housekeeping comes again in a few seconds.
            _log.warning("containers on standby can't be removed now", reason=str(error) or repr(error))
            return []

    def _known(self) -> list[tuple[Running, float]]:
        """Return all starts that we know of, and from when on their container's log is theirs."""
        known = {key_of(s.container, s.born): (s.running(), s.log_since) for s in self._starts.all() if s.born}
        for life in self._tracker.lives.all():
            known[key_of(life.running.container, life.running.born)] = (life.running, life.log_since)
        return list(known.values())

    async def _start(self, order: StartOrder) -> Running:
        try:
            return await self._starter.start(order)
        except Trouble as error:
            raise failure(error, f"to start {order.model}") from error

    async def _undo(self, starting: asyncio.Task[Running]) -> None:
        await asyncio.wait([starting])
        if not starting.cancelled() and starting.exception() is None:
            await self.stop(starting.result(), 0)

    def _life(self, running: Running) -> Life | None:
        """Return what is known of an instance; None if it has become another one, which we started."""
        life = self._tracker.lives.get(running.container, running.born)
        if life is None:
            start = self._starts.get(running.instance)
            life = Life(
                running,
                port=start.port if start is not None else 0,
                log_since=start.log_since if start is not None else running.born - LOG_MARGIN,
                announced=True,
            )
            self._tracker.add(life)
        return life if life.running.instance == running.instance else None

    def _sweep_unwanted(self, life: Life) -> None:
        if self._ownership.lost is not None:
            return
        _log.warning(
            "started by somebody else, but no model is configured like this: killed",
            model=life.running.model,
            container=life.running.container[:12],
        )
        self._chores.start(self._stopper.stop(life, 0), f"kill {life.running.instance}")
