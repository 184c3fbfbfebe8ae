"""The connection to a Docker Engine: where it is, what its failures mean, and how long to put up with them.

Only the Engine API is used, never the ``docker`` command.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeVar

import aiodocker
import aiohttp
import msgspec

from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.base import StartFailed
from modelswap.runtimes.docker.images import DiskFull
from modelswap.spec.containers import docker_host_hint, is_docker_host

CALL_SECONDS: Final = 30.0
"""How long Docker may take to answer a call that has nothing to wait for."""
START_SECONDS: Final = 120.0
"""How long it may take to create or start a container: a cold disk, a GPU driver that wakes up."""
SLOW: Final = aiohttp.ClientTimeout(total=START_SECONDS)
"""For such a call; the client's own timeout is `CALL_SECONDS`."""
PATIENCE: Final = 30.0
"""How long a call is tried again while Docker is away (it is being restarted, say)."""

_USUAL: Final = "unix:///var/run/docker.sock"
_NEWEST: Final = (1, 47)
"""The newest version of the API whose answers are known to be as this program reads them."""
_NO_CONNECTION: Final = 900
"""aiodocker's status for an engine that can't be reached."""
_AWAY: Final = frozenset({_NO_CONNECTION, 502, 503, 504})
_WEB: Final = re.compile(r"^https?://")
"""aiodocker takes these like ``tcp://``."""
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 0.5

_T = TypeVar("_T")

Trouble = (aiodocker.DockerError, aiohttp.ClientError, OSError, TimeoutError)
"""What a call to Docker can raise."""


class DockerAway(ModelswapError):
    """Docker can't be reached, or doesn't answer."""

    code = Code.MODEL_START_FAILED


def address(host: str | None, env: Mapping[str, str] = os.environ) -> str:
    """Return where Docker is: ``host`` if given, else ``$DOCKER_HOST``, else its usual socket."""
    return host or env.get("DOCKER_HOST") or _USUAL


def open_docker(host: str | None, env: Mapping[str, str] = os.environ) -> aiodocker.Docker:
    """Return a client for the engine at `address`; to be called in an event loop, and closed by the caller.

    Nothing is asked yet (`connect`). Raises `DockerAway` if no client can be made for such an address.
    """
    where = address(host, env)
    if not is_docker_host(_WEB.sub("tcp://", where)):
        raise DockerAway(
            f"Docker can't be reached at '{where}'; in docker.host (or $DOCKER_HOST), {docker_host_hint(where)}",
            code=Code.MODEL_BROKEN,
        )
    try:
        return aiodocker.Docker(url=where, timeout=aiohttp.ClientTimeout(total=CALL_SECONDS))
    except (ValueError, OSError) as error:  # the certificates, if DOCKER_TLS_VERIFY asks for some
        raise DockerAway(
            f"Docker can't be reached at '{where}': {error}; see DOCKER_TLS_VERIFY and DOCKER_CERT_PATH",
            code=Code.MODEL_BROKEN,
        ) from error


async def negotiate(docker: aiodocker.Docker) -> None:
    """Agree on a version of the API: the newest that both sides know.

    Raises `DockerAway` if something else answers than a Docker Engine, else as any call does.
    """
    async with docker.session.get(f"{docker.docker_host}/version") as response:
        answer = await response.read()
        if response.status in _AWAY:
            raise aiodocker.DockerError(response.status, answer.decode(errors="replace"))
        if response.status != 200:
            raise _no_docker(f"status {response.status}: {answer[:200].decode(errors='replace').strip()}")
    try:
        said = msgspec.json.decode(answer, type=_Version)
        newest, oldest = _version(said.ApiVersion), _version(said.MinAPIVersion)
    except ValueError as error:
        raise _no_docker(str(error)) from error
    chosen = max(min(newest, _NEWEST), oldest)
    docker.api_version = f"v{chosen[0]}.{chosen[1]}"


class _Version(msgspec.Struct):
    ApiVersion: str
    MinAPIVersion: str | None = None


def _no_docker(said: str) -> DockerAway:
    return DockerAway(
        f"what answers is no Docker Engine that lets us in ({said}); is docker.host (or $DOCKER_HOST) right? One that"
        " speaks TLS needs DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH"
    )


def _version(text: str | None) -> tuple[int, int]:
    major, _, minor = (text or "1.24").partition(".")
    return int(major), int(minor)


async def connect(docker: aiodocker.Docker, patience: float = PATIENCE) -> None:
    """Return when Docker answers; raises `DockerAway` if it doesn't within ``patience`` seconds.

    An engine that we may not talk to, or something that is none, is not waited for.
    """
    await persistently(lambda: negotiate(docker), "connecting to it", patience)


async def persistently(
    call: Callable[[], Awaitable[_T]], doing: str, patience: float = PATIENCE, *, limit: float = CALL_SECONDS
) -> _T:
    """Return what ``call`` returns, trying again for ``patience`` seconds while Docker is away.

    Only for what may be done twice. One call may take ``limit`` seconds. Raises `DockerAway`; an
    `aiodocker.DockerError` with Docker's own objection is let through.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience
    pause = _FIRST_PAUSE
    while True:
        try:
            async with asyncio.timeout(limit):
                return await call()
        except Trouble as error:
            if not is_away(error):
                raise
            left = deadline - loop.time()
            if forbidden(error) or isinstance(error, TimeoutError) or left <= 0:
                raise failure(error, doing) from error
        await asyncio.sleep(min(pause, left))
        pause = min(_LONGEST_PAUSE, pause * 2)


def is_away(error: BaseException) -> bool:
    """Return whether an error says that Docker can't be reached, rather than what Docker thinks."""
    if isinstance(error, aiodocker.DockerError):
        return error.status in _AWAY
    return isinstance(error, (aiohttp.ClientError, OSError, TimeoutError))


def forbidden(error: BaseException) -> bool:
    """Return whether an error says that we may not talk to Docker."""
    seen: BaseException | None = error
    while seen is not None:
        # TLS has numbers of its own, of which one is EPERM's.
        if isinstance(seen, (ssl.SSLError, aiohttp.ClientSSLError)):
            return False
        if isinstance(seen, OSError) and seen.errno in (errno.EACCES, errno.EPERM):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def says(error: BaseException, *words: str) -> bool:
    """Return whether Docker's objection has one of these words in it."""
    text = str(error).lower()
    return any(word in text for word in words)


def failure(error: BaseException, doing: str) -> ModelswapError:
    """Return what an error of a call means, in words for the user: `DockerAway`, `DiskFull` or `StartFailed`."""
    if forbidden(error):
        return DockerAway(
            f"Docker may not be used by this user ({_reason(error)}): add the user to the group docker "
            "(usermod -aG docker NAME, then log in anew); in a container, give it the socket's group (DOCKER_GID)",
            code=Code.MODEL_BROKEN,
        )
    if isinstance(error, TimeoutError):
        return DockerAway(f"Docker did not answer while {doing}; see its log (journalctl -u docker)")
    if is_away(error):
        return DockerAway(
            f"Docker can't be reached while {doing} ({_reason(error)}); is it running (systemctl status docker), and "
            "is docker.host right?"
        )
    if says(error, "no space left on device", "disk quota exceeded"):
        return DiskFull(
            f"Docker's disk is full ({_reason(error)}); free some space: `docker system df` shows what takes it"
        )
    return StartFailed(f"Docker refused {doing}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    if isinstance(error, aiodocker.DockerError):
        return str(error.message).strip()
    return str(error) or type(error).__name__
