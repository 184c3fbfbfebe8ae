"""The real outside: this machine's Docker, GPU and orchestrator, as a `scene.Scene` asks for them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import aiodocker
import msgspec

from modelswap.cli import addresses
from modelswap.cli.client import AdminClient
from modelswap.cli.doctor.scene import Engine, Gpu, Scene, in_thread
from modelswap.devices.amdcards import Nodes
from modelswap.devices.amdgpu import AmdGpuDevice
from modelswap.devices.choose import AnyDevice, open_device
from modelswap.devices.errors import DeviceUnavailable, DeviceUnreadable
from modelswap.devices.nvml import NvmlDevice
from modelswap.devices.slot import SlotDevice
from modelswap.engines.base import Address, Launch
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import StartFailed, StartOrder
from modelswap.runtimes.docker import api, body, client, finding, images, surroundings
from modelswap.runtimes.docker.images import Image
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import Config, Model

_PATIENCE: Final = 0.0
"""A doctor doesn't wait for a Docker that is away."""
_ANSWER_SECONDS: Final = 8.0
"""Less than a check may take, so that its end says what is wrong."""
_LOOK_SECONDS: Final = 60.0
# The NVIDIA toolkit puts nvidia-smi into containers with the capability utility; images may ask for less.
_LOOK: Final = ("/bin/sh", "-c", "nvidia-smi -L || ls /dev/nvidia[0-9]*")
# Root may open them all, so only an image with another user can tell that a group is missing.
_LOOK_AMD: Final = (
    *("/bin/sh", "-c"),
    "for file in /dev/kfd /dev/dri/renderD*; do [ -r $file ] && [ -w $file ] && echo $file; done; id >&2",
)
_LABEL: Final = "io.modelswap.doctor"


class DockerSide:
    """The `Engine` behind an open client."""

    def __init__(self, docker: aiodocker.Docker, config: Config, env: Mapping[str, str]) -> None:
        self.where = client.address(config.docker.host, env)
        self._docker = docker
        self._config = config
        self._env = env
        self._around: Surroundings | None = None

    async def version(self) -> Mapping[str, Any]:
        """See `Engine`."""
        return await self._get("version")

    async def info(self) -> Mapping[str, Any]:
        """See `Engine`."""
        return await self._get("info")

    async def around(self) -> Surroundings:
        """See `Engine`."""
        if self._around is None:
            self._around = await surroundings.look_around(self._docker, self._config.docker, self._env)
        return self._around

    async def image(self, ref: str) -> Image | None:
        """See `Engine`."""
        return await images.local_image(self._docker, ref)

    async def adopted(self, name: str, spec: Model) -> Mapping[str, Any]:
        """See `Engine`."""
        return await finding.find_adopted(self._docker, name, spec, await self.around(), self._config.docker.project)

    async def ours(self) -> set[str]:
        """See `Engine`."""
        made = await api.call(
            self._docker, "GET", "containers/json", params={"filters": api.filters(label=[body.OWNER])}
        )
        found = {str(each["Id"]) for each in made}
        for name, spec in self._config.models.items():
            if spec.runtime == "adopted":
                with contextlib.suppress(ModelswapError):  # its own check tells
                    found.add(str((await self.adopted(name, spec))["Id"]))
        return found

    async def names(self) -> Mapping[str, str]:
        """See `Engine`."""
        listed = await api.call(self._docker, "GET", "containers/json")
        return {str(each["Id"]): str((each.get("Names") or ["?"])[0]).lstrip("/") for each in listed}

    async def gpus_seen(self, name: str, spec: Model, image: Image, amd: Sequence[Nodes]) -> tuple[int, str]:
        """See `Engine`."""
        order = StartOrder(
            instance="doctor",
            model=name,
            definition="",
            spec=spec.model_copy(update={"volumes": [], "network": None, "model": None}),
            launch=Launch(_LOOK_AMD if amd else _LOOK, {}),
            address=Address("127.0.0.1", 1),
        )
        around = msgspec.structs.replace(await self.around(), compile_cache="")  # a look leaves no volume behind
        gpu = self._config.device.index
        try:
            wanted = body.create_body(order, image, around, port=1, published=None, gpu=gpu, amd=amd, owner="")
        except StartFailed as not_there:
            return 125, str(not_there)
        wanted["Labels"] = {_LABEL: "1"}
        wanted["HostConfig"]["NetworkMode"] = "none"
        called = f"modelswap-doctor-{uuid.uuid4().hex[:8]}"
        try:
            made = await api.call(self._docker, "POST", "containers/create", params={"name": called}, body=wanted)
            try:
                return await self._run(str(made["Id"]))
            finally:
                await api.call(self._docker, "DELETE", f"containers/{made['Id']}", params={"force": "1", "v": "1"})
        except aiodocker.DockerError as refused:
            return 125, str(refused.message)

    async def _run(self, container: str) -> tuple[int, str]:
        await api.call(self._docker, "POST", f"containers/{container}/start")
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                ended = await api.call(self._docker, "POST", f"containers/{container}/wait")
        except TimeoutError:
            return 124, f"it did not end within {_LOOK_SECONDS:g} s"
        said = await self._docker.containers.container(container).log(stdout=True, stderr=True)
        return int(ended["StatusCode"]), "".join(said)

    async def _get(self, path: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = await api.call(self._docker, "GET", path)
        return found


@contextlib.asynccontextmanager
async def real_scene(
    path: Path, config: Config, *, config_error: str | None, deep: bool, env: Mapping[str, str] = os.environ
) -> AsyncIterator[Scene]:
    """Yield the scene of this machine; what it opened is closed afterwards."""
    async with contextlib.AsyncExitStack() as opened:

        async def connect() -> Engine:
            docker = client.open_docker(config.docker.host, env)
            opened.push_async_callback(docker.close)
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await client.connect(docker, _PATIENCE)
            except TimeoutError as mute:
                raise client.failure(mute, "connecting to it") from mute
            return DockerSide(docker, config, env)

        async def read_gpu() -> Gpu:
            try:
                device = await in_thread(lambda: open_device(config.device))
            except DeviceUnavailable as gone:
                return Gpu(config.device.kind, config.device.kind, None, str(gone))
            opened.push_async_callback(device.aclose)
            return await _read(device)

        async def ask() -> Mapping[str, Any]:
            async with AdminClient(addresses.url(config.orchestrator.host, config.orchestrator.port)) as admin:
                return await admin.status()

        scene = Scene(
            path=path,
            config=config,
            connect=connect,
            read_gpu=read_gpu,
            ask_orchestrator=ask,
            config_error=config_error,
            env=env,
            deep=deep,
        )
        # Closed first, so that nothing looks any more when the connections close.
        opened.push_async_callback(scene.aclose)
        yield scene


async def _read(device: AnyDevice) -> Gpu:
    try:
        reading = await device.read()
    except DeviceUnreadable as lost:
        return Gpu(device.name, device.kind, None, str(lost))
    if isinstance(device, AmdGpuDevice):
        return Gpu(device.name, device.kind, reading, amd=device.nodes, own=device.nodes[device.index].paths)
    if isinstance(device, NvmlDevice):
        return Gpu(device.name, device.kind, reading, uuid=device.uuid, count=device.count)
    return Gpu(device.name, device.kind, reading, device.reason if isinstance(device, SlotDevice) else None)
