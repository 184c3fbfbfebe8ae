"""Where we run, as Docker sees it: on its host, or in one of its containers; its networks, mounts and GPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping

import aiodocker
import msgspec

from modelswap.spec import config as spec


class Mount(msgspec.Struct, frozen=True):
    """Something mounted into our own container: ``source`` is a volume's name or a folder of Docker's host."""

    source: str
    target: str


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What of Docker's world matters to us.

    ``container`` is our own container's full id, empty on the host; ``project`` is its compose project. ``network`` is
    where we meet engines, empty if that is through published loopback ports; ``networks`` are all that we are on.
    ``hf_cache`` is the volume or host folder to mount as Hugging Face cache into managed containers, empty if there is
    none that they could share with us. ``gpus``: this Docker can give GPUs; ``cdi``: it names them the CDI way.
    """

    container: str = ""
    network: str = ""
    networks: tuple[str, ...] = ()
    project: str = ""
    mounts: tuple[Mount, ...] = ()
    hf_cache: str = ""
    gpus: bool = False
    cdi: bool = False


async def look_around(
    docker: aiodocker.Docker, config: spec.Docker, env: Mapping[str, str] = os.environ
) -> Surroundings:
    """Find out; lets `aiodocker.DockerError` and `aiohttp.ClientError` through."""
    raise NotImplementedError
