"""Where we run, as Docker sees it: on its host, or in one of its containers; its networks, mounts and GPUs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

import aiodocker
import msgspec

from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.compose import compose_of
from modelswap.spec import config as spec

_MOUNTINFO: Final = Path("/proc/self/mountinfo")
# Docker mounts these files over the image's own, from its folder of the container (proc_pid_mountinfo(5): fields 4, 5).
_OWN_FILE: Final = re.compile(r"/containers/([0-9a-f]{64})/\S+ /etc/(?:hostname|hosts|resolv\.conf) ")
_SHORT_ID: Final = re.compile(r"[0-9a-f]{12}")
# No networks on which another container could be met.
_MEETING_NOBODY: Final = ("host", "none")


class NoSuchNetwork(ModelswapError):
    """Docker has no network called as ``docker.network`` says."""

    code = Code.MODEL_BROKEN


class Mount(msgspec.Struct, frozen=True):
    """Something mounted into our own container: ``source`` is a volume's name or a folder of Docker's host."""

    source: str
    target: str


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What of Docker's world matters to us.

    ``container`` is our own container's full id, empty on the host; ``project`` is its compose project. A container
    that uses another's network (``network_mode: service:…``) sees that one's files and takes itself for it; where to
    meet engines is right even so. ``network`` is where we meet them, empty if that is through published loopback ports;
    ``networks`` are all that we are on.

    ``hf_cache`` is the volume or host folder to mount as Hugging Face cache into managed containers, empty if there is
    none that they could share with us; ``compile_cache`` is the one for what their engines compile, empty if that isn't
    to be kept. ``gpus``: this Docker can give GPUs; ``cdi``: it names them the CDI way.
    """

    container: str = ""
    network: str = ""
    networks: tuple[str, ...] = ()
    project: str = ""
    mounts: tuple[Mount, ...] = ()
    hf_cache: str = ""
    compile_cache: str = ""
    gpus: bool = False
    cdi: bool = False


async def look_around(
    docker: aiodocker.Docker, config: spec.Docker, env: Mapping[str, str] = os.environ, mountinfo: Path = _MOUNTINFO
) -> Surroundings:
    """Find out; raises `NoSuchNetwork`, lets `aiodocker.DockerError` and `aiohttp.ClientError` through."""
    ours = await _own_container(docker, env, mountinfo)
    mounts = _mounts(ours)
    networks = _networks(ours)
    project = compose_of(ours)[0]
    if config.network is not None:
        network = await _named_network(docker, config.network)
    else:
        network = f"{project}_default" if f"{project}_default" in networks else next(iter(networks), "")
    nvidia, cdi = _gpus(await api.call(docker, "GET", "info"))
    return Surroundings(
        container=str(ours.get("Id", "")),
        network=network,
        networks=networks,
        project=project,
        mounts=mounts,
        hf_cache=_hf_cache(config, env, mounts, inside=bool(ours)),
        compile_cache=_expanded(config.compile_cache or ""),
        gpus=nvidia or cdi,
        # Where Docker has both, what it was set up with first is the surer way.
        cdi=cdi and not nvidia,
    )


def own_id(mountinfo: str) -> str:
    """Return the full id of the container whose ``/proc/self/mountinfo`` this is, empty if it is none of Docker's."""
    found = _OWN_FILE.search(mountinfo)
    return found[1] if found else ""


async def _own_container(docker: aiodocker.Docker, env: Mapping[str, str], mountinfo: Path) -> Mapping[str, Any]:
    """Return how this Docker describes our own container; empty if we are in none of its containers."""
    text = ""
    with contextlib.suppress(OSError):
        text = await asyncio.to_thread(mountinfo.read_text)
    # Docker's own mounts tell for sure, whatever the container's name; a hostname may be anything.
    candidates = [own_id(text)]
    candidates += [name for name in (env.get("HOSTNAME", ""), socket.gethostname()) if _SHORT_ID.fullmatch(name)]
    for candidate in filter(None, candidates):
        found = await api.inspect(docker, candidate)
        # By its id, not by its name; and we run, so it must.
        if found is not None and found["Id"].startswith(candidate) and found["State"]["Running"]:
            return found
    return {}


def _networks(ours: Mapping[str, Any]) -> tuple[str, ...]:
    joined = (ours.get("NetworkSettings", {}).get("Networks") or {}).keys()
    return tuple(sorted(name for name in joined if name not in _MEETING_NOBODY))


async def _named_network(docker: aiodocker.Docker, name: str) -> str:
    try:
        found: dict[str, Any] = await api.call(docker, "GET", f"networks/{name}")
    except aiodocker.DockerError as error:
        if error.status != 404:
            raise
        there = sorted(each["Name"] for each in await api.call(docker, "GET", "networks"))
        raise NoSuchNetwork(
            f"docker.network is {name}, and Docker has no such network; it has {', '.join(there)}"
            " (compose calls its own PROJECT_default)"
        ) from error
    return "" if found["Name"] in _MEETING_NOBODY else str(found["Name"])


def _mounts(ours: Mapping[str, Any]) -> tuple[Mount, ...]:
    known = {"volume": "Name", "bind": "Source"}
    return tuple(
        Mount(str(each[known[each["Type"]]]), str(each["Destination"]))
        for each in ours.get("Mounts") or ()
        if each.get("Type") in known
    )


def _gpus(info: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether Docker has NVIDIA's runtime, and whether it knows NVIDIA GPUs by CDI names (Docker 28.3)."""
    devices: Iterable[Mapping[str, Any]] = info.get("DiscoveredDevices") or ()
    return "nvidia" in (info.get("Runtimes") or {}), any(
        each.get("Source") == "cdi" and str(each.get("ID", "")).startswith("nvidia.com/gpu=") for each in devices
    )


def _hf_cache(config: spec.Docker, env: Mapping[str, str], mounts: Iterable[Mount], *, inside: bool) -> str:
    if config.hf_cache is not None:
        return _expanded(config.hf_cache)
    ours = PurePosixPath(os.path.abspath(_hf_home(env)))  # noqa: PTH100 - must not follow links, as Docker doesn't
    if not inside:
        return str(ours)
    around = [mount for mount in mounts if ours.is_relative_to(mount.target)]
    if not around:
        return ""
    mount = max(around, key=lambda each: len(each.target))
    below = ours.relative_to(mount.target)
    if below == PurePosixPath():
        return mount.source
    # A volume can only be mounted as a whole (until API 1.45).
    return str(PurePosixPath(mount.source) / below) if mount.source.startswith("/") else ""


def _expanded(source: str) -> str:
    return os.path.expanduser(source)  # noqa: PTH111 - may be a volume's name


def _hf_home(env: Mapping[str, str]) -> str:
    """Return what Hugging Face's programs take as their home (``huggingface_hub.constants``)."""
    home = env.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 - works without a home, too
    cache = env.get("XDG_CACHE_HOME") or f"{home}/.cache"
    found = env.get("HF_HOME") or f"{cache}/huggingface"
    return found if not found.startswith("~/") else f"{home}/{found[2:]}"
