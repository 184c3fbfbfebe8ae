"""A machine made of plain data, for the doctor to look at."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelswap.cli.doctor.finding import Finding, Level
from modelswap.cli.doctor.scene import Engine, Gpu, Scene
from modelswap.devices.amdcards import Nodes
from modelswap.devices.base import Reading
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.docker.finding import NoSuchContainer
from modelswap.runtimes.docker.images import Image
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import Config, Model
from modelswap.spec.load import loads

GIB = 1 << 30
WHOLE = {"config.json": b"{}", "model.safetensors": b"w" * 8192}
"""A repository of which nothing is missing, for `cached`."""


@dataclass(slots=True)
class FakeDocker:
    """A Docker that answers what it was given."""

    where: str = "unix:///var/run/docker.sock"
    said: dict[str, Any] = field(default_factory=lambda: {"Version": "28.0", "ApiVersion": "1.48"})
    told: dict[str, Any] = field(default_factory=dict)
    surroundings: Surroundings | ModelswapError = field(default_factory=Surroundings)
    images: dict[str, Image] = field(default_factory=dict)
    containers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    called: dict[str, str] = field(default_factory=dict)
    gpus: tuple[int, str] = (0, "GPU 0: NVIDIA L4 (UUID: GPU-1)\n")
    ran: list[str] = field(default_factory=list)
    asked: list[Sequence[Nodes]] = field(default_factory=list)

    async def version(self) -> Mapping[str, Any]:
        """See `Engine`."""
        return self.said

    async def info(self) -> Mapping[str, Any]:
        """See `Engine`."""
        return self.told

    async def around(self) -> Surroundings:
        """See `Engine`."""
        if isinstance(self.surroundings, ModelswapError):
            raise self.surroundings
        return self.surroundings

    async def image(self, ref: str) -> Image | None:
        """See `Engine`."""
        return self.images.get(ref)

    async def adopted(self, name: str, spec: Model) -> Mapping[str, Any]:
        """See `Engine`."""
        try:
            return self.containers[name]
        except KeyError:
            raise NoSuchContainer(f"model {name}: there is no container x; make it") from None

    async def ours(self) -> set[str]:
        """See `Engine`."""
        return self.made

    async def names(self) -> Mapping[str, str]:
        """See `Engine`."""
        return self.called

    async def gpus_seen(self, name: str, spec: Model, image: Image, amd: Sequence[Nodes]) -> tuple[int, str]:
        """See `Engine`."""
        self.ran.append(name)
        self.asked.append(amd)
        return self.gpus


def config(text: str) -> Config:
    """Return the config of models in YAML's flow style: ``a: {…}, b: {…}``."""
    return loads(f"models: {{{text}}}", {})


def scene(
    models: str = "a: {engine: custom, command: [x]}",
    *,
    docker: Engine | Exception | None = None,
    gpu: Gpu | None = None,
    status: Mapping[str, Any] | None = None,
    path: Path = Path("m.yaml"),
    **more: Any,
) -> Scene:
    """Return a scene; without a ``status`` no orchestrator answers."""

    def answer(value: Any) -> Callable[[], Awaitable[Any]]:
        async def give() -> Any:
            if isinstance(value, Exception):
                raise value
            return value

        return give

    return Scene(
        path=path,
        config=more.pop("config", None) or config(models),
        connect=answer(docker if docker is not None else FakeDocker()),
        read_gpu=answer(gpu or gpu_of(free=20)),
        ask_orchestrator=answer(status if status is not None else ConnectionRefusedError()),
        **{"env": {}, **more},
    )


def gpu_of(*, free: float, total: float = 24, **more: Any) -> Gpu:
    """Return a GPU with sizes in GiB."""
    return Gpu("NVIDIA L4", "nvml", Reading(int(total * GIB), int(free * GIB), **more))


def levels(findings: list[Finding]) -> list[Level]:
    """Return the levels of findings, in order."""
    return [finding.level for finding in findings]


def one(findings: list[Finding], words: str) -> Finding:
    """Return the only finding with ``words`` in its message."""
    found = [finding for finding in findings if words in finding.message]
    assert len(found) == 1, [finding.message for finding in findings]
    return found[0]


def cached(hub: Path, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
    """Write a repository as the hub's client keeps it, with a listing of all its files."""
    folder, commit = hub / ("models--" + repo.replace("/", "--")), "1" * 40
    for sub in ("refs", "blobs", "trees", f"snapshots/{commit}"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    listing: dict[str, Any] = {}
    for number, (name, content) in enumerate(files.items()):
        (folder / "blobs" / str(number)).write_bytes(content)
        (folder / "snapshots" / commit / name).symlink_to(folder / "blobs" / str(number))
        listing[name] = {"size": len(content), "blob_id": str(number)}
    (folder / "trees" / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": listing}))
