"""Images: what is here, and pulling what isn't."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from typing import Any, Final

import aiodocker
import aiohttp
import msgspec

from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.base import Report
from modelswap.runtimes.docker import api, registry

_ROOT: Final = ("", "0", "root")
_FULL: Final = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
# What registries and Docker 20.10 to 29 say; statuses differ, and inside a stream there are none.
_ABSENT: Final = re.compile(
    r"manifest unknown|manifest for .* not found|repository .* not found|repository does not exist"
    r"|name unknown|failed to resolve reference .*: not found|no matching manifest|invalid reference format",
    re.IGNORECASE | re.DOTALL,
)
_DENIED: Final = re.compile(r"denied|unauthorized|authentication required|forbidden|no basic auth", re.IGNORECASE)
_LIMITED: Final = re.compile(r"toomanyrequests|too many requests|rate limit", re.IGNORECASE)
# Silence for so long means that Docker has forgotten us; a layer's extraction tells more often.
_PULL: Final = aiohttp.ClientTimeout(total=None, sock_read=600)


class Image(msgspec.Struct, frozen=True):
    """An image that is here: its id, what it starts by itself, the TCP ports it says it listens at, in order.

    ``user`` is as whom it runs, as the image spells it; empty for root.
    """

    id: str
    entrypoint: tuple[str, ...]
    ports: tuple[int, ...]
    user: str = ""

    @property
    def is_root(self) -> bool:
        """Whether what it starts may write to what belongs to root."""
        return self.user.partition(":")[0] in _ROOT


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
    return Image(found["Id"], tuple(config.get("Entrypoint") or ()), tuple(ports), str(config.get("User") or ""))


async def pull(docker: aiodocker.Docker, ref: str, report: Report, env: Mapping[str, str] = os.environ) -> Image:
    """Pull an image, as the user that `docker login` made known to its registry, and return it.

    ``report`` hears of the stage ``pulling image REF`` and of the part that is done (bytes downloaded and unpacked,
    over all layers). Cancelling it ends Docker's pull; complete layers are kept. Raises `ImageUnavailable`, `DiskFull`;
    lets through what any call raises when Docker itself is away.
    """
    stage, progress, ended = f"pulling image {ref}", PullProgress(), False
    login = await registry.login(ref, env)
    report(stage, None)
    try:
        async with api.request(
            docker,
            "POST",
            "images/create",
            # An empty name and tag would be all tags.
            params={"fromImage": ref} if registry.is_exact(ref) else {"fromImage": ref, "tag": "latest"},
            headers={"x-registry-auth": login.header} if login.header else None,
            timeout=_PULL,
        ) as response:
            async for item in api.lines(response):
                if problem := item.get("error"):
                    raise aiodocker.DockerError(0, str(problem))
                ended = ended or str(item.get("status", "")).startswith(("Status: ", "Digest: "))
                if progress.take(item):
                    report(stage, progress.fraction)
    except aiodocker.DockerError as error:
        raise await _unavailable(docker, ref, login, error) from error
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, TimeoutError) as error:
        raise _cut_off(ref) from error
    image = await local_image(docker, ref) if ended else None
    if image is None:
        raise _cut_off(ref)
    report(stage, 1.0)
    return image


class PullProgress:
    """How far a pull is, from its stream's items.

    A layer is downloaded and then unpacked; both count its compressed size. Layers whose size isn't known yet count as
    large as those known are on average. ``fraction`` never shrinks; None before any size is known.
    """

    def __init__(self) -> None:
        self.fraction: float | None = None
        self._layers: dict[str, _Layer] = {}

    def take(self, item: Mapping[str, Any]) -> bool:
        """Take one item of the stream; return whether the fraction has changed."""
        status, layer_id = str(item.get("status", "")), str(item.get("id", ""))
        if status == "Pulling fs layer":
            self._layers[layer_id] = _Layer()
        if (layer := self._layers.get(layer_id)) is None:
            return False
        detail = item.get("progressDetail") or {}
        current, total = int(detail.get("current") or 0), int(detail.get("total") or 0)
        match status:
            case "Downloading" | "Extracting":
                # An unpacked layer's progress is in bytes of its compressed file, too. Unknown sizes come as -1.
                layer.total = max(layer.total, total)
                if status == "Downloading":
                    layer.downloaded = current
                else:
                    layer.downloaded, layer.extracted = layer.total, current
            case "Download complete":
                layer.downloaded = layer.total
            case "Pull complete" | "Already exists":
                layer.complete = True
            case _:
                return False
        return self._update()

    def _update(self) -> bool:
        known = [layer.total for layer in self._layers.values() if layer.total]
        if not known:
            return False
        average = sum(known) / len(known)
        done = sum(layer.part() * (layer.total or average) for layer in self._layers.values())
        all_bytes = sum(layer.total or average for layer in self._layers.values())
        fraction = min(1.0, done / all_bytes)
        if self.fraction is not None and fraction <= self.fraction:
            return False
        self.fraction = fraction
        return True


class _Layer(msgspec.Struct):
    total: int = 0
    downloaded: int = 0
    extracted: int = 0
    complete: bool = False

    def part(self) -> float:
        if self.complete:
            return 1.0
        return (self.downloaded + self.extracted) / (2 * self.total) if self.total else 0.0


async def _unavailable(
    docker: aiodocker.Docker, ref: str, login: registry.Login, error: aiodocker.DockerError
) -> ModelswapError:
    said = error.message.strip()
    if _FULL.search(said):
        folder = "its data folder"
        with contextlib.suppress(aiodocker.DockerError, aiohttp.ClientError, TimeoutError):
            folder = (await api.call(docker, "GET", "info"))["DockerRootDir"]
        return DiskFull(
            f"image {ref} can't be pulled: the disk with Docker's data ({folder}) is full ({said}); free some space"
            " (docker system df shows what takes it)"
        )
    if _LIMITED.search(said):
        return ImageUnavailable(
            f"image {ref} can't be pulled now: {login.registry} limits pulls ({said}); wait, or docker login there"
        )
    # Docker Hub says of what doesn't exist that access is denied; so does a plain 404.
    if _DENIED.search(said):
        return ImageUnavailable(
            f"image {ref} can't be pulled: {said}; mend 'image' if it is called otherwise, or log in with: docker login"
            f" {login.registry}{login.caveat}",
            code=Code.MODEL_BROKEN,
        )
    if _ABSENT.search(said) or error.status in (400, 404):
        return ImageUnavailable(
            f"image {ref} can't be pulled: {said}; mend 'image' in the config (is the tag right?)",
            code=Code.MODEL_BROKEN,
        )
    return ImageUnavailable(
        f"image {ref} can't be pulled: {said}; check that Docker's machine reaches {login.registry}, or load the image"
        " there (docker load) and say pull: never"
    )


def _cut_off(ref: str) -> ImageUnavailable:
    return ImageUnavailable(f"image {ref} can't be pulled: Docker ended the pull half-way; is it being restarted?")
