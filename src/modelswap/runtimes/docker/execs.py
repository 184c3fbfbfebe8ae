"""Runs a command in a container that is given one line and answers with one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import aiodocker

_STDOUT: Final = 1


async def ask(docker: aiodocker.Docker, container: str, command: Sequence[str], line: bytes, within: float) -> bytes:
    """Return the last line that ``command`` wrote to its standard output, empty if it wrote none.

    ``line`` is what it reads from its standard input. Raises `TimeoutError` after ``within`` seconds,
    `aiodocker.DockerError` if the container doesn't run, and lets `aiohttp.ClientError` and `OSError` through.
    """
    said = bytearray()
    try:
        async with asyncio.timeout(within):
            made = await docker.containers.container(container).exec(list(command), stdin=True, stderr=False)
            async with made.start(detach=False) as stream:
                await stream.write_in(line + b"\n")
                while (message := await stream.read_out()) is not None:
                    if message.stream == _STDOUT:
                        said += message.data
    except AssertionError as error:
        # aiodocker asserts, at every step, that the other side hasn't closed the connection.
        raise ConnectionResetError("Docker closed the connection to the command") from error
    lines = said.strip().splitlines()
    return bytes(lines[-1]) if lines else b""
