"""Docker for a test: a client, names of its own, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import aiodocker
import pytest

from modelswap.runtimes.docker import api

BASE: Final = os.environ.get("MODELSWAP_TEST_BASE", "modelswap-base:bookworm")
URL: Final = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
LABEL: Final = "io.modelswap.test"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a second dockerd wants root")


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """Make a folder with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="msw", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class Scratch:
    """Makes containers, networks and volumes that `scratch` removes again."""

    def __init__(self, docker: aiodocker.Docker) -> None:
        self.docker = docker
        self.prefix = f"msw-parts-{uuid.uuid4().hex[:10]}"
        self.images: list[str] = []

    async def container(
        self,
        name: str,
        *argv: str,
        labels: dict[str, str] | None = None,
        host: dict[str, Any] | None = None,
        start: bool = True,
        **body: Any,
    ) -> dict[str, Any]:
        """Make a container called ``PREFIX-name``, by default a running one that does nothing; return its document."""
        made = await api.call(
            self.docker,
            "POST",
            "containers/create",
            params={"name": f"{self.prefix}-{name}"},
            body={
                "Image": BASE,
                "Cmd": list(argv) or ["sleep", "600"],
                "Labels": {LABEL: self.prefix, **(labels or {})},
                "HostConfig": {"Init": True, **(host or {})},
                **body,
            },
        )
        if start:
            await api.call(self.docker, "POST", f"containers/{made['Id']}/start")
        found = await api.inspect(self.docker, made["Id"])
        assert found is not None
        return found

    async def network(self, name: str) -> str:
        """Make a network and return its name."""
        full = f"{self.prefix}-{name}"
        await api.call(self.docker, "POST", "networks/create", body={"Name": full, "Labels": {LABEL: self.prefix}})
        return full

    async def volume(self, name: str) -> str:
        """Make a volume and return its name."""
        full = f"{self.prefix}-{name}"
        await api.call(self.docker, "POST", "volumes/create", body={"Name": full, "Labels": {LABEL: self.prefix}})
        return full

    async def run(self, name: str, *argv: str, **kwargs: Any) -> str:
        """Run a container to its end and return what it printed; fails the test if it fails."""
        ran = await self.container(name, *argv, start=False, **kwargs)
        container = self.docker.containers.container(ran["Id"])
        await container.start()
        ended = await container.wait()
        printed = "".join(await container.log(stdout=True, stderr=True))
        assert ended["StatusCode"] == 0, printed
        return printed

    async def clean(self) -> None:
        """Remove all that was made."""
        ours = {"filters": api.filters(label=[f"{LABEL}={self.prefix}"])}
        for each in await api.call(self.docker, "GET", "containers/json", params={"all": "1", **ours}):
            await self._remove(f"containers/{each['Id']}", {"force": "1", "v": "1"})
        for each in await api.call(self.docker, "GET", "networks", params=ours):
            await self._remove(f"networks/{each['Id']}")
        for each in (await api.call(self.docker, "GET", "volumes"))["Volumes"] or ():
            if each["Name"].startswith(self.prefix):
                await self._remove(f"volumes/{each['Name']}")
        for image in self.images:
            await self._remove(f"images/{image}", {"force": "1"})

    async def _remove(self, path: str, params: dict[str, str] | None = None) -> None:
        with contextlib.suppress(aiodocker.DockerError):
            await api.call(self.docker, "DELETE", path, params=params)


@contextlib.asynccontextmanager
async def scratch(url: str = URL) -> AsyncIterator[Scratch]:
    """Open one on the Docker at ``url``."""
    async with aiodocker.Docker(url=url) as docker:
        made = Scratch(docker)
        try:
            yield made
        finally:
            await made.clean()


@contextlib.asynccontextmanager
async def private_daemon(folder: Path, options: Sequence[str] = ()) -> AsyncIterator[PrivateDaemon]:
    """Run a second dockerd that a test may kill; wants root. Its containers have no network to the outside.

    It gets a bridge of its own: without one (``--bridge none``) a dockerd removes ``docker0``, the first one's.
    """
    bridge = f"msw{random.getrandbits(32):08x}"
    subnet = f"10.213.{random.randrange(256)}.1/24"
    await _ip("link", "add", "name", bridge, "type", "bridge")
    try:
        await _ip("address", "add", subnet, "dev", bridge)
        daemon = PrivateDaemon(folder, ["--bridge", bridge, *options])
        try:
            await daemon.start()
            yield daemon
        finally:
            await daemon.stop()
    finally:
        await _ip("link", "delete", bridge)


async def _ip(*argv: str) -> None:
    process = await asyncio.create_subprocess_exec("ip", *argv)
    assert await process.wait() == 0, argv


class PrivateDaemon:
    """A dockerd with folders of its own below ``folder``, a short path, since sockets are in it."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        self.folder = folder
        self.url = f"unix://{folder}/docker.sock"
        self._options = options
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Return when it answers."""
        program = shutil.which("dockerd") or "/usr/sbin/dockerd"
        folder = self.folder
        log = (folder / "dockerd.log").open("ab")
        with log:
            self._process = await asyncio.create_subprocess_exec(
                program,
                *("--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")),
                *("--pidfile", str(folder / "pid"), "--host", self.url),
                *("--iptables=false", "--ip6tables=false", "--ip-masq=false"),
                *("--shutdown-timeout", "5"),
                *self._options,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        async with asyncio.timeout(60), aiodocker.Docker(url=self.url) as docker:
            while True:
                try:
                    await docker.version()
                except aiodocker.DockerError:
                    assert self._process.returncode is None, (folder / "dockerd.log").read_text()
                    await asyncio.sleep(0.05)
                else:
                    return

    async def stop(self) -> None:
        """Ask it to end and wait until it has, with the containerd that it started."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            await self._process.wait()
        self._process = None
