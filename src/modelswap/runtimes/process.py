"""The runtime that hosts engines as processes of this machine.

Every engine leads a session of its own and carries its ids in its environment; nothing else ties it to us. What
belongs to an instance is therefore found by anyone at any time: its session, and every session whose members carry
its id. (A descendant that both made a session of its own and cleared its environment is not.)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from modelswap.engines.base import Address, Place, StandbyPlan
from modelswap.runtimes import memory, processes, spawn
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
from modelswap.runtimes.logfiles import LogFiles
from modelswap.runtimes.ports import HOST, Ports
from modelswap.runtimes.processes import Handle, Ids, ProcessTable
from modelswap.runtimes.records import Records
from modelswap.runtimes.standbys import PREFIX, READY_WITHIN, Standbys
from modelswap.spec.config import Model

_KILL_SECONDS: Final = 5.0
_REMEMBERED_EXITS: Final = 256

_log = structlog.get_logger(__name__)


class ProcessRuntime:
    """`Runtime` over processes.

    ``state_dir`` holds logs and what must outlive us; only instances that carry it are ours. ``log_size`` in bytes
    is where a log is rotated. ``ports`` are those to hand out (by default 10,000 outside the ephemeral range),
    ``table`` is the system's process table, ``kill_timeout`` how many seconds a process may survive SIGKILL, and
    ``standby_within`` how many one may take to be ready to wait.
    """

    def __init__(
        self,
        state_dir: Path,
        log_size: int,
        *,
        ports: Iterable[int] | None = None,
        table: ProcessTable | None = None,
        kill_timeout: float = _KILL_SECONDS,
        standby_within: float = READY_WITHIN,
    ) -> None:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        state_dir = state_dir.resolve()
        self._state = str(state_dir)
        self._table = processes.system_table(state_dir) if table is None else table
        self._logs = LogFiles(state_dir / "logs", log_size)
        self._records = Records(state_dir / "run")
        self._ports = Ports(state_dir / "last-port", ports)
        self._kill_timeout = kill_timeout
        self._children: dict[str, int] = {}
        self._killed: set[str] = set()
        self._exits: dict[str, Exit] = {}
        self._leftovers: dict[str, list[tuple[int, float]]] = {}
        self._carried: dict[str, str] = {one.carried: one.instance for one in self._records.all() if one.carried}
        """Instances whose processes carry a standby's id, by that."""
        self._standbys = Standbys(
            state_dir / "run" / "standby", self._state, self._table, self._logs, ready_within=standby_within
        )

    async def configure(self, models: Mapping[str, Known]) -> None:
        """See `Runtime`; processes need no knowledge of other models."""

    async def fetch(self, name: str, spec: Model, report: Report) -> None:
        """See `Runtime`; what processes are started from is on this machine."""

    async def allocate(self, spec: Model) -> Place:
        """See `Runtime`. Raises `StartFailed` when no port is free."""
        return Place(Address(HOST, self._ports.take()))

    async def create(self, order: StartOrder) -> None:
        """See `Runtime`; a process is its start."""

    async def start(self, order: StartOrder) -> Running:
        """See `Runtime`."""
        if order.standby is not None and (running := await self._start_standby(order, order.standby)) is not None:
            return running
        ids = Ids.of_order(order, self._state)
        try:
            log = self._logs.open(order.model, order.instance)
        except OSError as error:
            path = self._logs.path(order.model, order.instance)
            raise StartFailed(spawn.explain_log(path, error)) from error
        try:
            pid = spawn.spawn(order.launch, spawn.environment(order.launch, ids.variables()), log)
        finally:
            os.close(log)
        self._children[order.instance] = pid
        try:
            # While a program is being loaded, the kernel has everyone wait who looks at its process (measured: 1 to
            # 5 ms), so not the event loop. It is there even if it has ended already: only we collect it.
            born = await asyncio.to_thread(self._table.born, pid)
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended by itself
                os.killpg(pid, signal.SIGKILL)  # nobody would know of it
            raise
        running = ids.running(pid, born or 0.0)
        self._records.write(running)
        with contextlib.suppress(OSError):  # an old log that stays harms nobody, a start that raised now would
            self._logs.prune(order.model, self._children)
        return running

    async def _start_standby(self, order: StartOrder, plan: StandbyPlan) -> Running | None:
        """Start it in a process that waits for that; None if there is none, or none that will."""
        standby = await self._standbys.take(plan.key)
        if standby is None:
            return None
        env = spawn.environment(order.launch, Ids.of_order(order, self._state).variables())
        running = Running(
            instance=order.instance,
            model=order.model,
            definition=order.definition,
            address=order.address,
            pid=standby.pid,
            born=standby.born,
            mechanism="standby",
            carried=standby.id,
        )
        self._carried[standby.id] = order.instance
        self._children[order.instance] = standby.pid
        try:
            os.close(self._logs.open(order.model, order.instance))
            log = self._logs.path(order.model, order.instance)
            await self._standbys.hand_over(standby, order.launch, env, log)
        except (OSError, StartFailed) as error:
            _log.warning("cold start instead", model=order.model, reason=str(error))
            await self._kill_all(order.instance, standby.pid)
            self._children.pop(order.instance, None)
            self._exits.pop(order.instance, None)
            return None
        # Whoever comes after us takes it for the engine from now on; before, it may have waited for its order still.
        self._records.write(running)
        with contextlib.suppress(OSError):
            self._logs.prune(order.model, self._children)
        return running

    async def stand_by(self, plans: Sequence[StandbyPlan]) -> None:
        """See `Runtime`."""
        await self._standbys.keep(plans)

    def standbys(self) -> list[StandbyState]:
        """See `Runtime`."""
        return self._standbys.states()

    async def wait(self, running: Running) -> Exit:
        """See `Runtime`."""
        if (known := self._exits.get(running.instance)) is not None:
            return known
        handle = self._table.open(running.pid, running.born)
        if handle is not None:
            with contextlib.closing(handle):
                await handle.wait()
        return self._collect(running.instance)

    async def stop(self, running: Running, grace: float) -> Exit:
        """See `Runtime`."""
        handle = None if running.instance in self._exits else self._table.open(running.pid, running.born)
        if handle is None:
            # Its session's number may be a stranger's by now: only what carries the id is its own.
            await self._clear(running, session=None)
            return self._collect(running.instance, cleared=True)
        with contextlib.closing(handle):
            if grace > 0 and not handle.ended():
                self._ask(running.pid)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace):
                        await handle.wait()
            await self._clear(running, session=running.pid)
        return self._collect(running.instance, cleared=True)

    async def listening(self, running: Running) -> bool:
        """See `Runtime`."""
        handle = self._table.open(running.pid, running.born)
        if handle is None:
            return False
        with contextlib.closing(handle):
            return not handle.ended() and self._table.listens(
                running.address, running.pid, lambda: self._members(running.instance, running.pid)
            )

    async def host_bytes(self, running: Running) -> int:
        """See `Runtime`."""
        if not self._lives(running.pid, running.born):
            return 0
        return await asyncio.to_thread(lambda: memory.proportional(self._members(running.instance, running.pid)))

    async def told(self, running: Running) -> Told | None:
        """See `Runtime`; we say it."""
        return None

    async def instances(self) -> list[Running]:
        """See `Runtime`. An instance whose main process has died is none, whatever it left behind (`sweep`)."""
        for instance, pid in list(self._children.items()):
            if not self._lives(pid):  # and nobody waited for it
                self._collect(instance)
        found = self._found()
        self._records.keep_only(found.keys() | self._children.keys())
        return [one.main for one in found.values() if one.main is not None]

    async def sweep(self, keep: set[str]) -> list[str]:
        """Kill everything that carries our ids but is not of an instance in ``keep``; returns what that was.

        Raises `Unkillable` after having killed what could be.
        """
        strays = {instance: one for instance, one in self._found().items() if instance not in keep}
        swept = [
            f"{self._table.describe(pid)} of instance {instance}"
            for instance, one in strays.items()
            for pid in sorted(one.pids)
        ]
        stuck: list[str] = []
        for instance, one in strays.items():
            self._killed.add(instance)
            left = await self._kill_all(instance, session=one.main.pid if one.main is not None else None)
            stuck += left
            if not left:
                self._collect(instance, cleared=True)
        if stuck:
            raise Unkillable(_survived(stuck))
        return swept

    def foreign(self, running: Running) -> bool:
        """See `Runtime`; an engine that others start carries none of our ids."""
        return False

    async def appeared(self) -> Running:
        """See `Runtime`; never returns."""
        never: asyncio.Future[Running] = asyncio.get_running_loop().create_future()
        return await never

    def owns(self, pid: int) -> bool:
        """See `Runtime`: each instance has a session of its own."""
        try:
            session = os.getsid(pid)
        except OSError:
            return False
        return session in self._children.values() or any(known.pid == session for known in self._records.all())

    async def log_tail(self, model: str, lines: int, instance: str | None = None) -> list[str]:
        """See `Runtime`. Escapes are stripped, and of a progress bar only the last state is left."""
        return await asyncio.to_thread(self._logs.tail, model, lines, instance)

    async def rotate(self) -> None:
        """Rotate the logs that have grown past ``log_size``; to be called every few seconds."""
        for problem in await asyncio.to_thread(self._logs.rotate):
            _log.warning("log rotation", problem=problem)

    def _ask(self, pid: int) -> None:
        # The caller holds a handle to the group's leader, so the number is still its own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGTERM)
            os.killpg(pid, signal.SIGCONT)  # a stopped process could not end

    def _members(self, instance: str, session: int | None) -> list[int]:
        """Return the PIDs of all that belongs to an instance; ``session`` is its own one, if that is sure."""
        found: list[int] = []
        for number, pids in processes.sessions(self._table).items():
            if number == session:
                found += pids
            elif (ids := processes.carried(self._table, number, pids)) is not None:
                found += pids if (self._named(ids), ids.state) == (instance, self._state) else []
        return found

    def _survivors(self, instance: str, session: int | None) -> list[Handle]:
        """Return handles of what still lives of an instance; the caller closes them."""
        wanted: list[tuple[int, float | None]] = [(pid, None) for pid in self._members(instance, session)]
        wanted += self._leftovers.get(instance, [])
        living = {}
        for pid, born in wanted:
            handle = None if pid in living else self._table.open(pid, born)
            if handle is None:
                continue
            if handle.ended():
                handle.close()
            else:
                living[pid] = handle
        return list(living.values())

    async def _clear(self, running: Running, session: int | None) -> None:
        """Kill what is left of an instance; raises `Unkillable`."""
        if stuck := await self._kill_all(running.instance, session):
            raise Unkillable(_survived(stuck))

    async def _kill_all(self, instance: str, session: int | None) -> list[str]:
        """Kill until nothing of an instance is left; returns what survived the time limit."""
        deadline = asyncio.get_running_loop().time() + self._kill_timeout
        while handles := self._survivors(instance, session):
            with contextlib.ExitStack() as stack:
                for handle in handles:
                    stack.callback(handle.close)
                for handle in handles:
                    if handle.pid == session:
                        self._killed.add(instance)
                    with contextlib.suppress(PermissionError):  # then it will be among the survivors
                        handle.signal(signal.SIGKILL)
                try:
                    async with asyncio.timeout_at(deadline):
                        for handle in handles:
                            await handle.wait()
                except TimeoutError:
                    if stuck := [self._table.describe(handle.pid) for handle in handles if not handle.ended()]:
                        return stuck
        self._leftovers.pop(instance, None)
        return []

    def _collect(self, instance: str, *, cleared: bool = False) -> Exit:
        """Return how an instance ended; its main process has, and if ``cleared``, all others have too."""
        if cleared:
            self._records.forget(instance)
        if (known := self._exits.get(instance)) is not None:
            return known
        code: int | None = None
        if (pid := self._children.get(instance)) is not None:
            # As long as it is not collected, its session's number can't be another's.
            for one in [] if cleared else self._survivors(instance, session=pid):
                self._leftovers.setdefault(instance, []).append((one.pid, self._table.born(one.pid) or 0.0))
                one.close()
            with contextlib.suppress(ChildProcessError):  # someone ignores SIGCHLD, or collected all children
                collected, status = os.waitpid(pid, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if collected == pid else None
            del self._children[instance]
        found = self._exits[instance] = Exit(code, killed=instance in self._killed)
        self._killed.discard(instance)
        if len(self._exits) > _REMEMBERED_EXITS:
            forgotten = next(iter(self._exits))
            del self._exits[forgotten]
            self._leftovers.pop(forgotten, None)
        return found

    def _found(self) -> dict[str, _Found]:
        """Return by instance what lives and is ours, by the ids it carries or by the record of its start."""
        found: dict[str, _Found] = {}
        leaders: dict[str, list[Running]] = {}
        ours = self._standbys.ids()
        for ids, session, pids in processes.carriers(self._table, self._state):
            living = [pid for pid in pids if self._lives(pid)]
            if ids.instance in ours:
                continue
            name = self._named(ids)
            if living:
                found.setdefault(name, _Found()).pids.update(living)
            # Whoever waits is no instance yet, and a spent standby's record tells of it.
            plain = name == ids.instance and not name.startswith(PREFIX)
            if plain and session in living and (born := self._table.born(session)) is not None:
                leaders.setdefault(ids.instance, []).append(ids.running(session, born))
        recorded = {record.instance: record for record in self._records.all()}
        for instance, record in recorded.items():
            if self._lives(record.pid, record.born):
                one = found.setdefault(instance, _Found())
                one.main = record
                one.pids.add(record.pid)
        for instance, candidates in leaders.items():
            known = recorded.get(instance)
            mains = [one for one in candidates if known is None or one.pid == known.pid]
            if mains:
                found[instance].main = min(mains, key=lambda main: main.born)
        return found

    def _named(self, ids: Ids) -> str:
        return self._carried.get(ids.instance, ids.instance)

    def _lives(self, pid: int, born: float | None = None) -> bool:
        handle = self._table.open(pid, born)
        if handle is None:
            return False
        with contextlib.closing(handle):
            return not handle.ended()


@dataclass(slots=True)
class _Found:
    """What lives of an instance: its main process, unless that has died, and all PIDs that could be told."""

    main: Running | None = None
    pids: set[int] = field(default_factory=set)


def _survived(names: list[str]) -> str:
    return (
        f"{', '.join(names)} survived SIGKILL; the driver or the kernel holds it. See dmesg; it may take resetting the "
        "device or rebooting the machine"
    )
