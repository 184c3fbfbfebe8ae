"""Docker itself: can it be reached, is it new enough, can it give GPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from modelswap.cli.doctor.finding import Finding, fine, note, problem, warning
from modelswap.cli.doctor.scene import Gpu, Scene, ToldElsewhere
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.docker import client
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import Model

OLDEST_API: Final = (1, 40)
"""Docker 19.03, the first that gives GPUs to containers."""
TESTED_API: Final = (1, 41)
"""Docker 20.10, the oldest that modelswap is tested with."""
_START: Final = "start it (systemctl start docker), or say where it is: docker.host, or $DOCKER_HOST"
_TOOLKIT: Final = (
    "install the NVIDIA Container Toolkit, run `nvidia-ctk runtime configure --runtime=docker`, and restart Docker"
)


async def reached(scene: Scene) -> list[Finding]:
    """Whether Docker answers, which version it is, and where we are, as it sees it."""
    if not scene.containers():
        return [note("not looked at: no model needs it")]
    try:
        docker = await scene.once("docker", scene.connect)
    except ModelswapError as away:
        where = client.address(scene.config.docker.host, scene.env)
        return [unreached(where, away, forbidden=client.forbidden(away))]
    findings = [of_version(await docker.version(), docker.where)]
    findings += of_info(await docker.info())
    try:
        around = await scene.once("around", docker.around)
    except ModelswapError as unclear:
        return [*findings, problem(str(unclear), "mend the section 'docker' of the config file")]
    return [*findings, of_surroundings(around)]


def unreached(where: str, away: BaseException, *, forbidden: bool) -> Finding:
    """Judge why Docker can't be reached."""
    if not forbidden:
        return problem(f"Docker can't be reached at {where}", f"{_START}\n{_reason(away)}")
    group = _group_of(where)
    remedy = "sudo usermod -aG docker $USER, and log in anew"
    if group is not None:
        remedy += f"; if modelswap runs in a container: DOCKER_GID={group} in .env"
    return problem(f"this user (uid {os.geteuid()}) may not talk to Docker at {where}", remedy)


def of_version(said: Mapping[str, Any], where: str) -> Finding:
    """Judge what ``GET /version`` answered."""
    version, api = str(said.get("Version", "?")), str(said.get("ApiVersion", ""))
    told = f"Docker {version} (API {api or '?'}) answers at {where}"
    try:
        major, minor = map(int, api.split("."))
    except ValueError:
        return warning(told, "it doesn't say which API it speaks; is that really Docker?")
    if (major, minor) < OLDEST_API:
        return problem(f"{told}, which is too old", f"update it: API {OLDEST_API[0]}.{OLDEST_API[1]} is needed")
    if (major, minor) < TESTED_API:
        return warning(f"{told}, with which modelswap isn't tested", "update it to Docker 20.10 or newer")
    return fine(told)


def of_info(info: Mapping[str, Any]) -> list[Finding]:
    """Judge what ``GET /info`` answered, as far as it concerns every model."""
    findings = []
    if str(info.get("OSType", "linux")) != "linux":
        message = f"Docker runs {info['OSType']} containers"
        findings.append(problem(message, "switch it to Linux containers"))
    if any("rootless" in str(option) for option in info.get("SecurityOptions") or ()):
        findings.append(note("Docker is rootless: containers see files with other owners"))
    return findings


def of_surroundings(around: Surroundings) -> Finding:
    """Say how engines will be reached."""
    if not around.container:
        if around.network:
            return fine(f"engines are reached on the network {around.network}")
        return fine("we run on Docker's machine: engines are reached through published loopback ports")
    if around.network:
        return fine(f"we run in a container: engines are reached on the network {around.network}")
    remedy = "put it on a network that the engines are on, and name that in docker.network"
    return problem("we run in a container that is on no network: no engine can be reached", remedy)


async def gives_gpus(scene: Scene) -> list[Finding]:
    """Whether Docker can give GPUs to the models that want some."""
    wanting = [name for name, model in scene.models("managed").items() if wants_gpu(model)]
    if not wanting:
        raise ToldElsewhere
    around, gpu = await scene.around(), await scene.gpu()
    if gpu.amd:
        return [of_device_files(gpu)]
    return of_gpus(around, wanting, on_host=gpu.kind == "nvml")


def wants_gpu(model: Model) -> bool:
    """Return whether a managed model is to see GPUs that modelswap gives it."""
    return model.gpus not in ("auto", "none") or (model.gpus == "auto" and model.device == "gpu" and not model.devices)


def of_device_files(gpu: Gpu) -> Finding:
    """Say by which files containers get an AMD GPU."""
    return fine(f"containers are given {gpu.name} by its device files: {', '.join(gpu.own)}")


def of_gpus(around: Surroundings, wanting: list[str], *, on_host: bool) -> list[Finding]:
    """Judge whether Docker has what the models in ``wanting`` need of it."""
    if around.gpus:
        return [fine(f"Docker can give GPUs ({'CDI' if around.cdi else 'NVIDIA runtime'})")]
    names = ", ".join(wanting)
    if on_host:
        return [problem(f"Docker can't give GPUs: it has neither NVIDIA's runtime nor CDI; {names} want one", _TOOLKIT)]
    remedy = f"if this machine has an NVIDIA GPU: {_TOOLKIT}; else say gpus: none"
    return [warning(f"Docker has no GPUs to give, and here is none to be seen; {names} will start without", remedy)]


def _group_of(where: str) -> int | None:
    try:
        return Path(where.removeprefix("unix://")).stat().st_gid if where.startswith("unix://") else None
    except OSError:
        return None


def _reason(away: BaseException) -> str:
    return (str(away.__cause__ or "") or str(away)).splitlines()[0]
