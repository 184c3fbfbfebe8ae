"""Fixtures over the fakes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from modelswap.orchestrator.main import serve_api
from modelswap.orchestrator.server import listen
from modelswap.orchestrator.service import Service
from tests.orchestrator import fakes


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[fakes.World]:
    """The outside world of executors."""
    async with fakes.world(tmp_path) as made:
        yield made


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[fakes.Bench]:
    """Where orchestrators can be run."""
    made = fakes.Bench(tmp_path)
    yield made
    made.runtime.close()


class Api:
    """A client of a running orchestrator's admin API."""

    def __init__(self, service: Service, url: str, http: aiohttp.ClientSession) -> None:
        self.service = service
        self.url = url
        self.http = http

    async def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Return status and text of a GET."""
        async with self.http.get(self.url + path, headers=headers) as answer:
            return answer.status, await answer.text()

    async def json(self, path: str) -> dict[str, Any]:
        """Return the JSON of a GET that succeeds."""
        async with self.http.get(self.url + path) as answer:
            assert answer.status == 200, await answer.text()
            found: dict[str, Any] = await answer.json()
            return found

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, dict[str, object]]:
        """Return status and JSON of a POST."""
        async with self.http.post(self.url + path, json=body, headers=headers) as answer:
            found: dict[str, object] = await answer.json()
            return answer.status, found


@contextlib.asynccontextmanager
async def serving(bench: fakes.Bench) -> AsyncIterator[Api]:
    """Serve an orchestrator's API on a port of its own."""
    async with bench.running() as service:
        stop = asyncio.Event()
        up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        sock = listen("127.0.0.1", 0)
        task = asyncio.create_task(
            serve_api(service, sock, stop=stop, reload=asyncio.Event(), ready=lambda url: up.set_result(url))
        )
        try:
            async with aiohttp.ClientSession() as http:
                yield Api(service, await up, http)
        finally:
            stop.set()
            await task
            sock.close()


@pytest.fixture
async def api(bench: fakes.Bench) -> AsyncIterator[Api]:
    """The admin API over fakes."""
    async with serving(bench) as made:
        yield made
