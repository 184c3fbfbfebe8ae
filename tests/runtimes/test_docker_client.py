"""Connecting to Docker: addresses that are none, and things that answer and are no Docker."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from modelswap.protocol.errors import Code
from modelswap.runtimes.docker import client
from modelswap.runtimes.docker.client import DockerAway
from modelswap.runtimes.docker.events import Event, watch
from modelswap.testing.waiting import until
from tests.runtimes.docker_fake import FakeDocker, Handler, fake_docker


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeDocker]:
    async with fake_docker(tmp_path / "docker.sock") as fake:
        yield fake


def answer(fake: FakeDocker, status: int, body: str) -> None:
    """Have ``GET /version`` answered with this."""

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path == "/version":
            return web.Response(status=status, text=body)
        return await handler(request)

    fake.fault = fault


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("ssh://user@host", "ssh -NL"),
        ("tcp://host", "tcp://HOST:PORT"),
        ("tcp://host:99999", "tcp://HOST:PORT"),
        ("npipe:////./pipe/docker_engine", "tcp://HOST:PORT"),
        ("fd://", "tcp://HOST:PORT"),
        ("/var/run/docker.sock", "unix:///var/run/docker.sock"),
        ("unix://docker.sock", "unix:///var/run/docker.sock"),
    ],
)
def test_an_address_that_cant_be_used_is_told_with_one_that_can(where: str, words: str) -> None:
    """Whatever $DOCKER_HOST holds: no other exception, and it is not tried again."""
    with pytest.raises(DockerAway) as raised:
        client.open_docker(None, {"DOCKER_HOST": where})
    assert where in str(raised.value) and words in str(raised.value)
    assert raised.value.code is Code.MODEL_BROKEN


@pytest.mark.parametrize("where", ["tcp://127.0.0.1:2375", "http://127.0.0.1:2375", "unix:///run/docker.sock"])
async def test_addresses_of_docker_are_taken(where: str) -> None:
    """The same as aiodocker takes."""
    async with client.open_docker(None, {"DOCKER_HOST": where}):
        pass


async def test_certificates_that_are_missing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variables that name them."""
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.delenv("DOCKER_CERT_PATH", raising=False)
    with pytest.raises(DockerAway, match="DOCKER_CERT_PATH"):
        client.open_docker("tcp://127.0.0.1:2376")


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, "<html>hello</html>", "no Docker Engine"),
        (200, "[]", "no Docker Engine"),
        (200, '{"hello": 1}', "no Docker Engine"),
        (200, '{"ApiVersion": "latest"}', "no Docker Engine"),
        (404, "nothing here", "nothing here"),
        (403, "the proxy forbids it", "the proxy forbids it"),
        (400, "Client sent an HTTP request to an HTTPS server.", "DOCKER_TLS_VERIFY"),
    ],
)
async def test_something_that_is_no_docker_is_told(fake: FakeDocker, status: int, body: str, words: str) -> None:
    """At once, and as an error of ours."""
    answer(fake, status, body)
    async with client.open_docker(fake.host) as docker:
        with pytest.raises(DockerAway, match=words):
            await client.connect(docker, 60)


async def test_a_proxy_whose_docker_is_away_is_waited_for(fake: FakeDocker) -> None:
    """It says 503 until Docker is there."""
    answers = iter([503, 502])

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        if (status := next(answers, None)) is not None:
            return web.Response(status=status, text="no server is available")
        return await handler(request)

    fake.fault = fault
    async with client.open_docker(fake.host) as docker:
        await client.connect(docker, 10)


async def test_events_outlive_a_time_in_which_something_else_answers(fake: FakeDocker) -> None:
    """While it is restarted behind a proxy, say: they are read again when Docker is back."""
    caught_up: list[int] = []
    asked: list[str] = []

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        asked.append(request.path)
        return web.Response(status=404, text="nothing here")

    async def catch_up() -> None:
        caught_up.append(fake.streams)

    def take(event: Event) -> None:
        raise AssertionError(event)

    async with client.open_docker(fake.host) as docker:
        watching = asyncio.create_task(watch(docker, 0.0, take, catch_up))
        try:
            await until(lambda: len(caught_up) == 1)
            fake.fault = fault
            fake.cut()
            await until(lambda: len(asked) > 1)
            fake.fault = None
            await until(lambda: len(caught_up) == 2 or watching.done())
            assert not watching.done()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


def test_a_faulty_tls_is_no_missing_permission() -> None:
    """Its error has the number of EPERM."""
    key = aiohttp.client_reqrep.ConnectionKey("h", 1, True, True, None, None, None)
    cause = ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number")
    error = aiohttp.ClientConnectorSSLError(key, cause)
    assert not client.forbidden(error) and client.is_away(error)
    assert "can't be reached" in str(client.failure(error, "connecting to it"))
