"""Starts a model in a container that waits for that."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiodocker
import structlog

from modelswap.engines.base import StandbyPlan
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import Running, StartFailed, StartOrder
from modelswap.runtimes.docker import api, body
from modelswap.runtimes.docker.chores import Chores
from modelswap.runtimes.docker.client import Trouble, persistently
from modelswap.runtimes.docker.inspected import is_limited, is_running
from modelswap.runtimes.docker.lives import Life
from modelswap.runtimes.docker.making import Maker
from modelswap.runtimes.docker.reach import address_of, started_at
from modelswap.runtimes.docker.records import Start, Starts
from modelswap.runtimes.docker.standbys import Standby, Standbys
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.runtimes.docker.tracking import Tracker

_log = structlog.get_logger(__name__)


class Spender:
    """Has containers on standby become engines."""

    def __init__(
        self,
        docker: aiodocker.Docker,
        around: Surroundings,
        maker: Maker,
        tracker: Tracker,
        starts: Starts,
        standbys: Standbys,
        chores: Chores,
    ) -> None:
        self._docker = docker
        self._around = around
        self._maker = maker
        self._tracker = tracker
        self._starts = starts
        self._standbys = standbys
        self._chores = chores

    async def start(self, order: StartOrder) -> Running | None:
        """Start it in one that waits; None if there is none, or none that will.

        Raises `ModelswapError` if one that failed can't be removed: it may have become the engine after all.
        """
        plan = order.standby
        if plan is None or plan.spec is None or order.spec.runtime != "managed":
            return None
        standby = await self._standbys.take(plan.key)
        if standby is None:
            return None
        try:
            running = await self._become(order, plan, standby)
        except (ModelswapError, *Trouble, ValueError) as error:
            _log.warning("cold start instead", model=order.model, reason=str(error) or repr(error))
            self._starts.forget(order.instance)
            await self._standbys.discard(standby)
            return None
        self._standbys.release(standby)
        return running

    async def _become(self, order: StartOrder, plan: StandbyPlan, standby: Standby) -> Running:
        wanted = await self._maker.standby_body(plan, order.spec, published=False)
        if wanted["Labels"][body.BODY] != standby.body:
            raise StartFailed("the standby was made from another image, or for another kind of container")
        container = standby.container
        inspected = await persistently(lambda: api.inspect(self._docker, container), "looking at a standby")
        if inspected is None or not is_running(inspected):
            raise StartFailed("the standby has ended")
        born, address = started_at(inspected), address_of(inspected, self._around, order.address.port)
        start = Start(
            instance=order.instance,
            model=order.model,
            definition=order.definition,
            container=container,
            port=order.address.port,
            previous=born,
            written=time.time(),
            mechanism="standby",
        )
        self._tracker.ordering.add(container)
        try:
            # Whoever comes after us takes it for the engine once this is completed; until then it may still be waiting.
            self._starts.write(start)
            answer = await self._standbys.tell(standby, _order(order))
            if not answer.get("taken"):
                raise StartFailed(f"the standby refused its order: {answer.get('error', 'without a reason')}")
            start = start.completed(born, address)
            self._starts.note(start)
            life = Life(
                start.running(),
                port=start.port,
                limited=is_limited(inspected),
                log_since=start.log_since,
                announced=True,
            )
            self._tracker.add(life)
        finally:
            self._tracker.ordering.discard(container)
        self._chores.start(self._rename(order.model, standby), f"rename {standby.name}")
        return life.running

    async def _rename(self, model: str, standby: Standby) -> None:
        """Say in its name whose it is now, for people."""
        name = f"{body.container_name(model)}-{standby.name.removeprefix('modelswap-')}"
        try:
            async with asyncio.timeout(30.0):
                await api.call(self._docker, "POST", f"containers/{standby.container}/rename", params={"name": name})
        except Trouble as error:
            _log.debug("a spent standby can't be renamed", container=standby.name, reason=str(error))


def _order(order: StartOrder) -> dict[str, Any]:
    return {"argv": order.launch.argv, "env": order.launch.env, "add": True, "cwd": order.launch.cwd}
