"""The device: can it be seen, does each model fit, who else holds its memory."""

from __future__ import annotations

import contextlib
import grp
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modelswap.cli.doctor.finding import Finding, fine, note, problem, warning
from modelswap.cli.doctor.scene import Gpu, Scene, ToldElsewhere
from modelswap.cli.words import size
from modelswap.devices.base import Holder
from modelswap.engines import options
from modelswap.engines.registry import engine_for
from modelswap.runtimes.processes import PREFIX
from modelswap.spec.config import Config

_SHARES: Final[Mapping[str, str]] = {"vllm": "--gpu-memory-utilization", "sglang": "--mem-fraction-static"}
"""How engines are told which share of the device's memory to take."""
_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
_CONTAINER: Final = re.compile(r"[0-9a-f]{64}")
_ENOUGH_TO_TELL: Final = 256 << 20
"""Bytes below which a stranger on the GPU (a desktop's cursor) is not worth a word."""


@dataclass(frozen=True, slots=True)
class Share:
    """A holder of device memory: ``ours`` if a model's engine, else ``what`` it is, in words."""

    holder: Holder
    ours: bool
    what: str


@dataclass(frozen=True, slots=True)
class Rights:
    """A device file: is it there, may we read and write it, which group (by name, else its id) may."""

    there: bool
    open: bool = False
    group: str = ""


async def seen(scene: Scene) -> list[Finding]:
    """Whether the device can be read."""
    gpu = await scene.gpu()
    return of_device(gpu, scene.config) + of_rights(gpu, scene.config) + of_others(gpu, scene.config, scene.env)


def of_device(gpu: Gpu, config: Config) -> list[Finding]:
    """Judge what was found of the device."""
    wanting = [name for name, model in config.models.items() if model.device == "gpu"]
    if gpu.reading is not None:
        free, total = size(gpu.reading.free), size(gpu.reading.total)
        return [fine(f"{gpu.name}: {free} of {total} free")]
    why = gpu.why or "this kind of device has no memory to read"
    if config.device.kind == "slot":
        return [fine("models take turns on one slot, as device.kind says; no memory is read")]
    if config.device.kind == "auto" and gpu.kind == "slot":
        message = f"no GPU memory can be read ({why}); models take turns, but nothing checks whether they fit"
        if not wanting:
            return [note(message)]
        remedy = (
            "in a container, give the orchestrator the NVIDIA GPU with capability `utility`; without a GPU: "
            "device.kind: slot"
        )
        return [warning(message, remedy)]
    return [problem(f"the device can't be used: {why}", "mend that, or set device.kind to slot")]


def of_rights(gpu: Gpu, config: Config, look: Callable[[str], Rights] | None = None) -> list[Finding]:
    """Judge whether engines that run as our processes may open the GPU's device files, where they use it by some."""
    wanting = [name for name, model in config.models.items() if model.device == "gpu" and model.runtime == "process"]
    if not wanting or not gpu.amd:
        return []
    named = ", ".join(wanting)
    findings = []
    if "/dev/kfd" not in gpu.own:
        message = f"the kernel offers no /dev/kfd, which ROCm needs; {named} can use {gpu.name} through Vulkan only"
        findings.append(note(message, "for ROCm: see `dmesg | grep kfd`"))
    rights = {path: (look or _rights)(path) for path in gpu.own}
    for path in (path for path, found in rights.items() if not found.there):
        message = f"there is no {path} here, by which {named} would use {gpu.name}"
        findings.append(warning(message, "in a container, give it that (devices: [/dev/kfd, /dev/dri])"))
    if closed := {path: found.group for path, found in rights.items() if found.there and not found.open}:
        groups = ",".join(sorted(set(closed.values())))
        message = f"this user (uid {os.geteuid()}) may not use {' and '.join(closed)}; {named} would find no GPU"
        findings.append(problem(message, f"sudo usermod -aG {groups} $USER, and log in anew"))
    return findings


def of_others(gpu: Gpu, config: Config, env: Mapping[str, str]) -> list[Finding]:
    """Judge whether engines that run as our processes use the very GPU that is watched, where CUDA sees several."""
    if gpu.count < 2 or _VISIBLE in env:
        return []
    free = [
        name
        for name, model in config.models.items()
        if model.device == "gpu" and model.runtime == "process" and _VISIBLE not in model.env
        if options.parallelism(model.args) == 1
    ]
    if not free:
        return []
    message = (
        f"there are {gpu.count} GPUs, of which {gpu.name} is watched; nothing keeps {', '.join(free)} off the others"
    )
    return [warning(message, f"say env: {{{_VISIBLE}: {gpu.uuid}}} for each, or set it for modelswap itself")]


