"""One real engine in a process of its own, talked to by the adapter alone."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from modelswap.engines.base import Address
from modelswap.engines.vllm import Vllm
from modelswap.spec.config import Model
from modelswap.testing.waiting import until

START_LIMIT = 600.0


@asynccontextmanager
async def serving(model: Model, log: Path) -> AsyncIterator[tuple[aiohttp.ClientSession, Address]]:
    """Run the engine until the end; yield when it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = Address("127.0.0.1", probe.getsockname()[1])
    launch = Vllm().launch("m", model, address)
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *launch.argv, env=os.environ | launch.env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        async with aiohttp.ClientSession() as http, asyncio.timeout(START_LIMIT):
            while not (await Vllm().readiness(http, "m", model, address)).ready:
                assert process.returncode is None, f"it ended; see {log}"
                await asyncio.sleep(0.2)
            yield http, address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        await until(lambda: not _alive(process.pid))


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
