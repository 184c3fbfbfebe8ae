"""Containers that wait for their model: made while the device is quiet, spent by the next start.

Each is made like the containers of the models that it may serve, with another program: the one file of the plan, which
is put into it, and spoken to by commands that are run in it. So it may be on another machine, or on a network of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import tarfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiodocker
import msgspec
import structlog

from modelswap.engines.base import StandbyPlan
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import NotPrepared, StandbyState, StartFailed
from modelswap.runtimes.docker import api, body, execs, logs, memory
from modelswap.runtimes.docker.chores import Chores
from modelswap.runtimes.docker.client import SLOW, START_SECONDS, DockerAway, Trouble, failure, persistently, says
from modelswap.runtimes.docker.inspected import Inspected, is_running
from modelswap.runtimes.docker.making import Maker
from modelswap.runtimes.docker.records import Starts
from modelswap.runtimes.docker.refusals import denied, port_is_taken, refused

ANSWER_WITHIN: Final = 10.0
_RETRY_AFTER: Final = 300.0
"""A standby that could not be made is tried again after this many seconds…"""
_RETRY_SOON: Final = 10.0
"""…or this many, where something else is missing (its image, Docker)."""
_REMEDY: Final = (
    "something before Docker, a socket proxy perhaps, denies a call that they take (403); say standby: false for models"
    " with an image, or let it through"
)
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 1.0
_LOOK_EVERY: Final = 5.0
_CLOSE_WITHIN: Final = 10.0
_GONE: Final = (404, 409)

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Standby:
    """One container that waits, or will; ``body`` is the digest of what it is made of."""

    plan: StandbyPlan
    name: str
    container: str = ""
    body: str = ""
    ready: bool = False
    host_bytes: int = 0
    task: asyncio.Task[None] | None = None


class _Ended(Exception):
    """It has ended before anybody wanted it to."""


class Standbys:
    """Keeps containers waiting, one per key; ``owner`` is what they are labelled with."""

    def __init__(self, docker: aiodocker.Docker, maker: Maker, starts: Starts, chores: Chores, owner: str) -> None:
        self._docker = docker
        self._maker = maker
        self._starts = starts
        self._chores = chores
        self._owner = owner
        self._waiting: dict[str, Standby] = {}
        self._failed: dict[str, tuple[float, str]] = {}
        self._denied = ""
        self._in_use: set[str] = set()

    def states(self) -> list[StandbyState]:
        """Return what waits and what could not be made."""
        states = [
            StandbyState(key=key, ready=one.ready, host_bytes=one.host_bytes) for key, one in self._waiting.items()
        ]
        return states + [StandbyState(key=key, problem=reason) for key, (_, reason) in self._failed.items()]

    async def keep(self, plans: Iterable[StandbyPlan]) -> None:
        """Have exactly these waiting; see `Runtime.stand_by`."""
        wanted = {plan.key: plan for plan in plans if plan.spec is not None}
        for key in [key for key in self._waiting if key not in wanted]:
            await self._end(self._waiting.pop(key))
        if self._denied:
            keys = self._failed.keys() | wanted.keys() - self._waiting.keys()
            self._failed = dict.fromkeys(sorted(keys), (math.inf, self._denied))
            return
        now = asyncio.get_running_loop().time()
        # One that isn't wanted just now, because somebody waits, is no better for that.
        self._failed = {key: one for key, one in self._failed.items() if key in wanted or now < one[0]}
        for key, plan in wanted.items():
            if key not in self._waiting and now >= self._failed.get(key, (now, ""))[0]:
                self._failed.pop(key, None)
                standby = self._waiting[key] = Standby(plan, f"modelswap-standby-{uuid.uuid4().hex[:12]}")
                standby.task = self._chores.start(self._live(standby), standby.name)

    def reconsider(self) -> None:
        """Try again what could not be made, because the config has changed."""
        self._denied = ""
        self._failed.clear()

    async def take(self, key: str) -> Standby | None:
        """Return one that is ready, which is the caller's until `release` or `discard`; None if there is none."""
        standby = self._waiting.get(key)
        if standby is None or not standby.ready:
            return None
        del self._waiting[key]
        self._in_use.add(standby.name)
        await _cancel(standby)
        return standby

    def release(self, standby: Standby) -> None:
        """Leave one that was taken to what our records say of it."""
        self._in_use.discard(standby.name)

    async def discard(self, standby: Standby) -> None:
        """Remove one that was taken; raises `ModelswapError` if that can't be done."""
        try:
            await self._remove(standby.container)
        finally:
            self._in_use.discard(standby.name)

    async def tell(self, standby: Standby, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to one message; raises as calls do, or `ValueError`."""
        command = (*standby.plan.python, body.STANDBY_SCRIPT, "tell", body.STANDBY_SOCKET)
        line = await execs.ask(
            self._docker, standby.container, command, msgspec.json.encode(message), within=ANSWER_WITHIN
        )
        return msgspec.json.decode(line, type=dict[str, Any])

    async def tidy(self) -> list[str]:
        """Remove containers that wait for nobody, and spent ones of which there is no record any more.

        Returns what that was; raises as calls do, or `ModelswapError`.
        """
        params = {"all": "1", "filters": api.filters(label=[f"{body.OWNER}={self._owner}", body.STANDBY])}
        listed = await persistently(
            lambda: api.call(self._docker, "GET", "containers/json", params=params), "listing containers"
        )
        gone = []
        for each in listed:
            labels, name = each["Labels"], str((each["Names"] or [""])[0]).removeprefix("/")
            if labels.get(body.OWNER) != self._owner or body.STANDBY not in labels:
                continue
            ours = name in self._in_use or any(name == one.name for one in self._waiting.values())
            if not ours and not self._starts.of_container(each["Id"]):
                await self._remove(each["Id"])
                gone.append(f"container {each['Id'][:12]} on standby")
        return gone

    async def close(self) -> None:
        """End all that wait, as far as that can be done within seconds."""
        waiting, self._waiting = list(self._waiting.values()), {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_WITHIN):
                await asyncio.gather(*(self._end(standby) for standby in waiting))

    async def _live(self, standby: Standby) -> None:
        """Make it, see it become ready, and see it end."""
        retry, reason = _RETRY_AFTER, ""
        try:
            await self._make(standby)
            await self._until_ready(standby)
            await self._watch(standby)
        except _Ended:
            reason = await self._last_words(standby)
        except (ModelswapError, *Trouble) as error:
            retry, reason = self._judged(error)
        key = standby.plan.key
        # Its name stays ours until it has gone.
        self._in_use.add(standby.name)
        if self._waiting.get(key) is standby:
            del self._waiting[key]
            self._failed[key] = (asyncio.get_running_loop().time() + retry, reason)
            if not self._denied:
                _log.warning("no standby; starts are cold", key=key, reason=reason)
        await self._removed(standby)

    def _judged(self, error: BaseException) -> tuple[float, str]:
        """Return after how many seconds to try again, and why it could not be made."""
        if (words := denied(error)) is not None:
            if not self._denied:
                _log.warning(f"no standbys, all starts are cold: {_REMEDY}", reason=words)
            self._denied = f"{_REMEDY} ({words})"
            return math.inf, self._denied
        if isinstance(error, ModelswapError):
            return _RETRY_SOON if isinstance(error, NotPrepared | DockerAway) else _RETRY_AFTER, str(error)
        taken = isinstance(error, aiodocker.DockerError) and port_is_taken(error)
        return _RETRY_SOON if taken else _RETRY_AFTER, str(failure(error, "a container on standby"))

    async def _make(self, standby: Standby) -> None:
        plan = standby.plan
        assert plan.spec is not None  # noqa: S101 - for the type checker: others aren't kept here
        wanted = await self._maker.standby_body(plan, plan.spec, published=True)
        standby.body = wanted["Labels"][body.BODY]
        script = await asyncio.to_thread(_packed, plan.script)
        async with asyncio.timeout(START_SECONDS):
            made = await api.call(
                self._docker, "POST", "containers/create", params={"name": standby.name}, body=wanted, timeout=SLOW
            )
            standby.container = made["Id"]
            path = f"containers/{standby.container}/archive"
            headers = {"content-type": "application/x-tar"}
            async with api.request(
                self._docker, "PUT", path, params={"path": "/"}, data=script, headers=headers, timeout=SLOW
            ) as answer:
                await answer.read()
            try:
                await api.call(self._docker, "POST", f"containers/{standby.container}/start", timeout=SLOW)
            except aiodocker.DockerError as error:
                if port_is_taken(error):
                    raise
                raise refused(error, standby.name) from error

    async def _until_ready(self, standby: Standby) -> None:
        pause = _FIRST_PAUSE
        while True:
            await self._look(standby)
            try:
                answer = await self.tell(standby, {"ask": "state"})
            except (*Trouble, ValueError) as error:
                if denied(error) is not None:
                    raise
                answer = {}  # it doesn't listen yet
            if answer.get("ready"):
                break
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE, pause * 2)
        standby.host_bytes = await memory.of_container(self._docker, standby.container)
        standby.ready = True
        _log.info(
            "standby ready", key=standby.plan.key, container=standby.container[:12], version=answer.get("version")
        )

    async def _watch(self, standby: Standby) -> None:
        """Raise `_Ended` when it has."""
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            await self._look(standby)
            standby.host_bytes = await memory.of_container(self._docker, standby.container) or standby.host_bytes

    async def _look(self, standby: Standby) -> Inspected:
        found = await persistently(lambda: api.inspect(self._docker, standby.container), "looking at a standby")
        if found is None or not is_running(found):
            raise _Ended
        return found

    async def _last_words(self, standby: Standby) -> str:
        with contextlib.suppress(ModelswapError, *Trouble):
            if lines := await logs.tail(self._docker, standby.container, 1, 0.0):
                return lines[-1]
        return "it ended without a word"

    async def _end(self, standby: Standby) -> None:
        self._in_use.add(standby.name)
        await _cancel(standby)
        await self._removed(standby)

    async def _removed(self, standby: Standby) -> None:
        """Remove it; what can't be done now is done by `tidy`."""
        try:
            # By its name: it may just have been made.
            await self._remove(standby.name)
        except ModelswapError as error:
            _log.warning("a standby can't be removed now", container=standby.name, reason=str(error))
        finally:
            self._in_use.discard(standby.name)

    async def _remove(self, container: str) -> None:
        try:
            await persistently(
                lambda: api.call(
                    self._docker, "DELETE", f"containers/{container}", params={"force": "1", "v": "1"}, timeout=SLOW
                ),
                "removing a standby",
                limit=START_SECONDS,
            )
        except aiodocker.DockerError as error:
            if error.status not in _GONE or not says(error, "no such container", "already in progress"):
                raise StartFailed(
                    f"container {container[:12]}, on standby, can't be removed: {error.message}"
                ) from error


def _packed(script: Path) -> bytes:
    """Return the file as an archive to be unpacked at the root."""
    archive = io.BytesIO()
    content = script.read_bytes()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo(body.STANDBY_SCRIPT.removeprefix("/"))
        member.size, member.mode = len(content), 0o644
        tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()


async def _cancel(standby: Standby) -> None:
    if standby.task is not None:
        standby.task.cancel()
        await asyncio.gather(standby.task, return_exceptions=True)
