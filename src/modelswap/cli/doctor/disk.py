"""Room: on the disks that take state, weights and images, and in host memory."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from modelswap.cli.doctor import weights
from modelswap.cli.doctor.finding import Finding, fine, problem, warning
from modelswap.cli.doctor.scene import Scene, ToldElsewhere, in_thread
from modelswap.cli.words import size
from modelswap.engines.paths import is_there
from modelswap.engines.registry import FROM_HUB
from modelswap.orchestrator.state import state_dir

GIB: Final = 1 << 30
_CUDA_IMAGE: Final = 30 * GIB
"""What vLLM's and SGLang's images take unpacked, with what their pull needs meanwhile."""
_OTHER_IMAGE: Final = 10 * GIB
_UNKNOWN_WEIGHTS: Final = 10 * GIB
_SCARCE: Final = 2 * GIB
_FULL: Final = 200 << 20
_LITTLE_MEMORY: Final = 2 * GIB


@dataclass(slots=True)
class Disk:
    """A file system: ``uses`` says what of ours lies there, ``needed`` how many bytes are still to come."""

    total: int
    free: int
    uses: list[str] = field(default_factory=list)
    needed: int = 0


async def room(scene: Scene) -> list[Finding]:
    """Whether what is still to come fits on the disk where it goes."""
    wants: list[tuple[Path, str, int]] = [(state_dir(scene.config, scene.env), "state and logs", 0)]
    for wanted in await weights.wanted_repos(scene):
        if wanted.hub is not None:
            wants += [(wanted.hub, "weights", await still_to_come(wanted))]
    with contextlib.suppress(ToldElsewhere):  # where Docker keeps images can't be seen then
        wants += await _dockers(scene)
    disks: dict[int, Disk] = {}
    for folder, use, needed in wants:
        place = next(filter(is_there, (folder, *folder.parents)))
        number, usage = await in_thread(lambda place=place: (place.stat().st_dev, shutil.disk_usage(place)))  # type: ignore[misc]
        disk = disks.setdefault(number, Disk(usage.total, usage.free))
        text = f"{use} ({folder})"
        disk.uses += [text] if text not in disk.uses else []
        disk.needed += needed
    return [of_disk(disk) for disk in disks.values()]


async def still_to_come(wanted: weights.Wanted) -> int:
    """Return about how many bytes of a repository are not here yet."""
    hub = wanted.hub
    if hub is None:
        return 0
    kept = await in_thread(lambda: weights.kept_in(hub, wanted.repo))
    if not kept.missing:
        return 0
    guessed = weights.guess(wanted.repo.repo) or (_UNKNOWN_WEIGHTS if wanted.repo.weights else 0)
    return max(0, guessed - kept.bytes)


async def _dockers(scene: Scene) -> list[tuple[Path, str, int]]:
    docker = await scene.docker()
    around = await scene.around()
    root = Path(str((await docker.info()).get("DockerRootDir") or "/var/lib/docker"))
    # Only on Docker's own machine is that folder the one it means.
    if around.container or not docker.where.startswith("unix://") or not is_there(root.parent):
        return []
    missing = {
        model.image: _CUDA_IMAGE if model.engine in FROM_HUB else _OTHER_IMAGE
        for model in scene.models("managed").values()
        if model.pull != "never" and await scene.image(model.image or "") is None
    }
    wants = [(root, "images", sum(missing.values()))]
    if around.compile_cache.startswith("/") and scene.models("managed"):
        wants.append((Path(around.compile_cache), "what engines compile", 0))
    return wants


def of_disk(disk: Disk) -> Finding:
    """Judge one file system."""
    told = f"{size(disk.free)} of {size(disk.total)} free for {', '.join(disk.uses)}"
    clean = "free some space; `docker system df` and `hf cache ls` show what takes it"
    if disk.free < _FULL:
        return problem(f"the disk is full: {told}", clean)
    if disk.needed > disk.free:
        return warning(f"{told}, and about {size(disk.needed)} are still to come", clean)
    if disk.free < _SCARCE:
        return warning(f"little room: {told}", clean)
    return fine(told + (f" (about {size(disk.needed)} still to come)" if disk.needed else ""))


async def memory(scene: Scene) -> list[Finding]:
    """Whether the host has memory to load models through."""
    seen = psutil.virtual_memory()
    return [of_memory(seen.total, seen.available)]


def of_memory(total: int, available: int) -> Finding:
    """Judge host memory; whether weights stay in it is told of where it costs time (`hints.page_cache`)."""
    told = f"{size(available)} of {size(total)} host memory available"
    if available < _LITTLE_MEMORY:
        return warning(told, "an engine may be killed while it starts: end other programs, or add swap")
    return fine(told)
