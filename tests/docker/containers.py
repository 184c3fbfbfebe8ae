"""``modelswap up`` on this machine, with simulated engines in containers: half of them managed, half adopted."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiodocker

from tests.docker.stack import ENGINE_IMAGE
from tests.ports import free_port
from tests.system.stack import Stack

MANAGED: Final = ("mistral", "coder", "llava")
ADOPTED: Final = ("phi", "gemma", "qwen")
MODELS: Final = MANAGED + ADOPTED
LABEL: Final = "modelswap.test"


@dataclass(slots=True)
class Watched:
    """What Docker said of our containers, in order: (``start`` or ``die``, model)."""

    seen: list[tuple[str, str]] = field(default_factory=list)
    most: int = 0
    """How many ran at once."""
    running: set[str] = field(default_factory=set)

    def take(self, action: str, model: str) -> None:
        """Take in one event."""
        self.seen.append((action, model))
        if action == "start":
            self.running.add(model)
        else:
            self.running.discard(model)
        self.most = max(self.most, len(self.running))

    @property
    def starts(self) -> list[str]:
        """Which models' containers were started, in order."""
        return [model for action, model in self.seen if action == "start"]


class ContainerStack:
    """Three managed and three adopted models, every one of which fills the device.

    They are reached at published ports of this machine, the adopted ones all at the same; with a ``network``, at their
    own addresses on that, which Docker gives to the next one as soon as one has ended.
    """

    def __init__(self, folder: Path, network: str | None = None, **options: Any) -> None:
        self.network = network
        self.prefix = f"ms-{uuid.uuid4().hex[:8]}"
        self.watched = Watched()
        sim = options.pop("sim", "--load-seconds=0.05 --tokens=4")
        self.port = free_port()
        common = {"engine": "vllm", "concurrency": 4}
        models: dict[str, Any] = {
            name: {
                **common,
                "image": ENGINE_IMAGE,
                "model": f"/models/{name}",
                "pull": "never",
                "env": {"SIM_ARGS": sim},
                "shm_size": "16MiB",
            }
            for name in MANAGED
        }
        models |= {name: {**common, "container": f"{self.prefix}-{name}", "model": name} for name in ADOPTED}
        self._sim = sim
        sections = options if network is None else {**options, "docker": {"network": network}}
        self.stack = Stack(folder, models=models, **sections)

    async def __aenter__(self) -> ContainerStack:
        self.docker = aiodocker.Docker()
        for name in ADOPTED:
            await self._create(name)
        self._watching = asyncio.create_task(self._watch())
        await self.stack.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.stack.stop()
        finally:
            for process in self.stack.leftovers():
                process.kill()
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self.left = [name for name, running in (await self.containers()).items() if running]
            for container in await self._ours():
                await container.delete(force=True, v=True)
            await self.docker.close()

    async def _create(self, name: str) -> None:
        published = {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(self.port)}]} if self.network is None else {}
        config: dict[str, Any] = {
            "Image": ENGINE_IMAGE,
            "Cmd": [f"/models/{name}", "--served-model-name", name],
            "Env": [f"SIM_ARGS={self._sim}"],
            "Labels": {LABEL: self.prefix},
            "HostConfig": {"Init": True, "RestartPolicy": {"Name": "unless-stopped"}, "PortBindings": published},
        }
        await self.docker.containers.create(config, name=f"{self.prefix}-{name}")

    async def _watch(self) -> None:
        """Note every start and every end, by the model; started before anything of ours runs."""
        subscriber = self.docker.events.subscribe()  # type: ignore[no-untyped-call]
        while (event := await subscriber.get()) is not None:
            if event["Type"] != "container" or event["Action"] not in ("start", "die"):
                continue
            attributes = event["Actor"]["Attributes"]
            if attributes.get(LABEL) == self.prefix:
                self.watched.take(event["Action"], attributes["name"].removeprefix(f"{self.prefix}-"))
            elif attributes.get("io.modelswap.owner") == self.owner and "io.modelswap.model" in attributes:
                self.watched.take(event["Action"], attributes["io.modelswap.model"])

    @property
    def owner(self) -> str:
        """Return what our orchestrator's containers are labelled with."""
        with contextlib.suppress(OSError):
            return (self.stack.state_dir / "docker" / "id").read_text().strip()
        return "not known yet"

    async def _ours(self) -> list[Any]:
        found = []
        for container in await self.docker.containers.list(all=True):
            labels = container["Labels"]
            if labels.get(LABEL) == self.prefix or labels.get("io.modelswap.owner") == self.owner:
                found.append(container)
        return found

    async def containers(self) -> dict[str, bool]:
        """Return which of our containers run, by model."""
        found = {}
        for container in await self._ours():
            name = container["Names"][0].removeprefix("/").removeprefix(f"{self.prefix}-")
            found[container["Labels"].get("io.modelswap.model", name)] = container["State"] == "running"
        return found

    async def container(self, model: str) -> Any:
        """Return a model's container; None if it isn't made yet."""
        for container in await self._ours():
            name = container["Names"][0].removeprefix("/").removeprefix(f"{self.prefix}-")
            if container["Labels"].get("io.modelswap.model", name) == model:
                return container
        return None


@contextlib.asynccontextmanager
async def container_stack(folder: Path, network: str | None = None, **options: Any) -> AsyncIterator[ContainerStack]:
    """Run one; nothing of it may run when it has been stopped."""
    stack = ContainerStack(folder, network, **options)
    async with stack:
        yield stack
    assert stack.left == []
