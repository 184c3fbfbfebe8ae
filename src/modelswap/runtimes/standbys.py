"""Engine processes that wait for their model: made while the device is quiet, spent by the next start.

A standby is a child of ours in a session of its own, like an engine, and carries ids of its own: one that outlives us
is a stray to the next orchestrator, which makes its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from modelswap.engines.base import Address, Launch, StandbyPlan
from modelswap.runtimes import memory, processes, spawn
from modelswap.runtimes.base import StandbyState, StartFailed
from modelswap.runtimes.logfiles import LogFiles
from modelswap.runtimes.processes import Handle, Ids, ProcessTable

PREFIX: Final = "standby."
"""What the instance ids of waiting processes begin with."""
LOG_NAME: Final = "standby"
ANSWER_WITHIN: Final = 5.0
_KILLED_WITHIN: Final = 5.0
READY_WITHIN: Final = 900.0
"""A standby that isn't ready after so many seconds hangs; on a busy machine, at its low priority, it takes minutes."""
_TITLE: Final = " " * 2048
"""A word that does nothing but make room: a process's title can't be longer than the command that it began with."""
_RETRY_AFTER: Final = 300.0
"""A standby that could not be made is tried again after this many seconds."""

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Standby:
    """One process that waits, or will."""

    id: str
    plan: StandbyPlan
    pid: int
    born: float
    socket: Path
    env: dict[str, str]
    """What it was started with."""
    ready: bool = False
    taken: bool = False
    watch: asyncio.Task[None] | None = None
    host_bytes: int = 0
    """What only it takes, as of when it became ready; it does nothing from then on."""


