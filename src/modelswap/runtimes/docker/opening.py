"""Opens the runtime over a Docker Engine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import aiodocker
import structlog

from modelswap.devices.amdcards import Nodes
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.base import StartFailed
from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.catalogue import Catalogue
from modelswap.runtimes.docker.chores import Chores
from modelswap.runtimes.docker.client import PATIENCE, DockerAway, Trouble, connect, failure, open_docker, persistently
from modelswap.runtimes.docker.events import watch
from modelswap.runtimes.docker.making import Maker
from modelswap.runtimes.docker.owner import sole_owner
from modelswap.runtimes.docker.reach import started_at
from modelswap.runtimes.docker.records import Starts, owner_id
from modelswap.runtimes.docker.runtime import DockerRuntime
from modelswap.runtimes.docker.spending import Spender
from modelswap.runtimes.docker.standbys import Standbys
from modelswap.runtimes.docker.starting import Starter
from modelswap.runtimes.docker.stopping import KILL_SECONDS, Stopper
from modelswap.runtimes.docker.surroundings import look_around
from modelswap.runtimes.docker.tracking import Tracker
from modelswap.runtimes.ports import Ports
from modelswap.spec import config as spec
from modelswap.spec.config import EngineName

_FOLDER: Final = "docker"

_log = structlog.get_logger(__name__)


@contextlib.asynccontextmanager
async def open_runtime(
    state_dir: Path,
    config: spec.Docker,
    *,
    gpu: int,
    amd: Sequence[Nodes] = (),
    port_of: Callable[[EngineName], int],
    ports: Iterable[int] | None = None,
    env: Mapping[str, str] = os.environ,
    patience: float = PATIENCE,
    kill_timeout: float = KILL_SECONDS,
    lock: str = "modelswap",
    on_lost: Callable[[ModelswapError], None] = lambda _: None,
) -> AsyncIterator[DockerRuntime]:
    """Connect to Docker, become its only orchestrator, and host engines there for as long as the context lasts.

    What runs goes on when it's left; what waits for a start is ended. ``state_dir`` holds what must outlive us; the
    caller alone uses it. ``gpu`` is the index of the config's device, ``amd`` are all AMD GPUs if it is one.
    ``port_of`` tells where an engine listens in its container if nobody says otherwise. ``ports`` are the loopback
    ports to publish (by default 10,000 outside the ephemeral range). Docker may be away for ``patience`` seconds, and a
    container survive SIGKILL for ``kill_timeout`` seconds. ``lock`` begins the names of the volumes by which
    orchestrators of one Docker know of each other (tests have their own). ``on_lost`` is told if another orchestrator
    has taken over this Docker while we stood still: from then on the runtime raises `owner.OtherOwner` whenever it is
    to act, and should be left.

    Raises `DockerAway`, `owner.OtherOwner`.
    """
    folder = state_dir / _FOLDER
    async with contextlib.AsyncExitStack() as stack:
        docker = open_docker(config.host, env)
        stack.push_async_callback(docker.close)
        try:
            await connect(docker, 0)
        except DockerAway as away:
            if away.code is Code.MODEL_BROKEN:
                raise
            _log.warning("waiting for Docker", seconds=patience, reason=str(away))
            await connect(docker, patience)
        owner = _owner(folder)
        try:
            around = await persistently(lambda: look_around(docker, config, env), "looking around in it", patience)
            now = await persistently(lambda: _clock(docker), "asking it for the time", patience)
            ownership = await stack.enter_async_context(sole_owner(docker, owner, lock, on_lost))
        except Trouble as error:
            raise failure(error, "to tell where we are") from error
        chores = Chores()
        stack.push_async_callback(chores.close)
        starts = Starts(folder / "starts")
        catalogue = Catalogue(docker, around, owner=owner, project=config.project, port_of=port_of)
        maker = Maker(
            docker, around, Ports(folder / "last-port", ports), gpu=gpu, amd=amd, owner=owner, port_of=port_of
        )
        tracker = Tracker(docker, around, catalogue, starts, chores)
        stopper = Stopper(docker, tracker, chores, kill_timeout)
        standbys = Standbys(docker, maker, starts, chores, owner)
        stack.push_async_callback(standbys.close)
        spender = Spender(docker, around, maker, tracker, starts, standbys, chores)
        starter = Starter(docker, around, catalogue, maker, tracker, starts, stopper, spender)
        runtime = DockerRuntime(
            docker,
            around,
            catalogue=catalogue,
            maker=maker,
            tracker=tracker,
            starter=starter,
            stopper=stopper,
            starts=starts,
            standbys=standbys,
            chores=chores,
            ownership=ownership,
        )
        chores.start(watch(docker, now, tracker.take, tracker.reconcile), "Docker's events")
        _log.info(
            "Docker", api=docker.api_version, container=around.container[:12], network=around.network, owner=owner
        )
        yield runtime


def _owner(folder: Path) -> str:
    try:
        return owner_id(folder)
    except OSError as error:
        raise StartFailed(f"the folder {folder} can't be written: {error.strerror}") from error


async def _clock(docker: aiodocker.Docker) -> float:
    """Return Docker's idea of the time, in Unix seconds."""
    info = await api.call(docker, "GET", "info")
    return started_at({"State": {"StartedAt": info["SystemTime"]}})
