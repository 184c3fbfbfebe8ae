"""What the checks look at: the config, this machine, Docker; each thing is looked up once, whoever asks first."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from modelswap.devices.amdcards import Nodes
from modelswap.devices.base import Reading
from modelswap.runtimes.docker.images import Image
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import Config, Model

_T = TypeVar("_T")


class ToldElsewhere(Exception):
    """A check can't be made for a reason that another check is there to tell."""


class Engine(Protocol):
    """A Docker Engine that answers. Its methods let `aiodocker.DockerError` and `aiohttp.ClientError` through."""

    where: str

    async def version(self) -> Mapping[str, Any]:
        """Return what ``GET /version`` answers."""
        ...

    async def info(self) -> Mapping[str, Any]:
        """Return what ``GET /info`` answers."""
        ...

    async def around(self) -> Surroundings:
        """Return where we are, as Docker sees it."""
        ...

    async def image(self, ref: str) -> Image | None:
        """Return an image that is here."""
        ...

    async def adopted(self, name: str, spec: Model) -> Mapping[str, Any]:
        """Return how Docker describes the container of an adopted model; raises `ModelswapError`."""
        ...

    async def ours(self) -> set[str]:
        """Return the ids of all containers that were made for models."""
        ...

    async def names(self) -> Mapping[str, str]:
        """Return the names of all running containers by their ids."""
        ...

    async def gpus_seen(self, name: str, spec: Model, image: Image, amd: Sequence[Nodes]) -> tuple[int, str]:
        """Run the image as the model would be, asking for its GPUs; return exit status and what it printed."""
        ...


@dataclass(frozen=True, slots=True)
class Gpu:
    """The configured device as it was found: ``why`` it can't be read, if it can't; ``amd`` are all GPUs if it's AMD's.

    ``own`` are this one's device files. NVIDIA's: ``uuid`` is its name to CUDA, ``count`` how many there are.
    """

    name: str
    kind: str
    reading: Reading | None
    why: str | None = None
    amd: tuple[Nodes, ...] = ()
    own: tuple[str, ...] = ()
    uuid: str = ""
    count: int = 1


@dataclass(slots=True, eq=False)
class Scene:
    """Everything a check may look at.

    ``config`` is empty but for defaults where the file can't be used (``config_error`` says why). The functions reach
    out; each is called at most once a run, through `docker`, `gpu` and `status`.
    """

    path: Path
    config: Config
    connect: Callable[[], Awaitable[Engine]]
    read_gpu: Callable[[], Awaitable[Gpu]]
    ask_orchestrator: Callable[[], Awaitable[Mapping[str, Any]]]
    config_error: str | None = None
    env: Mapping[str, str] = field(default_factory=lambda: os.environ)
    deep: bool = False
    _kept: dict[str, asyncio.Future[Any]] = field(default_factory=dict)

    async def once(self, key: str, look: Callable[[], Awaitable[_T]]) -> _T:
        """Return what ``look`` returned (or raise what it raised) the first time anybody asked for ``key``."""
        if key not in self._kept:
            self._kept[key] = asyncio.ensure_future(look())
        # One check's time limit must not take the answer from the others.
        found: _T = await asyncio.shield(self._kept[key])
        return found

    async def aclose(self) -> None:
        """End what still looks."""
        for looking in self._kept.values():
            looking.cancel()
        await asyncio.gather(*self._kept.values(), return_exceptions=True)

    async def docker(self) -> Engine:
        """Return Docker; raises `ToldElsewhere` where it can't be reached or no model needs it."""
        if not self.containers():
            raise ToldElsewhere
        try:
            return await self.once("docker", self.connect)
        except Exception as error:
            raise ToldElsewhere from error

    async def around(self) -> Surroundings:
        """Return where we are, as Docker sees it; raises as `docker` does."""
        docker = await self.docker()
        try:
            return await self.once("around", docker.around)
        except Exception as error:
            raise ToldElsewhere from error

    async def image(self, ref: str) -> Image | None:
        """Return an image that is here; raises as `docker` does, and what Docker answers."""
        docker = await self.docker()
        return await self.once(f"image {ref}", lambda: docker.image(ref))

    async def container(self, name: str, spec: Model) -> Mapping[str, Any]:
        """Return how Docker describes an adopted model's container; raises as `docker` does, and `ModelswapError`."""
        docker = await self.docker()
        return await self.once(f"container {name}", lambda: docker.adopted(name, spec))

    async def gpu(self) -> Gpu:
        """Return the configured device."""
        return await self.once("gpu", self.read_gpu)

    async def status(self) -> Mapping[str, Any] | None:
        """Return the running orchestrator's status; None if none answers."""
        try:
            return await self.once("status", self.ask_orchestrator)
        except Exception:  # noqa: BLE001 - whatever it is, no orchestrator of ours answers
            return None

    def models(self, *runtimes: str) -> dict[str, Model]:
        """Return the models that are hosted by one of ``runtimes``."""
        return {name: model for name, model in self.config.models.items() if model.runtime in runtimes}

    def containers(self) -> dict[str, Model]:
        """Return the models that need Docker."""
        return self.models("adopted", "managed")


Check = Callable[[Scene], Awaitable[list[Any]]]


async def in_thread(look: Callable[[], _T]) -> _T:
    """Return what ``look`` returns; it may block for ever, since its thread is left behind when the program ends."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[_T] = loop.create_future()

    def tell(act: Callable[[Any], None], value: Any) -> None:
        if not found.done():
            act(value)

    def work() -> None:
        try:
            value, act = look(), found.set_result
        except Exception as error:  # noqa: BLE001 - raised again where it is awaited
            value, act = error, found.set_exception  # type: ignore[assignment]
        try:
            loop.call_soon_threadsafe(tell, act, value)
        except RuntimeError:
            return  # nobody waits any more: the loop has ended

    threading.Thread(target=work, name="doctor", daemon=True).start()
    return await found
