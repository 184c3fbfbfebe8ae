"""The orchestrator's admin API, as the commands use it; whatever goes wrong is a `Failure` with a remedy."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import aiohttp

from modelswap.cli.failure import ExitCode, Failure

_QUICK: Final = 10.0
_NOT_READY: Final = frozenset(
    {
        "model_start_failed",
        "model_broken",
        "swap_timeout",
        "memory_not_released",
        "device_stuck",
        "queue_full",
        "queue_timeout",
        "engine_died",
    }
)


class AdminClient:
    """Talks to the orchestrator at ``url``; used as ``async with``. Every method raises `Failure`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._http = aiohttp.ClientSession(trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def get(self, path: str, *, timeout: float = _QUICK) -> Any:
        """Return what ``GET path`` answers."""
        return await self._ask("GET", path, None, timeout)

    async def post(self, path: str, body: dict[str, Any], *, timeout: float | None = _QUICK) -> Any:
        """Return what ``POST path`` answers; ``timeout`` None waits for as long as it takes."""
        return await self._ask("POST", path, body, timeout)

    async def status(self) -> dict[str, Any]:
        """Return ``GET /status``."""
        found = await self.get("/status")
        # The gateway has a /status, too; its models are no list.
        if not isinstance(found, dict) or not isinstance(found.get("models", []), list):
            raise _not_ours(self.url)
        return found

    async def logs(self, model: str, lines: int, *, follow: bool = False) -> AsyncIterator[str]:
        """Yield the model's last log lines; then, if ``follow``, those that come until the orchestrator ends."""
        path = f"/logs/{quote(model, safe='')}?lines={lines}" + "&follow=1" * follow
        limit = aiohttp.ClientTimeout(total=None if follow else _QUICK, sock_connect=_QUICK)
        with self._told(_QUICK):
            async with self._http.get(self.url + path, timeout=limit) as answer:
                if answer.status >= 400:
                    raise _refused(answer.status, await answer.text(), self.url)
                rest = b""
                async for chunk in answer.content.iter_any():
                    *whole, rest = (rest + chunk).split(b"\n")
                    for line in whole:
                        yield line.decode(errors="replace")
                if rest:
                    yield rest.decode(errors="replace")

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout: float | None) -> Any:
        limit = aiohttp.ClientTimeout(total=timeout, sock_connect=_QUICK)
        with self._told(timeout):
            async with self._http.request(method, self.url + path, json=body, timeout=limit) as answer:
                content = await answer.text()
                status = answer.status
        if status >= 400:
            raise _refused(status, content, self.url)
        try:
            return json.loads(content)
        except ValueError as error:
            raise _not_ours(self.url) from error

    @contextlib.contextmanager
    def _told(self, timeout: float | None) -> Iterator[None]:
        """Turn what goes wrong on the way into a `Failure`."""
        try:
            yield
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise Failure(
                f"{self.url!r} is not a URL", "give one like --url http://127.0.0.1:8888", ExitCode.USAGE
            ) from error
        except TimeoutError as error:
            raise Failure(
                f"the orchestrator at {self.url} did not answer within {timeout or _QUICK:g} s",
                "it may be overloaded or hang: see its log",
                ExitCode.UNREACHABLE,
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise unreachable(self.url, error) from error


def unreachable(url: str, error: Exception) -> Failure:
    """Return the failure for an orchestrator that can't be talked to."""
    reason = "nothing listens there" if isinstance(error, aiohttp.ClientConnectorError) else str(error)
    return Failure(
        f"cannot reach the orchestrator at {url} ({reason})",
        "start it with `modelswap up`, or say where it is with --url",
        ExitCode.UNREACHABLE,
    )


def _not_ours(url: str) -> Failure:
    return Failure(
        f"what answers at {url} is not an orchestrator", "give the orchestrator's address with --url", ExitCode.USAGE
    )


def _refused(status: int, content: str, url: str) -> Failure:
    try:
        error = json.loads(content)["error"]
        message, code = str(error["message"]), str(error.get("code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        if status == 404:
            return _not_ours(url)
        return Failure(f"the orchestrator at {url} answered with status {status}", "see its log")
    if code in _NOT_READY:
        return Failure(message, code=ExitCode.NOT_READY)
    if code == "orchestrator_away":
        return Failure(message, "ask again in a moment", ExitCode.UNREACHABLE)
    if code == "model_not_found":
        return Failure(message, code=ExitCode.USAGE)
    return Failure(message)
