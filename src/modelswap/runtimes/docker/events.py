"""Docker's event stream: read for as long as we live, opened again whenever it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import aiodocker
import aiohttp
import msgspec
import structlog

from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.client import DockerAway, Trouble, is_away, negotiate

WATCHED: Final = ("create", "rename", "start", "die", "oom", "destroy")
_FIRST_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 0.5
_PATIENT: Final = aiohttp.ClientTimeout(total=None, sock_connect=10.0)

_log = structlog.get_logger(__name__)


class Event(msgspec.Struct, frozen=True):
    """Something that happened to a container; ``at`` in Unix seconds by Docker's clock."""

    action: str
    container: str
    at: float
    attributes: dict[str, str]


async def watch(
    docker: aiodocker.Docker, since: float, take: Callable[[Event], None], caught_up: Callable[[], Awaitable[None]]
) -> None:
    """Give every event from ``since`` on to ``take``, until cancelled.

    ``caught_up`` is called whenever the stream has been opened: what happened before may have been missed (Docker
    remembers 256 events, and none across its own restart), and is to be looked up. An event may come twice.
    """
    pause = _FIRST_PAUSE
    away = False
    while True:
        try:
            await negotiate(docker)  # it may have come back as another version
            async with api.request(docker, "GET", "events", params=_params(since), timeout=_PATIENT) as response:
                await caught_up()
                if away:
                    _log.info("Docker is back")
                away, pause = False, _FIRST_PAUSE
                async for said in api.lines(response):
                    if (event := _event(said)) is not None:
                        since = max(since, event.at)
                        take(event)
        except (DockerAway, *Trouble, msgspec.DecodeError) as error:
            if not away:
                away = True
                level = _log.warning if is_away(error) else _log.error
                level("Docker's events can't be read; trying again", reason=str(error) or repr(error))
        await asyncio.sleep(pause)
        pause = min(_LONGEST_PAUSE, pause * 2)


def _params(since: float) -> Mapping[str, str]:
    return {"filters": api.filters(type=["container"], event=WATCHED), "since": f"{since:.6f}"}


def _event(said: Any) -> Event | None:
    actor = said.get("Actor") or {}
    if said.get("Type") != "container" or not actor.get("ID"):
        return None
    at = int(said.get("timeNano") or 0) / 1e9 or float(said.get("time") or 0)
    return Event(str(said.get("Action")), str(actor["ID"]), at, dict(actor.get("Attributes") or {}))
