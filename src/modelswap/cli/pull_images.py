"""The Docker side of ``modelswap pull``: touched only once a model needs it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

import aiodocker
import msgspec

from modelswap.cli.pull_screen import State
from modelswap.protocol.errors import Code
from modelswap.runtimes.base import Report
from modelswap.runtimes.docker.client import Trouble, connect, failure, open_docker
from modelswap.runtimes.docker.finding import find_adopted
from modelswap.runtimes.docker.images import ImageUnavailable, local_image, pull
from modelswap.runtimes.docker.sharing import shares_cache
from modelswap.runtimes.docker.surroundings import look_around
from modelswap.spec import config
from modelswap.spec.config import Model

_PATIENCE: Final = 3.0


class Pulled(msgspec.Struct, frozen=True):
    """What became of an image, and its bytes on disk."""

    state: State
    size: int | None


async def have_image(settings: config.Docker, ref: str, when: str, report: Report, *, newer: bool) -> Pulled:
    """Have an image here, ``when`` (as `Model.pull`) it is missing or, if ``newer``, in any case.

    Raises `ModelswapError` as `images.pull` does, and if Docker can't be reached.
    """
    async with _opened(settings) as docker:
        try:
            before = await local_image(docker, ref)
            if when == "never" and before is None:
                raise ImageUnavailable(
                    f"the image {ref} isn't here, and 'pull: never' forbids to fetch it; build it, load it"
                    " (docker load), or say pull: missing",
                    code=Code.MODEL_BROKEN,
                )
            if when == "never" or (before is not None and not newer and when != "always"):
                return Pulled(State.HERE, await _size(docker, ref))
            after = await pull(docker, ref, report)
            same = before is not None and before.id == after.id
            return Pulled(State.HERE if same else State.CAME, await _size(docker, ref))
        except Trouble as error:
            raise failure(error, f"fetching the image {ref}") from error


async def loads_from_our_cache(settings: config.Docker, name: str, spec: Model) -> bool:
    """Return whether the container that somebody else made for a model shares our cache; raises `ModelswapError`."""
    async with _opened(settings) as docker:
        try:
            around = await look_around(docker, settings)
            found = await find_adopted(docker, name, spec, around, settings.project)
        except Trouble as error:
            raise failure(error, f"looking for the container of {name}") from error
        return shares_cache(found, around.hf_cache)


@contextlib.asynccontextmanager
async def _opened(settings: config.Docker) -> AsyncIterator[aiodocker.Docker]:
    async with open_docker(settings.host) as docker:
        await connect(docker, _PATIENCE)
        yield docker


async def _size(docker: aiodocker.Docker, ref: str) -> int | None:
    found = (await docker.images.inspect(ref)).get("Size")
    return int(found) if found is not None else None
