"""Stops one start of a container, and never a later one."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

import aiodocker
import structlog

from modelswap.runtimes.base import Exit, Unkillable
from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.chores import Chores
from modelswap.runtimes.docker.client import Trouble, failure, is_away, persistently
from modelswap.runtimes.docker.inspected import Inspected
from modelswap.runtimes.docker.lives import Life
from modelswap.runtimes.docker.tracking import Tracker

KILL_SECONDS: Final = 15.0
"""How long a container may survive SIGKILL; Docker itself takes 10 s to say that one does."""
_GONE: Final = (404, 409)
"""Docker's answers if there is no such container, or it doesn't run."""

_log = structlog.get_logger(__name__)


class Stopper:
    """Stops starts; a container may survive SIGKILL for ``kill_timeout`` seconds."""

    def __init__(
        self, docker: aiodocker.Docker, tracker: Tracker, chores: Chores, kill_timeout: float = KILL_SECONDS
    ) -> None:
        self._docker = docker
        self._tracker = tracker
        self._chores = chores
        self._kill_timeout = kill_timeout

    async def stop(self, life: Life, grace: float) -> Exit:
        """Ask a start to end, kill it after ``grace`` seconds, return when it has ended.

        Raises `Unkillable`, and `DockerAway` if Docker can't be told.
        """
        # Docker can't be asked to stop a container only if it still is this start: so look first.
        inspected = None if life.exit is not None else await self._look(life)
        if life.exit is None and grace > 0:
            if not life.asked:
                life.asked = True
                await self._signal(life, _stop_signal(inspected))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await life.ended.wait()
        if life.exit is None:
            await self._kill(life)
        assert life.exit is not None  # noqa: S101 - for the type checker: `_kill` returns when it has ended
        return life.exit

    async def _kill(self, life: Life) -> None:
        life.killed = True
        # Docker answers once the container has ended, which its event tells earlier.
        killing = self._chores.start_awaited(self._surely(life), f"kill {life.running.container[:12]}")
        ended = asyncio.ensure_future(life.ended.wait())
        try:
            await asyncio.wait({ended, killing}, timeout=self._kill_timeout, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done() and killing.done() and (failed := killing.exception()) is not None:
                raise failed
            await asyncio.wait({ended}, timeout=self._kill_timeout)
        finally:
            ended.cancel()
        if life.exit is None:
            await self._look(life)
        if life.exit is None:
            raise Unkillable(
                f"container {life.running.container[:12]} of {life.running.model} survived SIGKILL; the driver or the "
                "kernel holds it. See dmesg; it may take resetting the device or rebooting the machine"
            )

    async def _surely(self, life: Life) -> None:
        await self._signal(life, "SIGKILL")

    async def _signal(self, life: Life, signal: str) -> None:
        container = life.running.container

        async def send() -> None:
            if life.exit is None:
                await api.call(self._docker, "POST", f"containers/{container}/kill", params={"signal": signal})

        try:
            await persistently(send, f"stopping {life.running.model}")
        except aiodocker.DockerError as error:
            if error.status not in _GONE:
                # It may not have heard us: then it's killed, or is seen to survive that.
                _log.warning("signal", container=container[:12], signal=signal, error=str(error))
            await self._look(life)

    async def _look(self, life: Life) -> Inspected | None:
        try:
            return await persistently(lambda: self._tracker.settle(life), f"looking at {life.running.model}")
        except Trouble as error:
            if is_away(error):
                raise failure(error, f"to look at {life.running.model}") from error
            raise failure(error, f"to look at the container of {life.running.model}") from error


def _stop_signal(inspected: Inspected | None) -> str:
    signal = None if inspected is None else inspected["Config"].get("StopSignal")
    return signal or "SIGTERM"