class Standbys:
    """Keeps processes waiting, one per key.

    ``folder`` is for their sockets, ``state`` names our state folder in the ids they carry, ``ready_within`` says after
    how many seconds one that isn't ready is given up.
    """

    def __init__(
        self, folder: Path, state: str, table: ProcessTable, logs: LogFiles, *, ready_within: float = READY_WITHIN
    ) -> None:
        self._folder = folder
        self._state = state
        self._table = table
        self._logs = logs
        self._ready_within = ready_within
        self._waiting: dict[str, Standby] = {}
        self._failed: dict[str, tuple[float, str]] = {}

    def ids(self) -> set[str]:
        """Return the ids that our own waiting processes carry."""
        return {standby.id for standby in self._waiting.values()}

    def states(self) -> list[StandbyState]:
        """Return what waits and what could not be made."""
        states = [
            StandbyState(key=key, ready=one.ready, pid=one.pid, host_bytes=one.host_bytes)
            for key, one in self._waiting.items()
        ]
        return states + [StandbyState(key=key, problem=reason) for key, (_, reason) in self._failed.items()]

    async def keep(self, plans: Iterable[StandbyPlan]) -> None:
        """Have exactly these waiting: make one that is missing, end what nobody wants any more.

        One that can't be made is logged with its reason, and tried again minutes later.
        """
        wanted = {plan.key: plan for plan in plans}
        for key in [key for key in self._waiting if key not in wanted]:
            await self._end(self._waiting.pop(key))
        now = asyncio.get_running_loop().time()
        recent = {key for key, (at, _) in self._failed.items() if now - at < _RETRY_AFTER}
        # While somebody waits nothing is wanted; that must not have us forget.
        self._failed = {key: failed for key, failed in self._failed.items() if key in wanted or key in recent}
        for key, plan in wanted.items():
            failed_at = self._failed.get(key, (-_RETRY_AFTER, ""))[0]
            if key not in self._waiting and now - failed_at >= _RETRY_AFTER:
                await self._make(plan)

    async def take(self, key: str) -> Standby | None:
        """Return one that is ready, which is the caller's from now on; None if there is none."""
        standby = self._waiting.get(key)
        if standby is None or not standby.ready or standby.taken:
            return None
        del self._waiting[key]
        standby.taken = True
        if standby.watch is not None:
            standby.watch.cancel()
            await asyncio.gather(standby.watch, return_exceptions=True)
        return standby

    async def hand_over(self, standby: Standby, launch: Launch, env: dict[str, str], log: Path) -> None:
        """Have it become the engine; raises `StartFailed`, and it is gone then."""
        # Only what is different: what has become of the rest by a wrapper or an import stays, as in a cold start.
        order = {
            "argv": list(launch.argv),
            "env": {name: value for name, value in env.items() if standby.env.get(name) != value},
            "unset": [name for name in standby.env if name not in env],
            "add": True,
            "cwd": launch.cwd or str(Path.cwd()),
            "log": str(log),
        }
        try:
            answer = await _say(standby.socket, order)
        except (OSError, TimeoutError, ValueError) as error:
            await self._end(standby)
            raise StartFailed(f"the standby did not take its order: {error!r}") from error
        if not answer.get("taken"):
            await self._end(standby)
            raise StartFailed(f"the standby refused its order: {answer.get('error', 'without a reason')}")

    async def close(self) -> None:
        """End all that wait."""
        waiting, self._waiting = list(self._waiting.values()), {}
        for standby in waiting:
            await self._end(standby)

    async def _make(self, plan: StandbyPlan) -> None:
        id_ = f"{PREFIX}{uuid.uuid4().hex[:12]}"
        ids = Ids(id_, "", plan.key, Address("127.0.0.1", 0), self._state)
        socket = self._folder / f"{id_}.sock"
        launch = Launch((*plan.python, str(plan.script), "wait", str(socket), *plan.hints, _TITLE), plan.env, plan.cwd)
        env = spawn.environment(launch, ids.variables())
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            log = self._logs.open(LOG_NAME, id_)
        except OSError as error:
            self._give_up(plan, str(error))
            return
        try:
            pid = spawn.spawn(launch, env, log)
        except StartFailed as error:
            self._give_up(plan, str(error))
            return
        finally:
            os.close(log)
        born = await asyncio.to_thread(self._table.born, pid)
        standby = self._waiting[plan.key] = Standby(id_, plan, pid, born or 0.0, socket, env)
        standby.watch = asyncio.create_task(self._watch(standby), name=id_)
        with contextlib.suppress(OSError):
            self._logs.prune(LOG_NAME, [id_])

    async def _watch(self, standby: Standby) -> None:
        """See it become ready, and see it end."""
        handle = self._table.open(standby.pid, standby.born or None)
        hangs = False
        if handle is not None:
            with contextlib.closing(handle):
                try:
                    async with asyncio.timeout(self._ready_within):
                        await self._until_ready(standby, handle)
                except TimeoutError:
                    hangs = True
                    await self._kill(standby, handle)
                await handle.wait()
        _reap(standby.pid)
        lines = await asyncio.to_thread(self._logs.tail, LOG_NAME, 1, standby.id)
        # Together, so that nobody finds neither and makes another one at once.
        if self._waiting.get(standby.plan.key) is standby:
            del self._waiting[standby.plan.key]
        said = (lines or ["it ended without a word"])[-1]
        self._give_up(standby.plan, f"it was not ready within {self._ready_within:g} s: {said}" if hangs else said)

    async def _until_ready(self, standby: Standby, handle: Handle) -> None:
        while not handle.ended():
            with contextlib.suppress(OSError, TimeoutError, ValueError):
                answer = await _say(standby.socket, {"ask": "state"})
                if answer.get("ready"):
                    # It reads the kernel's account of every page: 10 ms and more.
                    standby.host_bytes = await asyncio.to_thread(self._private_bytes, standby.pid)
                    standby.ready = True
                    _log.info("standby ready", key=standby.plan.key, pid=standby.pid, version=answer.get("version"))
                    return
            await asyncio.sleep(0.1)

    def _private_bytes(self, session: int) -> int:
        """Return what only the processes of a session use: several, if something wraps the engine's program."""
        return memory.private(processes.sessions(self._table).get(session, []))

    def _give_up(self, plan: StandbyPlan, reason: str) -> None:
        self._failed[plan.key] = (asyncio.get_running_loop().time(), reason)
        _log.warning("no standby; starts are cold", key=plan.key, reason=reason)

    async def _end(self, standby: Standby) -> None:
        if standby.watch is not None:
            standby.watch.cancel()
            await asyncio.gather(standby.watch, return_exceptions=True)
        handle = self._table.open(standby.pid, standby.born or None)
        if handle is not None:
            with contextlib.closing(handle):
                await self._kill(standby, handle)
        _reap(standby.pid)
        with contextlib.suppress(OSError):
            standby.socket.unlink(missing_ok=True)

    async def _kill(self, standby: Standby, handle: Handle) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(standby.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KILLED_WITHIN):
                await handle.wait()


async def _say(socket: Path, message: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to one message; raises `OSError`, `TimeoutError` or `ValueError`."""
    folder = os.open(socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        async with asyncio.timeout(ANSWER_WITHIN):
            # A socket's path may be 107 bytes long only.
            reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{folder}/{socket.name}")
            try:
                writer.write(msgspec.json.encode(message) + b"\n")
                answer = msgspec.json.decode(await reader.readline(), type=dict[str, Any])
            finally:
                writer.close()
    finally:
        os.close(folder)
    return answer


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
