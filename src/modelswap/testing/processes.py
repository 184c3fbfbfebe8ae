"""Simulated engines as real processes, for tests that need what only a process can do: die."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from types import TracebackType
from typing import Self

from modelswap.testing.engine import Options, command


class EngineProcess:
    """One ``python -m modelswap.testing.engine`` on a free port, in a session of its own.

    ``async with`` starts it and waits until it listens or has ended; in the end its whole process group is killed.
    ``lines`` is what it has logged so far, ``url`` where it listens (empty if it never did).
    """

    def __init__(self, options: Options, *, env: dict[str, str] | None = None, patience: float = 60.0) -> None:
        self.options = options
        self.lines: list[str] = []
        self.url = ""
        self._env = os.environ | (env or {})
        self._patience = patience
        self._process: subprocess.Popen[bytes]
        self._reader: asyncio.Task[None]
        self._silent = False
        self._news = asyncio.Condition()

    async def __aenter__(self) -> Self:
        self._process = self._spawn()
        self._reader = asyncio.create_task(self._read())
        if not self.options.listen_late:
            await self.logged("listening on ")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.signal_group(signal.SIGKILL)
        await self.wait()
        # Children in sessions of their own may hold the pipe for ever.
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def signal(self, number: int) -> None:
        """Send it a signal; nothing happens if it has ended."""
        self._process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """Send a signal to it and its children, if any are left."""
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            # All gone; macOS says it the second way for a group of zombies.
            return

    async def wait(self) -> int:
        """Return its exit status when it has ended, negative for a signal."""
        async with asyncio.timeout(self._patience):
            return await asyncio.to_thread(self._process.wait)

    async def logged(self, text: str) -> bool:
        """Return True when a line with ``text`` has been logged; False if its output ended without."""
        async with asyncio.timeout(self._patience), self._news:
            await self._news.wait_for(lambda: self._silent or self.mentions(text))
        return self.mentions(text)

    def mentions(self, text: str) -> bool:
        """Return whether a line with ``text`` was logged so far."""
        return any(text in line for line in self.lines)

    def _spawn(self) -> subprocess.Popen[bytes]:
        # Not asyncio's: that one's `wait` waits for children who hold the pipe, too.
        return subprocess.Popen(
            command(self.options, host=self.options.host, port=str(self.options.port)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=self._env,
        )

    async def _read(self) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        try:
            async for line in reader:
                said = line.decode(errors="replace").rstrip("\n")
                if "listening on http" in said:
                    self.url = said.rpartition(" ")[2]
                async with self._news:
                    self.lines.append(said)
                    self._news.notify_all()
            async with self._news:
                self._silent = True
                self._news.notify_all()
        finally:
            transport.close()