async def fits(scene: Scene) -> list[Finding]:
    """Whether each model fits, and who is in its way."""
    gpu = await scene.gpu()
    if gpu.reading is None:
        raise ToldElsewhere
    ours: set[str] = set()
    names: Mapping[str, str] = {}
    with contextlib.suppress(ToldElsewhere):  # no container is ours then
        docker = await scene.docker()
        ours, names = await docker.ours(), await docker.names()
    shares = [share_of(holder, ours, names) for holder in gpu.reading.holders]
    return of_room(scene.config, gpu, shares)


def of_room(config: Config, gpu: Gpu, shares: list[Share]) -> list[Finding]:
    """Judge what each model needs against what the device can give it once our own models are out."""
    reading = gpu.reading
    if reading is None:
        return []
    # Where the driver doesn't tell what our own engines hold, all that is held may be theirs.
    untold = any(share.ours and share.holder.bytes is None for share in shares)
    held = sum(share.holder.bytes or 0 for share in shares if share.ours)
    room = reading.total if untold else reading.free + held
    strangers = [share for share in shares if not share.ours]
    findings, fitting, unknown = [], [], []
    for name, model in config.models.items():
        if model.device == "none":
            continue
        needed = engine_for(model.engine).device_bytes(model, reading.total)
        if needed is None:
            unknown.append(name)
        elif needed > reading.total:
            message = f"{name}: it wants {size(needed)} of device memory, and {gpu.name} has {size(reading.total)}"
            findings.append(problem(message, f"lower models.{name}.memory, or use a smaller or quantised model"))
        elif needed > room:
            message = f"{name}: it wants {size(needed)}, and at most {size(room)} can be free{_taken(strangers)}"
            findings.append(problem(message, _make_room(name, config)))
        else:
            fitting.append(f"{name} ({size(needed)})")
    if fitting:
        findings.insert(0, fine(f"room for each of {', '.join(fitting)}"))
    if unknown:
        message = f"what these need of the GPU isn't known before they start: {', '.join(unknown)}"
        findings.append(note(message, "say 'memory' for each, so that it starts only where it fits"))
    return [*findings, *_strangers(strangers)]


def share_of(
    holder: Holder, ours: set[str], names: Mapping[str, str], read: Callable[[int], tuple[str, bytes]] | None = None
) -> Share:
    """Return whose a holder is: by its environment, or by its container (``ours`` and ``names`` know containers)."""
    cgroup, environ = (read or _of_process)(holder.pid)
    carries = any(each.startswith(f"{PREFIX}INSTANCE=".encode()) for each in environ.split(b"\0"))
    container = next(iter(_CONTAINER.findall(cgroup)), "")
    what = f"{holder.name} (pid {holder.pid}"
    if container:
        what += f", container {names.get(container, container[:12])}"
    return Share(holder, carries or container in ours, what + ")")


def _of_process(pid: int) -> tuple[str, bytes]:
    found: list[bytes] = []
    for name in ("cgroup", "environ"):
        try:
            found.append(Path(f"/proc/{pid}/{name}").read_bytes())
        except OSError:  # it has ended, or is another user's
            found.append(b"")
    return found[0].decode(errors="replace"), found[1]


def _rights(path: str) -> Rights:
    try:
        group = Path(path).stat().st_gid
    except OSError:
        return Rights(there=False)
    try:
        name = grp.getgrgid(group).gr_name
    except KeyError:  # in a container
        name = str(group)
    return Rights(there=True, open=os.access(path, os.R_OK | os.W_OK), group=name)


def _taken(strangers: list[Share]) -> str:
    told = ", ".join(share.what for share in strangers[:4])
    return f": {told} hold{'s' if len(strangers) == 1 else ''} the rest" if told else ""


def _make_room(name: str, config: Config) -> str:
    option = _SHARES.get(config.models[name].engine)
    if option is not None and config.models[name].runtime != "adopted":
        return f"end what else uses the GPU, or lower {option} in its args"
    return f"end what else uses the GPU, or lower models.{name}.memory"


def _strangers(strangers: list[Share]) -> list[Finding]:
    large = [share for share in strangers if share.holder.bytes is None or share.holder.bytes >= _ENOUGH_TO_TELL]
    if not large:
        return []
    told = ", ".join(f"{share.what}: {size(share.holder.bytes)}" for share in large)
    return [note(f"others hold device memory: {told}", "end them if models need the room")]
