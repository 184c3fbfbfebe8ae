"""How a managed container is given GPUs: NVIDIA's by a request to Docker, AMD's by their device files; pure.

Facts (ROCm's documentation, "Running ROCm Docker containers", "Restricting GPU access"): a container needs ``/dev/kfd``
and the render node of each GPU that it is to see, and nothing else of the host. A program in it that isn't root must be
in the groups that own these files, by their ids: the names mean other ids in the image. That works without AMD's own
container toolkit; what that one names the CDI way (``amd.com/gpu=0``) can be asked for in ``gpus``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, Final

from modelswap.devices.amdcards import Nodes
from modelswap.protocol.errors import Code
from modelswap.runtimes.base import StartFailed
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import Model

_AMD_FILES: Final = ("/dev/kfd", "/dev/dri")


def settings(spec: Model, around: Surroundings, gpu: int, amd: Sequence[Nodes]) -> dict[str, Any]:
    """Return the part of ``HostConfig`` that is about devices.

    ``gpu`` is the index of the config's device; ``amd`` are all AMD GPUs in their order if that is one of them, else
    none. Raises `StartFailed` if an AMD GPU is asked for that isn't there.
    """
    devices = list(spec.devices)
    nodes = _amd_gpus(spec, gpu, amd)
    if not (spec.gpus == "auto" and any(_covers(each, file) for each in devices for file in _AMD_FILES)):
        for path in dict.fromkeys(path for each in nodes for path in each.paths):
            if not any(_covers(path, _host_path(each)) for each in devices):
                devices.append(path)
    found: dict[str, Any] = {
        "Devices": [_device(each) for each in devices],
        "DeviceRequests": _requests(spec, around, gpu, amd),
    }
    # Root needs no group, and its own is no way to give others the files.
    if groups := sorted({group for each in nodes for group in each.groups if group}):
        found["GroupAdd"] = [str(group) for group in groups]
    return found


def _amd_gpus(spec: Model, gpu: int, amd: Sequence[Nodes]) -> list[Nodes]:
    if not amd or spec.gpus == "none" or (spec.gpus == "auto" and spec.device == "none"):
        return []
    if spec.gpus == "all":
        return list(amd)
    wanted = [gpu] if spec.gpus == "auto" else [int(name) for name in spec.gpus if name.isdecimal()]
    for index in wanted:
        if index >= len(amd):
            have = "is one, index 0" if len(amd) == 1 else f"are 0 to {len(amd) - 1}"
            message = f"its container is to see AMD GPU {index}, and there {have}; correct its 'gpus'"
            raise StartFailed(message, code=Code.MODEL_BROKEN)
    return [amd[index] for index in wanted]


def _requests(spec: Model, around: Surroundings, gpu: int, amd: Sequence[Nodes]) -> list[dict[str, Any]]:
    if spec.gpus == "none" or (spec.gpus == "auto" and (not around.gpus or spec.device == "none")):
        return []
    if amd and isinstance(spec.gpus, str):
        return []
    wanted = None if spec.gpus == "all" else [str(gpu)] if spec.gpus == "auto" else list(spec.gpus)
    if amd:
        # Its indices are AMD's; what is named otherwise is meant as it stands.
        wanted = [name for name in wanted or () if not name.isdecimal()]
        if not wanted:
            return []
    if around.cdi or (amd and any("=" in name for name in wanted or ())):
        # Docker's `cdi` driver wants qualified names; a machine may have it alone (Docker's docs, "CDI devices").
        names = ["all"] if wanted is None else wanted
        return [{"Driver": "cdi", "DeviceIDs": [n if "=" in n else f"nvidia.com/gpu={n}" for n in names]}]
    request: dict[str, Any] = {"Driver": "", "Capabilities": [["gpu"]]}
    request |= {"Count": -1} if wanted is None else {"DeviceIDs": wanted}
    return [request]


def _device(device: str) -> dict[str, str]:
    source, _, rest = device.partition(":")
    target, _, permissions = rest.partition(":")
    return {"PathOnHost": source, "PathInContainer": target or source, "CgroupPermissions": permissions or "rwm"}


def _host_path(device: str) -> str:
    return device.partition(":")[0]


def _covers(path: str, by: str) -> bool:
    """Return whether ``path`` is ``by``, or a file below it."""
    return PurePosixPath(_host_path(path)).is_relative_to(PurePosixPath(by))
