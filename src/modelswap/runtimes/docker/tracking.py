"""Keeps up with what runs: which start of which container is which instance, who started it, and how it ended.

Looking tells for sure, events only when to look. But an end is told by its event alone: while Docker cleans up after a
container, it answers no question about it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import aiodocker
import structlog

from modelswap.engines.base import Address
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import Running
from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.catalogue import Belonging, Catalogue
from modelswap.runtimes.docker.chores import Chores
from modelswap.runtimes.docker.client import CALL_SECONDS, Trouble, persistently
from modelswap.runtimes.docker.events import Event
from modelswap.runtimes.docker.inspected import (
    Inspected,
    finished_at,
    is_limited,
    is_running,
    labels_of,
    name_of,
    was_oom_killed,
)
from modelswap.runtimes.docker.lives import Life, Lives, key_of
from modelswap.runtimes.docker.reach import Unreached, address_of, started_at
from modelswap.runtimes.docker.records import LOG_MARGIN, Start, Starts
from modelswap.runtimes.docker.surroundings import Surroundings

_SIGKILLED: Final = 137
_NOWHERE: Final = "0.0.0.0"

_log = structlog.get_logger(__name__)


class Tracker:
    """All starts that are of any interest to us."""

    def __init__(
        self, docker: aiodocker.Docker, around: Surroundings, catalogue: Catalogue, starts: Starts, chores: Chores
    ) -> None:
        self._docker = docker
        self._around = around
        self._catalogue = catalogue
        self._starts = starts
        self._chores = chores
        self._last_die: dict[str, Event] = {}
        self._appearing: dict[str, Life] = {}
        self._news = asyncio.Event()
        self._cleaning: set[asyncio.Task[None]] = set()
        self.lives = Lives()
        self.on_unwanted: Callable[[Life], None] = lambda life: None
        """Called for what carries our labels and was started by others, though no model is configured like it."""
        self.ordering: set[str] = set()
        """Containers that we are about to start: their starts are ours."""

    # What happens

    def take(self, event: Event) -> None:
        """Take in an event."""
        match event.action:
            case "die":
                self._last_die[event.container] = event
                self._died(event)
            case "oom":
                for life in self.lives.living(event.container):
                    life.oom = life.limited is not False
            case "destroy":
                self._last_die.pop(event.container, None)
                for life in self.lives.living(event.container):
                    self.ended(life, None, event.at)
            case "start" if event.container not in self.ordering and self._concerns(event):
                self._chores.start(self._look(event.container), "look at a start")
            case "create" | "rename":
                adopted = set(self._catalogue.adopted())
                if names := [name for name in self._candidates(event) if name in adopted]:
                    self._chores.start(self._forbid(names), "forbid restarts")

    def ended(self, life: Life, code: int | None, at: float) -> None:
        """Note how a start ended, and when."""
        life.end(code, at)
        self._appearing.pop(life.running.instance, None)
        start = self._starts.get(life.running.instance)
        if start is not None and not start.ended:
            # An end that nobody saw is later than any start.
            self._starts.note(start.finished(at or life.running.born))

    def add(self, life: Life) -> None:
        """Note a start that we hear of now."""
        self.lives.add(life)
        died = self._last_die.get(life.running.container)
        if died is not None:
            self._died(died)

    async def settle(self, life: Life) -> Inspected | None:
        """Look whether a start still runs; returns what Docker says of its container. Raises as calls do."""
        running = life.running
        inspected = await api.inspect(self._docker, running.container)
        if life.exit is not None:
            return inspected
        if inspected is None or started_at(inspected) != running.born:
            self.ended(life, None, 0.0)
        elif not is_running(inspected):
            life.oom = life.oom or was_oom_killed(inspected)
            self.ended(life, inspected["State"].get("ExitCode"), finished_at(inspected))
        else:
            life.limited = is_limited(inspected)
        return inspected

    async def reconcile(self) -> None:
        """Look at everything: what has ended, what others have started. Raises as calls do."""
        await asyncio.gather(*(self.settle(life) for life in self.lives.living()))
        if self._catalogue.models is not None:
            for life in await self._running():
                self._announce(life)

    async def instances(self) -> list[Life]:
        """Return everything that runs, ours and of configured models; `appeared` doesn't tell of these any more."""
        found = await persistently(self._running, "looking at what runs", limit=2 * CALL_SECONDS)
        for life in found:
            life.announced = True
            self._appearing.pop(life.running.instance, None)
        return found

    async def ours(self) -> list[Life]:
        """Return what runs, but for others' starts of configured models; `appeared` goes on to tell of those."""
        found = await persistently(self._running, "looking at what runs", limit=2 * CALL_SECONDS)
        ours = [life for life in found if not life.foreign]
        for life in ours:
            life.announced = True
        for life in found:
            self._announce(life)
        return ours

    async def appeared(self) -> Running:
        """Return the next start by somebody else."""
        while not self._appearing:
            self._news.clear()
            await self._news.wait()
        instance = next(iter(self._appearing))
        return self._appearing.pop(instance).running

    async def cleaned_up(self) -> None:
        """Return when Docker has cleaned up after what has ended: until then its ports and addresses are taken."""
        if self._cleaning:
            await asyncio.wait(self._cleaning)

    # What it means

    def _died(self, event: Event) -> None:
        mine = [life for life in self.lives.living(event.container) if life.running.born < event.at]
        if mine:
            cleaning = self._chores.start(self._cleaned(event.container), "see Docker clean up")
            self._cleaning.add(cleaning)
            cleaning.add_done_callback(self._cleaning.discard)
        mine.sort(key=lambda life: life.running.born)
        for missed in mine[:-1]:
            self.ended(missed, None, 0.0)
        for life in mine[-1:]:
            code = event.attributes.get("exitCode", "")
            number = int(code) if code.isdigit() else None
            unsure = not (life.killed or life.oom) and life.limited is not False
            if number == _SIGKILLED and unsure:
                self._chores.start(self._ended_by_sigkill(life, event.at), "look at an end")
            else:
                self.ended(life, number, event.at)

    async def _cleaned(self, container: str) -> None:
        with contextlib.suppress(*Trouble):
            async with asyncio.timeout(CALL_SECONDS):
                await api.inspect(self._docker, container)

    async def _ended_by_sigkill(self, life: Life, at: float) -> None:
        """Note the end of what somebody killed, once Docker says whether that was the kernel, for want of memory."""
        with contextlib.suppress(*Trouble):
            async with asyncio.timeout(CALL_SECONDS):
                inspected = await api.inspect(self._docker, life.running.container)
            if inspected is not None and started_at(inspected) == life.running.born:
                life.oom = life.oom or was_oom_killed(inspected)
        self.ended(life, _SIGKILLED, at)

    def _candidates(self, event: Event) -> list[str]:
        return self._catalogue.candidates(event.container, [event.attributes.get("name", "")], event.attributes)

    def _concerns(self, event: Event) -> bool:
        return bool(self._candidates(event) or self._starts.of_container(event.container))

    async def _look(self, container: str) -> None:
        try:
            inspected = await persistently(lambda: api.inspect(self._docker, container), "looking at a start")
            if inspected is None or self._catalogue.models is None:
                return
            if labels_of(inspected) and self._catalogue.adopted():
                await self._forbid(self._catalogue.candidates(container, [name_of(inspected)], labels_of(inspected)))
            if (life := await self._identify(inspected)) is not None:
                self._announce(life)
        except (*Trouble, ModelswapError) as error:
            # Housekeeping looks again in a few seconds.
            _log.warning("a start can't be looked at", container=container[:12], reason=str(error) or repr(error))

    async def _forbid(self, names: list[str]) -> None:
        try:
            adopted = set(self._catalogue.adopted())
            await self._catalogue.forbid_restarts([name for name in names if name in adopted])
        except ModelswapError as error:
            _log.warning("the restart policy can't be set", models=names, reason=str(error))

    def _announce(self, life: Life) -> None:
        if life.announced:
            return
        life.announced = True
        if life.foreign:
            self._appearing[life.running.instance] = life
            self._news.set()
        elif life.unwanted:
            self.on_unwanted(life)

    async def _running(self) -> list[Life]:
        listed = await api.call(self._docker, "GET", "containers/json")
        recorded = {start.container for start in self._starts.all()}
        wanted = [
            each["Id"]
            for each in listed
            if each["Id"] in recorded or self._catalogue.candidates(each["Id"], each["Names"], each["Labels"])
        ]
        inspected = await asyncio.gather(*(api.inspect(self._docker, container) for container in wanted))
        lives = [await self._identify(one) for one in inspected if one is not None]
        return [life for life in lives if life is not None]

    async def _identify(self, inspected: Inspected) -> Life | None:
        """Return which instance runs in a container; None if none that concerns us."""
        container, born = inspected["Id"], started_at(inspected)
        if not is_running(inspected):
            return None
        if (life := self.lives.get(container, born)) is not None:
            return life if life.exit is None else None
        start = self._recorded(container, born)
        belonging = None if start is not None else await self._catalogue.belonging(inspected)
        # Both may have become known meanwhile.
        if (life := self.lives.get(container, born)) is not None:
            return life if life.exit is None else None
        if container in self.ordering:
            return None
        if start is not None:
            life = self._ours(start, inspected)
        elif belonging is not None:
            life = self._not_ours(belonging, inspected)
        else:
            return None
        self.add(life)
        return life if life.exit is None else None

    def _recorded(self, container: str, born: float) -> Start | None:
        """Return our record of a start: complete, or written just before it, when we died."""
        starts = sorted(self._starts.of_container(container), key=lambda start: start.written, reverse=True)
        now = key_of(container, born)
        for start in starts:
            if key_of(container, start.born) == now:
                return start
        return next((s for s in starts if not s.born and key_of(container, s.previous) != now), None)

    def _ours(self, start: Start, inspected: Inspected) -> Life:
        born = started_at(inspected)
        if not start.born:
            start = start.completed(born, self._address(inspected, start.port))
            self._starts.note(start)
        return Life(
            start.running(),
            port=start.port,
            limited=is_limited(inspected),
            log_since=start.log_since,
            announced=True,
        )

    def _not_ours(self, belonging: Belonging, inspected: Inspected) -> Life:
        born = started_at(inspected)
        running = Running(
            instance=f"manual.{inspected['Id'][:12]}.{round(born * 1e6)}",
            model=belonging.model,
            definition=belonging.definition,
            address=self._address(inspected, belonging.port),
            born=born,
            container=inspected["Id"],
        )
        since = max(finished_at(inspected), born - LOG_MARGIN)
        return Life(
            running,
            foreign=belonging.current,
            unwanted=not belonging.current,
            port=belonging.port,
            limited=is_limited(inspected),
            log_since=since,
        )

    def _address(self, inspected: Inspected, port: int) -> Address:
        try:
            return address_of(inspected, self._around, port)
        except Unreached as error:
            _log.warning("runs, but can't be reached", container=name_of(inspected), reason=str(error))
            return Address(_NOWHERE, port)
