"""Images: what is here, and pulling what isn't."""

from __future__ import annotations

import aiodocker
import msgspec

from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.base import Report


class Image(msgspec.Struct, frozen=True):
    """An image that is here: its id, what it starts by itself, the TCP ports it says it listens at, in order."""

    id: str
    entrypoint: tuple[str, ...]
    ports: tuple[int, ...]


class ImageUnavailable(ModelswapError):
    """An image can't be pulled.

    With `Code.MODEL_BROKEN` if trying again is of no use (there is no such image, access is denied).
    """

    code = Code.MODEL_START_FAILED


class DiskFull(ModelswapError):
    """There is no room where Docker keeps its data."""

    code = Code.MODEL_START_FAILED


async def local_image(docker: aiodocker.Docker, ref: str) -> Image | None:
    """Return the image called ``ref`` if it is here; lets `aiodocker.DockerError` through."""
    try:
        found = await docker.images.inspect(ref)
    except aiodocker.DockerError as error:
        if error.status == 404:
            return None
        raise
    config = found.get("Config") or {}
    exposed = (port.split("/") for port in config.get("ExposedPorts") or {})
    ports = sorted(int(number) for number, *kind in exposed if kind in ([], ["tcp"]) and number.isdigit())
    return Image(found["Id"], tuple(config.get("Entrypoint") or ()), tuple(ports))


async def pull(docker: aiodocker.Docker, ref: str, report: Report) -> Image:
    """Pull; raises `ImageUnavailable`, `DiskFull`."""
    raise NotImplementedError
