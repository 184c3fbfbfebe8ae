"""Starts containers, and says which start of which container an instance is."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import aiodocker
import structlog

from modelswap.engines.base import Address
from modelswap.runtimes.base import Running, StartFailed, StartOrder
from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.catalogue import Catalogue
from modelswap.runtimes.docker.client import SLOW, START_SECONDS, failure, persistently
from modelswap.runtimes.docker.inspected import Inspected, finished_at, is_limited, is_running, name_of
from modelswap.runtimes.docker.lives import Life, key_of
from modelswap.runtimes.docker.making import Maker
from modelswap.runtimes.docker.reach import Unreached, address_of, started_at
from modelswap.runtimes.docker.records import Start, Starts
from modelswap.runtimes.docker.refusals import has_gone, network_has_gone, port_is_taken, refused
from modelswap.runtimes.docker.spending import Spender
from modelswap.runtimes.docker.stopping import Stopper
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.runtimes.docker.tracking import Tracker

_TRIES: Final = 4

_log = structlog.get_logger(__name__)


class Starter:
    """Makes containers ready and starts them."""

    def __init__(
        self,
        docker: aiodocker.Docker,
        around: Surroundings,
        catalogue: Catalogue,
        maker: Maker,
        tracker: Tracker,
        starts: Starts,
        stopper: Stopper,
        spender: Spender,
    ) -> None:
        self._docker = docker
        self._around = around
        self._catalogue = catalogue
        self._maker = maker
        self._tracker = tracker
        self._starts = starts
        self._stopper = stopper
        self._spender = spender
        self._locks: dict[str, asyncio.Lock] = {}

    async def create(self, order: StartOrder) -> None:
        """Have a model's container there; one that still runs as it was before is replaced by its next start."""
        if order.spec.runtime == "adopted":
            await self._catalogue.find(order.model, order.spec)
            return
        async with self._lock(order.model):
            found, fits = await self._maker.find(order)
            if found is not None and (fits or is_running(found)):
                return
            if found is not None:
                await self._maker.remove(found)
            await self._maker.make(order)

    async def start(self, order: StartOrder) -> Running:
        """Start a model's container; see `Runtime.start`."""
        async with self._lock(order.model):
            if (running := await self._spender.start(order)) is not None:
                return running
            for tries_left in reversed(range(_TRIES)):
                inspected = await self._ready(order)
                try:
                    return await self._begin(order, inspected)
                except aiodocker.DockerError as error:
                    name = name_of(inspected)
                    # A container keeps its port, and the id of its network.
                    outdated = order.spec.runtime == "managed" and (port_is_taken(error) or network_has_gone(error))
                    if not tries_left or not (outdated or has_gone(error)):
                        raise refused(error, name) from error
                    _log.warning("start failed, trying again", model=order.model, container=name, reason=str(error))
                    if outdated:
                        await self._maker.remove(inspected)
        raise AssertionError("the last try returns or raises")

    def _lock(self, model: str) -> asyncio.Lock:
        return self._locks.setdefault(model, asyncio.Lock())

    async def _ready(self, order: StartOrder) -> Inspected:
        """Return the container to start, made if need be. It may run already: then somebody was faster."""
        if order.spec.runtime == "adopted":
            return await self._quiet(await self._catalogue.find(order.model, order.spec))
        found, fits = await self._maker.find(order)
        if found is not None:
            found = await self._quiet(found)
            if fits:
                return found
            if is_running(found):
                await self._stopper.stop(await self._life(order, found), 0)
            await self._maker.remove(found)
        return await self._maker.make(order)

    async def _quiet(self, inspected: Inspected) -> Inspected:
        """Return a container once a stop of it that goes on has come to its end."""
        life = self._tracker.lives.get(inspected["Id"], started_at(inspected))
        if life is None or not is_running(inspected):
            return inspected
        if not (life.asked or life.killed):
            if not life.foreign and not life.unwanted:
                raise StartFailed(f"it runs already, as instance {life.running.instance}; that must be stopped first")
            return inspected
        await life.ended.wait()
        return await self._inspect(inspected["Id"]) or inspected

    async def _begin(self, order: StartOrder, inspected: Inspected) -> Running:
        container = inspected["Id"]
        previous = started_at(inspected)
        start = Start(
            instance=order.instance,
            model=order.model,
            definition=order.definition,
            container=container,
            port=order.address.port,
            previous=previous,
            before=finished_at(inspected),
            written=time.time(),
        )
        self._tracker.ordering.add(container)
        try:
            if is_running(inspected):
                # Somebody has started it just now: it is what was ordered, so it becomes ours.
                _log.warning("runs already", model=order.model, container=name_of(inspected))
            else:
                await self._tracker.cleaned_up()
                self._forget_unfinished(container)
                self._starts.write(start)
                try:
                    inspected = await self._post(start)
                except BaseException:
                    # If it starts after all, it will be noticed as somebody else's.
                    self._starts.forget(start.instance)
                    raise
            return await self._begun(order, start, inspected)
        finally:
            self._tracker.ordering.discard(container)

    async def _begun(self, order: StartOrder, start: Start, inspected: Inspected) -> Running:
        born = started_at(inspected)
        unreached: Unreached | None = None
        address = Address(order.address.host, order.address.port)
        if is_running(inspected):
            try:
                address = address_of(inspected, self._around, start.port)
            except Unreached as error:
                unreached = error
        start = start.completed(born, address)
        life = Life(
            start.running(),
            port=start.port,
            limited=is_limited(inspected),
            log_since=start.log_since,
            announced=True,
        )
        self._starts.note(start)
        self._tracker.add(life)
        if not is_running(inspected):
            self._tracker.ended(life, inspected["State"].get("ExitCode"), finished_at(inspected))
        if unreached is not None:
            await self._stopper.stop(life, 0)
            raise StartFailed(str(unreached), code=unreached.code) from unreached
        return life.running

    async def _post(self, start: Start) -> Inspected:
        """Start a container, once even if Docker is away for a while; returns what it says of it then."""
        before = key_of(start.container, start.previous)
        first = True

        async def post() -> None:
            nonlocal first
            if not first:
                again = await api.inspect(self._docker, start.container)
                if again is not None and key_of(start.container, started_at(again)) != before:
                    return
            first = False
            await api.call(self._docker, "POST", f"containers/{start.container}/start", timeout=SLOW)

        await persistently(post, f"starting {start.model}", limit=START_SECONDS)
        inspected = await self._inspect(start.container)
        if inspected is None or key_of(start.container, started_at(inspected)) == before:
            raise StartFailed(f"the container of {start.model} was removed or restarted while it was being started")
        return inspected

    async def _life(self, order: StartOrder, inspected: Inspected) -> Life:
        """Return what is known of a container that runs though it shouldn't."""
        known = self._tracker.lives.get(inspected["Id"], started_at(inspected))
        if known is None:
            known = Life(
                Running(
                    instance=f"stale.{order.instance}",
                    model=order.model,
                    definition="",
                    address=order.address,
                    born=started_at(inspected),
                    container=inspected["Id"],
                ),
                announced=True,
            )
            self._tracker.add(known)
        return known

    async def _inspect(self, container: str) -> Inspected | None:
        try:
            return await persistently(lambda: api.inspect(self._docker, container), "looking at a container")
        except aiodocker.DockerError as error:
            raise failure(error, f"to look at container {container[:12]}") from error

    def _forget_unfinished(self, container: str) -> None:
        for start in self._starts.of_container(container):
            if not start.born:
                self._starts.forget(start.instance)
