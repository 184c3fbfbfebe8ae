"""One orchestrator per Docker: who may start and stop containers there.

Two that don't know of each other would stop each other's engines, so the second refuses to start. Neither a file nor a
socket is common to all that use one Docker, but volumes are, and Docker makes a volume exactly once: who asks for one
that is there gets it with the labels of who made it.

- An owner has a volume ``PREFIX-owner-RANK``. It makes it, and then looks at all there are: only if none of another
  live one is there, it is established. Of two that come at once, each sees the other unless it was established
  before; the lower rank gives way.
- One that was killed can't remove its volume. Whoever finds it knocks: makes a volume ``PREFIX-knock-ID`` addressed to
  it, which a live owner removes at once (it watches Docker's events, and looks every second while there are none). If
  it is still there after `PATIENCE`, the owner is dead. One with our own state folder is dead for sure, since we hold
  that folder's lock.
- An owner that stood still for so long that another one took over finds that when it goes on, since its own volume is
  gone. It must not act any more, so that two never do.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Final

import aiodocker
import aiohttp
import msgspec
import structlog

from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.docker import api

PATIENCE: Final = 3.0
"""Seconds that an owner has for answering a knock."""
_LOOK_SECONDS: Final = 1.0
_RARE_LOOK_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.05
_STREAM: Final = aiohttp.ClientTimeout(total=None)
_AWAY: Final = (aiodocker.DockerError, aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError)

_LOCK: Final = "io.modelswap.lock"
_TOKEN: Final = "io.modelswap.token"  # noqa: S105 - names a label
_OWNER: Final = "io.modelswap.owner"
_HOST: Final = "io.modelswap.host"
_PID: Final = "io.modelswap.pid"
_SINCE: Final = "io.modelswap.since"
_TO: Final = "io.modelswap.to"
_RANK: Final = "io.modelswap.rank"

_log = structlog.get_logger(__name__)


class OtherOwner(ModelswapError):
    """Another orchestrator looks after this Docker's containers; the message says which, and what to do."""

    code = Code.MODEL_START_FAILED


@contextlib.asynccontextmanager
async def sole_owner(
    docker: aiodocker.Docker,
    state_id: str,
    prefix: str = "modelswap",
    on_lost: Callable[[OtherOwner], None] = lambda _: None,
) -> AsyncIterator[Ownership]:
    """Be the only orchestrator of this Docker for as long as the context lasts.

    ``state_id`` is the id of our state folder, whose lock we hold. ``on_lost`` is told, once, if another one has taken
    over meanwhile. Raises `OtherOwner` if another one lives, after a moment; if it died without saying so, `PATIENCE`
    seconds pass before that is sure. Lets through what calls raise.
    """
    ownership = Ownership(docker, state_id, prefix, on_lost)
    try:
        await ownership.acquire()
        yield ownership
    finally:
        await ownership.release()


class _Volume(msgspec.Struct, frozen=True):
    """An owner's volume (``rank`` is in its name), or a knock (its sender's rank, 0 if it has none)."""

    name: str
    rank: int
    token: str
    state_id: str = ""
    host: str = ""
    pid: str = ""
    since: str = ""
    to: str = ""


