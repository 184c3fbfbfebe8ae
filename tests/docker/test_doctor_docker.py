"""The doctor against a real Docker daemon."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiodocker
import pytest

from modelswap.cli.doctor import adopted, engine, gpu, images
from modelswap.cli.doctor.finding import Finding, Level
from modelswap.cli.doctor.outside import DockerSide, real_scene
from modelswap.cli.doctor.scene import Scene
from modelswap.devices.base import Holder
from modelswap.runtimes.docker import client
from modelswap.runtimes.docker.images import Image
from modelswap.spec.load import loads

pytestmark = pytest.mark.docker

IMAGE = os.environ.get("MODELSWAP_TEST_BASE", "modelswap-base:bookworm")
Make = Callable[..., Awaitable[str]]


@pytest.fixture
async def docker() -> AsyncIterator[aiodocker.Docker]:
    """A client."""
    opened = client.open_docker(None)
    try:
        await client.connect(opened)
        yield opened
    finally:
        await opened.close()


@pytest.fixture
async def make(docker: aiodocker.Docker) -> AsyncIterator[Make]:
    """Makes containers, named anew each, and removes them in the end."""
    made: list[Any] = []

    async def one(**host: Any) -> str:
        name = f"doctor-{uuid.uuid4().hex[:8]}"
        body: dict[str, Any] = {
            "Image": IMAGE,
            "Entrypoint": ["/bin/sleep"],
            "Cmd": ["600"],
            "ExposedPorts": {"8000/tcp": {}},
            "StopSignal": "SIGKILL",
            "HostConfig": host,
        }
        made.append(await docker.containers.create(body, name=name))
        return name

    yield one
    for container in made:
        await container.delete(force=True, v=True)


async def looked(
    models: str, check: Callable[[Scene], Awaitable[list[Finding]]], *, deep: bool = False
) -> list[Finding]:
    """Return what a check finds on this machine."""
    config = loads(f"models: {{{models}}}", {})
    async with real_scene(Path("m.yaml"), config, config_error=None, deep=deep) as scene:
        return await check(scene)


async def test_a_daemon_that_answers() -> None:
    """Its version and where we are, as the real one tells."""
    found = await looked(f"a: {{image: '{IMAGE}', model: m}}", engine.reached)
    assert found[0].level is Level.OK and "answers at" in found[0].message
    assert found[-1].level is Level.OK and "engines are reached" in found[-1].message


async def test_a_daemon_that_isnt_there(tmp_path: Path) -> None:
    """A socket that nobody listens at is told at once, with what to start."""
    config = loads(f"models: {{a: {{image: i, model: m}}}}\ndocker: {{host: 'unix://{tmp_path}/none.sock'}}", {})
    async with real_scene(Path("m.yaml"), config, config_error=None, deep=False) as scene:
        (found,) = await engine.reached(scene)
    assert found.level is Level.PROBLEM and "none.sock" in found.message and "systemctl" in str(found.remedy)


async def test_an_adopted_container_that_is_made_wrong(make: Make) -> None:
    """What compose's usual settings get wrong is read off a real container."""
    name = await make(
        RestartPolicy={"Name": "unless-stopped"}, PortBindings={"8000/tcp": [{"HostIp": "0.0.0.0", "HostPort": ""}]}
    )
    found = await looked(f"a: {{engine: custom, container: {name}, memory: 1GiB}}", adopted.made_right)
    assert [finding.level for finding in found] == [Level.OK, *[Level.WARNING] * 3]
    assert f"the container {name} is there (created)" in found[0].message
    assert "(unless-stopped)" in found[1].message and "published on 0.0.0.0" in found[2].message
    assert "given no GPU" in found[3].message


async def test_an_adopted_container_that_isnt_there() -> None:
    """The command that makes it is the remedy."""
    (found,) = await looked("a: {container: no-such-container-here}", adopted.made_right)
    assert found.level is Level.PROBLEM and "docker compose --profile models create" in str(found.remedy)


async def test_images_here_and_not() -> None:
    """Looked up by name in the real image store."""
    found = await looked(f"a: {{image: '{IMAGE}', model: m}}, b: {{image: no-such-image, model: m}}", images.here)
    assert [finding.level for finding in found] == [Level.OK, Level.NOTE]


async def test_a_container_is_asked_for_its_gpus_and_removed(docker: aiodocker.Docker) -> None:
    """Whatever this machine has, the look ends with an answer and leaves no container behind."""
    (found,) = await looked(f"a: {{image: '{IMAGE}', model: m}}", images.see_gpus, deep=True)
    assert found.message.startswith("a: its container sees ")
    listed = await docker.containers.list(all=True, filters=json.dumps({"label": ["io.modelswap.doctor"]}))
    assert listed == []


async def test_a_container_that_cant_start_is_told_and_removed(docker: aiodocker.Docker) -> None:
    """Docker's own words come back: here there is no such device to give."""
    config = loads("models: {a: {image: i, model: m, devices: [/dev/no-such-device]}}", {})
    side = DockerSide(docker, config, {})
    spec = config.models["a"].model_copy(update={"image": IMAGE})
    status, said = await side.gpus_seen("a", spec, Image("", (), ()), ())
    assert status == 125 and "no-such-device" in said
    listed = await docker.containers.list(all=True, filters=json.dumps({"label": ["io.modelswap.doctor"]}))
    assert listed == []


async def test_a_running_containers_processes_are_known_as_ours(docker: aiodocker.Docker, make: Make) -> None:
    """A holder of device memory is found in its container by its PID on this machine, and told by its name."""
    names = [await make(NetworkMode="none"), await make(NetworkMode="none")]
    pids = []
    for name in names:
        container = await docker.containers.get(name)
        await container.start()
        pids.append(int((await container.show())["State"]["Pid"]))
    config = loads(f"models: {{a: {{container: {names[0]}, memory: 1GiB}}}}", {})
    side = DockerSide(docker, config, {})
    ours, called = await side.ours(), await side.names()
    first, second = (gpu.share_of(Holder(pid, "sleep"), ours, called) for pid in pids)
    assert first.ours and first.what == f"sleep (pid {pids[0]}, container {names[0]})"
    assert not second.ours and second.what == f"sleep (pid {pids[1]}, container {names[1]})"
