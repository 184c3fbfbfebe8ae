"""The last log lines of one start, from Docker's log of its container."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

import aiodocker
import structlog

from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.client import persistently, says
from modelswap.runtimes.logfiles import clean

_FRAME: Final = struct.Struct(">BxxxL")
_OLDER: Final = 5000
"""How many of a container's last lines are searched for those of a start that wasn't its last."""
_LINE_BYTES: Final = 64 * 1024

_log = structlog.get_logger(__name__)


async def tail(
    docker: aiodocker.Docker, container: str, lines: int, since: float, until: float | None = None
) -> list[str]:
    """Return the last lines that a container logged between two moments, in Unix seconds; none if it has gone.

    ``until`` None: up to now. Escapes are stripped, and of a progress bar only the last state is left. Raises
    `DockerAway`.
    """
    if lines <= 0:
        return []
    # Docker takes the last lines first, and only then those of the time asked for.
    params = {"stdout": "1", "stderr": "1", "since": f"{since:.6f}"}
    params |= {"tail": str(lines)} if until is None else {"tail": str(max(lines, _OLDER)), "until": f"{until:.6f}"}

    async def read() -> list[str]:
        inspected = await api.inspect(docker, container)
        if inspected is None:
            return []
        async with api.request(docker, "GET", f"containers/{container}/logs", params=params) as response:
            chunks = response.content.iter_any()
            tty = bool(inspected["Config"].get("Tty"))
            return await last_lines(_plain(chunks) if tty else _unframed(chunks), lines)

    try:
        return await persistently(read, "reading a container's log")
    except aiodocker.DockerError as error:
        # Some log drivers can't be read; a container may go any time.
        if not says(error, "no such container", "does not support reading"):
            _log.warning("a container's log can't be read", container=container[:12], reason=str(error))
        return []


async def last_lines(pieces: AsyncIterator[tuple[int, bytes]], lines: int) -> list[str]:
    """Return the last lines of what was written to several streams, each line whole, in the order they ended."""
    found: deque[str] = deque(maxlen=lines)
    rests: dict[int, bytes] = {}
    async for stream, data in pieces:
        *whole, rest = (rests.pop(stream, b"") + data).split(b"\n")
        found.extend(_text(line) for line in whole)
        if rest:
            rests[stream] = rest[-_LINE_BYTES:]
    found.extend(_text(rest) for rest in rests.values())
    return list(found)


async def _plain(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[int, bytes]]:
    async for chunk in chunks:
        yield 1, chunk


async def _unframed(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[int, bytes]]:
    """Take Docker's frames apart: which stream, how many bytes, the bytes."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        while len(buffer) >= _FRAME.size:
            stream, length = _FRAME.unpack_from(buffer)
            if len(buffer) < _FRAME.size + length:
                break
            yield stream, bytes(buffer[_FRAME.size : _FRAME.size + length])
            del buffer[: _FRAME.size + length]


def _text(line: bytes) -> str:
    return clean(line.decode(errors="replace"))