class Ownership:
    """Our part in who rules this Docker; made by `sole_owner`."""

    def __init__(
        self, docker: aiodocker.Docker, state_id: str, prefix: str, on_lost: Callable[[OtherOwner], None]
    ) -> None:
        self.lost: str | None = None
        """Why we may not act any more."""
        self._on_lost = on_lost
        self._docker = docker
        self._state_id = state_id
        self._prefix = prefix
        self._token = uuid.uuid4().hex
        self._rank = 0
        self._established = False
        self._tasks: list[asyncio.Task[None]] = []
        self._stirred = asyncio.Event()
        self._hears = False

    def ensure(self) -> None:
        """Raise `OtherOwner` if another one has taken over."""
        if self.lost is not None:
            raise OtherOwner(self.lost)

    async def acquire(self) -> None:
        """Return when we are established; raises `OtherOwner`."""
        dead: set[str] = set()
        while True:
            owners = await self._owners()
            highest = max(owners, key=lambda each: each.rank, default=None)
            if highest is not None and highest.token not in dead:
                # Raises if it lives.
                if await self._has_died(highest):
                    dead.add(highest.token)
                continue
            if await self._make(highest.rank + 1 if highest else 1) and await self._settle(dead):
                return

    async def release(self) -> None:
        """Be owner no more; others may come at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._established = False
        if rank := self._rank:
            self._rank = 0
            # If Docker is away, the next owner knocks in vain and takes over.
            with contextlib.suppress(*_AWAY):
                if any(each.token == self._token and each.rank == rank for each in await self._owners()):
                    await self._remove(self._name(rank))

    async def _make(self, rank: int) -> bool:
        """Make our volume; return whether it is ours, not another's who was faster."""
        labels = {
            _LOCK: self._prefix,
            _TOKEN: self._token,
            _OWNER: self._state_id,
            _HOST: socket.gethostname(),
            _PID: str(os.getpid()),
            _SINCE: dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        }
        # Set before, so that it is removed if we are cancelled half-way.
        self._rank = rank
        made = await api.call(
            self._docker, "POST", "volumes/create", body={"Name": self._name(rank), "Driver": "local", "Labels": labels}
        )
        if (made.get("Labels") or {}).get(_TOKEN) == self._token:
            if not self._tasks:
                self._tasks = [
                    asyncio.create_task(self._answer(), name="docker-owner"),
                    asyncio.create_task(self._listen(), name="docker-owner-events"),
                ]
            return True
        self._rank = 0
        return False

    async def _settle(self, dead: set[str]) -> bool:
        """Return whether we are established; gives our volume back if not, and also when another lives (raises)."""
        while others := [each for each in await self._owners() if each.token not in {self._token, *dead}]:
            highest = max(others, key=lambda each: each.rank)
            if highest.rank > self._rank:
                await self.release()
                return False
            if await self._has_died(highest):
                dead.add(highest.token)
        self._established = True
        self._stirred.set()
        for each in await self._owners():
            if each.token in dead:
                await self._remove(each.name)
        return True

    async def _has_died(self, other: _Volume) -> bool:
        """Return whether ``other`` doesn't answer, False if it has left meanwhile; raises `OtherOwner` if it lives."""
        if other.state_id == self._state_id:
            return True
        name = f"{self._prefix}-knock-{uuid.uuid4().hex}"
        labels = {_LOCK: self._prefix, _TOKEN: self._token, _TO: other.token, _RANK: str(self._rank)}
        try:
            await api.call(
                self._docker, "POST", "volumes/create", body={"Name": name, "Driver": "local", "Labels": labels}
            )
            # Looks are counted, not seconds: while Docker itself hangs, nobody can answer.
            for _ in range(round(PATIENCE / _POLL_SECONDS)):
                if not {name, other.name} <= {each.name for each in await self._volumes()}:
                    break
                await asyncio.sleep(_POLL_SECONDS)
            else:
                _log.warning(
                    "another modelswap on this Docker has ended without saying so; taking over",
                    host=other.host,
                    pid=other.pid,
                    since=other.since,
                )
                return True
        finally:
            await self._remove(name)
        if any(each.token == other.token for each in await self._owners()):
            raise OtherOwner(
                f"another modelswap manages this Docker's containers: pid {other.pid} on {other.host}, since"
                f" {other.since}; stop that one first (two would stop each other's models)"
            )
        return False

    async def _answer(self) -> None:
        """Answer knocks for as long as we have a volume."""
        while True:
            try:
                await self._look()
            except _AWAY as error:
                # Docker is being restarted, say; our volume stays.
                _log.debug("can't look for other modelswaps on this Docker", reason=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RARE_LOOK_SECONDS if self._hears else _LOOK_SECONDS):
                    await self._stirred.wait()
            self._stirred.clear()

    async def _look(self) -> None:
        volumes = await self._volumes()
        present = {each.token for each in volumes if not each.to}
        for knock in (each for each in volumes if each.to):
            # Before we are established a higher one may be it; it sees us give way, or is answered later. Knocks that
            # nobody else will answer are of challengers that died.
            ours = knock.to == self._token and (self._established or knock.rank < self._rank)
            if ours or (self._established and knock.to not in present):
                await self._remove(knock.name)
        if self._established and self._token not in present:
            await self._restore()

    async def _restore(self) -> None:
        """Make our volume again (`docker volume prune` removed it), unless somebody has taken our place."""
        rank = self._rank
        while not (others := [each for each in await self._owners() if each.token != self._token]):
            if await self._make(rank):
                return
        who = "; ".join(f"pid {each.pid} on {each.host}, since {each.since}" for each in others)
        self.lost = (
            "another modelswap has taken over this Docker's containers while this one stood still:"
            f" {who}. This one ends, and its engines run on; stop one of the two for good"
        )
        self._established = False
        self._rank = 0
        self._on_lost(OtherOwner(self.lost))

    async def _listen(self) -> None:
        """Wake `_answer` at every volume that is made or removed."""
        wanted = api.filters(type=["volume"], event=["create", "destroy"])
        while True:
            try:
                async with api.request(
                    self._docker, "GET", "events", params={"filters": wanted}, timeout=_STREAM
                ) as response:
                    self._hears = True
                    self._stirred.set()
                    async for event in api.lines(response):
                        if str(event.get("Actor", {}).get("ID", "")).startswith(f"{self._prefix}-"):
                            self._stirred.set()
            except _AWAY as error:
                _log.debug("Docker's events have ended", reason=str(error))
            self._hears = False
            self._stirred.set()
            await asyncio.sleep(_LOOK_SECONDS)

    async def _owners(self) -> list[_Volume]:
        return [each for each in await self._volumes() if not each.to]

    async def _volumes(self) -> list[_Volume]:
        answer = await api.call(
            self._docker, "GET", "volumes", params={"filters": api.filters(label=[f"{_LOCK}={self._prefix}"])}
        )
        return list(_read(answer.get("Volumes") or ()))

    async def _remove(self, name: str) -> None:
        try:
            await api.call(self._docker, "DELETE", f"volumes/{name}")
        except aiodocker.DockerError as error:
            if error.status != 404:
                raise

    def _name(self, rank: int) -> str:
        return f"{self._prefix}-owner-{rank}"


def _read(volumes: Iterable[dict[str, Any]]) -> Iterable[_Volume]:
    for volume in volumes:
        name, labels = str(volume["Name"]), volume.get("Labels") or {}
        number = labels.get(_RANK, name.rpartition("-")[2])
        yield _Volume(
            name=name,
            rank=int(number) if number.isdigit() else 0,
            token=labels.get(_TOKEN, ""),
            state_id=labels.get(_OWNER, ""),
            host=labels.get(_HOST, ""),
            pid=labels.get(_PID, ""),
            since=labels.get(_SINCE, ""),
            to=labels.get(_TO, ""),
        )
