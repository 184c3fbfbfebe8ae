"""Drives a `DockerRuntime` over a real Docker Engine, with stand-in engines in containers of a tiny image."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import aiodocker
import pytest

from modelswap.engines.base import Address, Launch
from modelswap.runtimes.base import Known, Running, StartOrder
from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.client import open_docker
from modelswap.runtimes.docker.opening import open_runtime
from modelswap.runtimes.docker.runtime import DockerRuntime
from modelswap.spec import config
from modelswap.spec.config import Model
from tests.runtimes.saying import says

IMAGE: Final = "modelswap-base:bookworm"
ENGINE: Final = Path(__file__).with_name("engine_script.py")
PORT: Final = 8000
SCRIPT: Final = "/engine_script.py"
PYTHON: Final = ("python3", "-S", "-E", SCRIPT)


def adopted(**more: Any) -> Model:
    """Return a model whose container somebody else makes."""
    return Model(engine="custom", port=PORT, **more)


class DockerHost:
    """Makes orders for stand-in engines, and containers that somebody else would make.

    Everything has the prefix ``name``, and is gone when the test is over.
    """

    def __init__(self, docker: aiodocker.Docker, state_dir: Path, name: str) -> None:
        self.docker = docker
        self.state_dir = state_dir
        self.name = name
        self.network = f"{name}-net"
        self.model = f"{name}/model"
        self.models: dict[str, Known] = {}
        self._stack = contextlib.AsyncExitStack()
        self.runtime: DockerRuntime

    async def says(self, running: Running, word: str) -> list[str]:
        """Return the log's words after ``word``, once the engine has said it."""
        return await says(self.runtime, running, word)

    def managed(self, **more: Any) -> Model:
        """Return a model that is served from an image, in a container on a network of our own."""
        given = {"volumes": [f"{ENGINE}:{SCRIPT}:ro"], "entrypoint": [], "port": PORT, "network": self.network, **more}
        return Model(engine="custom", command=["stand-in"], image=IMAGE, **given)

    async def open(self, docker: config.Docker | None = None, **more: Any) -> DockerRuntime:
        """Open another runtime on the same state, as a new orchestrator would."""
        opened = open_runtime(
            self.state_dir,
            docker or config.Docker(),
            gpu=0,
            port_of=lambda _: PORT,
            lock=self.name,
            **{"kill_timeout": 20.0} | more,
        )
        runtime = await self._stack.enter_async_context(opened)
        await runtime.configure(self.models)
        return runtime

    async def configure(self, **models: Model) -> None:
        """Configure models, by the last part of their names."""
        self.models |= {f"{self.name}/{name}": Known(spec, definition_of(spec)) for name, spec in models.items()}
        await self.runtime.configure(self.models)

    def order(self, launch: Launch, address: Address, model: str = "model") -> StartOrder:
        """Return an order with an instance id of its own."""
        known = self.models[f"{self.name}/{model}"]
        return StartOrder(
            instance=uuid.uuid4().hex,
            model=f"{self.name}/{model}",
            definition=known.definition,
            spec=known.spec,
            launch=launch,
            address=address,
        )

    async def order_of(self, behaviour: str, argument: object = "", model: str = "model") -> StartOrder:
        """Return an order for a stand-in engine that behaves so."""
        place = await self.runtime.allocate(self.models[f"{self.name}/{model}"].spec)
        launch = Launch((*(place.program or ()), *PYTHON, behaviour, str(argument)), {})
        return self.order(launch, place.address, model)

    async def start(self, behaviour: str = "obey", argument: object = "", model: str = "model") -> Running:
        """Start a stand-in engine."""
        return await self.runtime.start(await self.order_of(behaviour, argument, model))

    async def reopen(self, docker: config.Docker | None = None) -> None:
        """Close all runtimes, and open one."""
        await self._stack.aclose()
        self.runtime = await self.open(docker)

    async def prepare(self) -> None:
        """Make the network, open the runtime, configure one managed model."""
        await api.call(self.docker, "POST", "networks/create", body={"Name": self.network})
        await self.reopen()
        await self.configure(model=self.managed())

    async def make(self, name: str, command: Sequence[str] = (*PYTHON, "obey"), **more: Any) -> str:
        """Make a container as somebody else would; returns its id. Its name gets our prefix."""
        host = {
            "Binds": [f"{ENGINE}:{SCRIPT}:ro"],
            "Init": True,
            "NetworkMode": self.network,
            "PortBindings": {f"{PORT}/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]},
            **more.pop("HostConfig", {}),
        }
        exposed: dict[str, dict[str, str]] = {f"{PORT}/tcp": {}}
        body = {"Image": IMAGE, "Cmd": list(command), "ExposedPorts": exposed, "HostConfig": host, **more}
        params = {"name": f"{self.name}-{name}"}
        made = await api.call(self.docker, "POST", "containers/create", params=params, body=body)
        return str(made["Id"])

    async def post(self, container: str, action: str) -> None:
        """Have Docker do something to a container, as somebody else would."""
        await api.call(self.docker, "POST", f"containers/{container}/{action}")

    async def inspect(self, container: str) -> dict[str, Any]:
        """Return what Docker says of a container."""
        found = await api.inspect(self.docker, container)
        assert found is not None
        return found

    async def containers(self) -> list[dict[str, Any]]:
        """Return all containers of this host, as Docker lists them."""
        listed = await api.call(self.docker, "GET", "containers/json", params={"all": "1"})
        mine = (self.name, f"modelswap-{self.name}")
        return [each for each in listed if each["Names"][0].removeprefix("/").startswith(mine)]

    async def remove_containers(self) -> None:
        """Remove all containers of this host, as somebody else would."""
        for each in await self.containers():
            await api.call(self.docker, "DELETE", f"containers/{each['Id']}", params={"force": "1", "v": "1"})

    async def close(self) -> None:
        """Close the runtimes and remove what is left."""
        await self._stack.aclose()
        await self.remove_containers()
        networks = await api.call(self.docker, "GET", "networks", params={"filters": api.filters(name=[self.name])})
        for network in networks:
            await api.call(self.docker, "DELETE", f"networks/{network['Id']}")
        volumes = await api.call(self.docker, "GET", "volumes", params={"filters": api.filters(name=[self.name])})
        assert not volumes["Volumes"]


def definition_of(spec: Model) -> str:
    """Return something that differs for different models."""
    return str(abs(hash(spec.model_dump_json())))


@contextlib.asynccontextmanager
async def docker_host(state_dir: Path) -> AsyncIterator[DockerHost]:
    """Give a host with an open runtime and one managed model."""
    docker = open_docker(None)
    try:
        if await _is_missing(docker):
            pytest.fail(f"there is no image {IMAGE}: `make test-docker` builds it")
        host = DockerHost(docker, state_dir, f"rt{uuid.uuid4().hex[:8]}")
        try:
            await host.prepare()
            yield host
        finally:
            await host.close()
    finally:
        await docker.close()


async def _is_missing(docker: aiodocker.Docker) -> bool:
    try:
        await api.call(docker, "GET", f"images/{IMAGE}/json")
    except aiodocker.DockerError as error:
        if error.status == 404:
            return True
        raise
    return False
