"""Models that are started from images: is the image here, does what the config says of it add up."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Final

from modelswap.cli.doctor.engine import wants_gpu
from modelswap.cli.doctor.finding import Finding, fine, note, problem, warning
from modelswap.cli.doctor.scene import Scene, ToldElsewhere
from modelswap.engines import compiling, options
from modelswap.engines.paths import is_there
from modelswap.engines.registry import FROM_HUB
from modelswap.runtimes.docker import compiled
from modelswap.runtimes.docker.images import Image
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import Model
from modelswap.spec.volumes import parse

_ROOT: Final = "VLLM_CACHE_ROOT"
_UNSEEN: Final = Image("", (), ())
"""Stands for an image that isn't here yet: most run as root."""

_SEEN: Final = ("GPU ", "/dev/nvidia", "/dev/kfd", "/dev/dri/render")
_LOOK_AT_AMD: Final = (
    "its user must be root, or in a group of /dev/kfd and /dev/dri/renderD*: modelswap adds the groups if it sees them "
    "itself (in a container, give it both); and models.{name}.devices must name all of them, or none"
)


async def here(scene: Scene) -> list[Finding]:
    """Whether each image is here, or will be when it is needed."""
    managed = scene.models("managed")
    if not managed:
        raise ToldElsewhere
    return [of_image(name, model, await scene.image(model.image or "")) for name, model in managed.items()]


def of_image(name: str, model: Model, image: Image | None) -> Finding:
    """Judge whether the image of a model can be had."""
    if image is not None and model.engine == "custom" and not (model.command or model.entrypoint or image.entrypoint):
        message = f"{name}: the image {model.image} has no entrypoint, and the config names no command"
        return problem(message, f"say what it shall run: models.{name}.command")
    if image is not None:
        return fine(f"{name}: the image {model.image} is here")
    if model.pull == "never":
        message = f"{name}: the image {model.image} is not here, and pull: never keeps it from being pulled"
        return problem(message, f"build or load it (docker load), or drop pull: never from models.{name}")
    return note(f"{name}: the image {model.image} is not here yet", f"pull it ahead of time: modelswap pull {name}")


async def settings(scene: Scene) -> list[Finding]:
    """Whether folders to mount exist, compiled code is kept, and shared memory is enough."""
    managed = scene.models("managed")
    if not managed:
        raise ToldElsewhere
    around = await scene.around()
    findings = []
    for name, model in managed.items():
        if not around.container and not _remote(scene):
            findings += of_folders(name, model)
        image = await scene.image(model.image or "") or _UNSEEN
        if (advice := of_compiled(name, model, image, around)) is not None:
            findings.append(advice)
        if (advice := of_shared_memory(name, model)) is not None:
            findings.append(advice)
    return findings


def of_folders(name: str, model: Model) -> list[Finding]:
    """Judge the folders of this machine that are mounted: Docker makes missing ones, empty and owned by root."""
    return [
        warning(
            f"{name}: there is no {volume.source} to mount at {volume.target}; Docker would make an empty folder",
            f"make it, or mend models.{name}.volumes",
        )
        for volume in map(parse, model.volumes)
        if volume.is_folder and not is_there(Path(volume.source))
    ]


def of_compiled(name: str, model: Model, image: Image, around: Surroundings) -> Finding | None:
    """Judge whether what vLLM compiles lasts longer than the container."""
    if model.engine != "vllm" or options.given(model.args, "--enforce-eager"):
        return None
    env = compiled.kept(model, image, around).env | model.env
    usual = next(cache.usual for cache in compiling.VLLM if cache.variable == _ROOT)
    place = PurePosixPath(env.get(_ROOT, usual))
    if place.is_relative_to(compiled.PLACE) or any(place.is_relative_to(parse(each).target) for each in model.volumes):
        return None
    message = f"{name}: what vLLM compiles (minutes of a first start) is lost whenever its container is made anew"
    if compiled.barred(model, image, around):
        message += f"; its image runs as {image.user}, and modelswap's cache is root's"
        return note(message, f'mount a folder that it may write: volumes: ["/srv/vllm-cache:{compiled.PLACE}"]')
    if _ROOT in model.env:
        return note(message, f'keep it in a volume: volumes: ["vllm-cache:{place}"]')
    return note(message, "keep it in modelswap's cache: drop docker.compile_cache: false")


def of_shared_memory(name: str, model: Model) -> Finding | None:
    """Judge whether an engine's workers can talk to each other."""
    parallel = options.parallelism(model.args)
    if model.engine not in FROM_HUB or parallel < 2 or model.ipc is not None:
        return None
    if model.shm_size is not None and model.shm_size < 1 << 30:
        message = f"{name}: {parallel} workers share {model.shm_size.human_readable()} of memory, which is little"
        return warning(message, "say shm_size: 8GiB, or ipc: host")
    return None


async def see_gpus(scene: Scene) -> list[Finding]:
    """Run each image that wants GPUs, and look what it sees of them (``--deep``)."""
    if not scene.deep:
        raise ToldElsewhere
    docker = await scene.docker()
    findings, seen = [], set[str]()
    for name, model in scene.models("managed").items():
        key = f"{model.image} {model.gpus}"
        if not wants_gpu(model) or key in seen:
            continue
        seen.add(key)
        image = await scene.image(model.image or "")
        if image is None:
            findings.append(note(f"{name}: GPUs in its container were not looked at: its image is not here"))
            continue
        amd = (await scene.gpu()).amd
        status, said = await docker.gpus_seen(name, model, image, amd)
        findings.append(of_seen(name, status, said, amd=bool(amd)))
    return findings


def of_seen(name: str, status: int, said: str, *, amd: bool = False) -> Finding:
    """Judge what was said in a container: by ``nvidia-smi -L``, else ``ls /dev/nvidia*``; AMD's usable files."""
    gpus = [line for line in said.splitlines() if line.startswith(_SEEN)]
    if status == 0 and gpus:
        return fine(f"{name}: its container sees " + "; ".join(line.partition(" (UUID")[0] for line in gpus))
    last = said.strip().splitlines()[-1:] or ["nothing"]
    message = f"{name}: its container sees no GPU (it said: {last[0][:200]})"
    if amd:
        return problem(message, _LOOK_AT_AMD.format(name=name))
    remedy = "look whether `docker run --rm --gpus all IMAGE nvidia-smi` works; if not, reinstall the NVIDIA toolkit"
    return problem(message, remedy)


def _remote(scene: Scene) -> bool:
    host = scene.config.docker.host or scene.env.get("DOCKER_HOST") or "unix://"
    return not host.startswith("unix://")
