"""Typed requests to the Docker Engine API, for what aiodocker has no typed method for.

Unlike aiodocker's streams, ours close their connection when they are left early (aiodocker 0.27 leaves that to the
garbage collector).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiodocker
import aiohttp
import msgspec


def filters(**wanted: Sequence[str]) -> str:
    """Return the value of a ``filters`` parameter."""
    return msgspec.json.encode(wanted).decode()


@contextlib.asynccontextmanager
async def request(
    docker: aiodocker.Docker,
    method: str,
    path: str,
    *,
    params: Mapping[str, str] | None = None,
    body: Any = None,
    data: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: aiohttp.ClientTimeout | None = None,
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Ask; raises `aiodocker.DockerError` for an answer that is an error, lets `aiohttp.ClientError` through.

    ``body`` is sent as JSON, ``data`` as it is. ``timeout`` is the client's own unless given.
    """
    if docker.api_version == "auto":
        # Asking for it makes aiodocker negotiate.
        await docker.version()
    async with docker.session.request(
        method,
        f"{docker.docker_host}/{docker.api_version}/{path}",
        params=params,
        data=data if body is None else msgspec.json.encode(body),
        headers={"content-type": "application/json", **(headers or {})},
        timeout=timeout or docker.session.timeout,
    ) as response:
        if response.status >= 400:
            raise aiodocker.DockerError(response.status, _message(await response.read()))
        yield response


async def call(
    docker: aiodocker.Docker,
    method: str,
    path: str,
    *,
    params: Mapping[str, str] | None = None,
    body: Any = None,
    timeout: aiohttp.ClientTimeout | None = None,
) -> Any:
    """Ask once and return the answer's JSON, None if it has none; see `request`."""
    async with request(docker, method, path, params=params, body=body, timeout=timeout) as response:
        answer = await response.read()
    return msgspec.json.decode(answer) if answer else None


async def lines(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yield a stream's JSON documents; ends when the stream does, raises `aiohttp.ClientError` if it breaks."""
    buffer = bytearray()
    async for chunk in response.content.iter_any():
        buffer += chunk
        *complete, rest = buffer.split(b"\n")
        buffer = rest
        for line in complete:
            if line.strip():
                yield msgspec.json.decode(line)


async def inspect(docker: aiodocker.Docker, container: str) -> dict[str, Any] | None:
    """Return how Docker describes a container, by its id or name; None if there is none. Raises as `request` does."""
    try:
        found: dict[str, Any] = await call(docker, "GET", f"containers/{container}/json")
    except aiodocker.DockerError as error:
        if error.status == 404:
            return None
        raise
    return found


def _message(answer: bytes) -> str:
    with contextlib.suppress(msgspec.DecodeError):
        document = msgspec.json.decode(answer)
        if isinstance(document, dict) and isinstance(document.get("message"), str):
            return str(document["message"])
    return answer.decode(errors="replace")
