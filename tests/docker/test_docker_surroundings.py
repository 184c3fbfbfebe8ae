"""Where we run, found out on the host and inside real containers."""

from __future__ import annotations

import json
import platform
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiodocker
import msgspec
import pytest

import modelswap
from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.surroundings import Mount, NoSuchNetwork, Surroundings, look_around
from modelswap.spec.config import Docker
from tests.docker.scratch import URL, Scratch, scratch

pytestmark = pytest.mark.docker

SOURCES: Final = Path(modelswap.__file__).parents[1]
PACKAGES: Final = Path(aiodocker.__file__).parents[1]
SOCKET: Final = URL.removeprefix("unix://")
LOOK: Final = """
import asyncio, json, sys
import aiodocker, msgspec
from modelswap.runtimes.docker.surroundings import look_around
from modelswap.spec.config import Docker

async def main():
    async with aiodocker.Docker(url="unix:///var/run/docker.sock") as docker:
        found = await look_around(docker, Docker.model_validate(json.loads(sys.argv[1])))
    print(msgspec.json.encode(found).decode())

asyncio.run(main())
"""


@pytest.fixture
async def box() -> AsyncIterator[Scratch]:
    async with scratch() as made:
        yield made


@pytest.fixture
async def python(box: Scratch) -> None:
    """The base image's Python must be able to import our packages."""
    theirs = (await box.run("python", "python3", "-c", "import platform; print(platform.python_version())")).strip()
    if theirs.rpartition(".")[0] != platform.python_version().rpartition(".")[0]:
        pytest.skip(f"the base image has Python {theirs}, the packages here are for {platform.python_version()}")


async def look_inside(
    box: Scratch,
    name: str = "inside",
    config: dict[str, Any] | None = None,
    binds: list[str] | None = None,
    host: dict[str, Any] | None = None,
    env: list[str] | None = None,
    container: str | None = None,
    **body: Any,
) -> Surroundings:
    """Look around inside a container that is made for it; the id that it finds (``container``) is checked."""
    mounted = [f"{SOURCES}:/sources:ro", f"{PACKAGES}:/packages:ro", f"{SOCKET}:/var/run/docker.sock"]
    argv = ("python3", "-c", LOOK, json.dumps(config or {}))
    printed = await box.run(
        name,
        *argv,
        host={"Binds": mounted + (binds or []), **(host or {})},
        Env=["PYTHONPATH=/sources:/packages", "PYTHONDONTWRITEBYTECODE=1", *(env or [])],
        **body,
    )
    found = msgspec.json.decode(printed, type=Surroundings)
    ours = await box.docker.containers.container(f"{box.prefix}-{name}").show()
    assert found.container == (container or ours["Id"])
    return found


async def test_on_the_host_engines_are_met_on_loopback(box: Scratch) -> None:
    """And what Hugging Face's programs use here is what containers are to use."""
    found = await look_around(box.docker, Docker(), {"HOME": "/home/me"}, Path("/dev/null"))
    cache = "modelswap-compile-cache"
    assert found == Surroundings(
        hf_cache="/home/me/.cache/huggingface", compile_cache=cache, gpus=found.gpus, cdi=found.cdi
    )


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"HF_HOME": "/srv/hf/"}, "/srv/hf"),
        ({"HF_HOME": "~/hf"}, "/home/me/hf"),
        ({"XDG_CACHE_HOME": "/cache"}, "/cache/huggingface"),
    ],
)
async def test_the_cache_is_where_hugging_face_would_look(box: Scratch, env: dict[str, str], expected: str) -> None:
    """By the same variables, in the same order."""
    found = await look_around(box.docker, Docker(), {"HOME": "/home/me", **env}, Path("/dev/null"))
    assert found.hf_cache == expected


async def test_the_configs_network_and_cache_go_first(box: Scratch) -> None:
    """A network that isn't there is an error with the names of those that are."""
    network = await box.network("net")
    found = await look_around(box.docker, Docker(network=network, hf_cache="weights"), {}, Path("/dev/null"))
    assert (found.network, found.hf_cache) == (network, "weights")
    with pytest.raises(NoSuchNetwork, match=f"it has .*{network}"):
        await look_around(box.docker, Docker(network=f"{network}-none"), {}, Path("/dev/null"))


async def test_a_host_that_is_called_like_a_container_is_still_the_host(box: Scratch) -> None:
    """Containers may have any name, twelve hexadecimal digits included."""
    made = await box.container("named")
    name = f"{random.getrandbits(48):012x}"
    await api.call(box.docker, "POST", f"containers/{made['Id']}/rename", params={"name": name})
    found = await look_around(box.docker, Docker(), {"HOSTNAME": name}, Path("/dev/null"))
    assert found.container == ""


async def test_a_container_that_does_not_run_is_not_ours(box: Scratch, tmp_path: Path) -> None:
    """As when a checkpoint's or another Docker's files are looked at."""
    stopped = await box.container("stopped", start=False)
    table = tmp_path / "mountinfo"
    table.write_text(f"1 2 3:4 /var/lib/docker/containers/{stopped['Id']}/hostname /etc/hostname rw - ext4 /dev/x rw\n")
    assert (await look_around(box.docker, Docker(), {"HOSTNAME": "x"}, table)).container == ""
    table.write_text(table.read_text().replace(stopped["Id"], "f" * 64))
    assert (await look_around(box.docker, Docker(), {"HOSTNAME": "x"}, table)).container == ""


@pytest.mark.usefixtures("python")
async def test_inside_a_container_its_network_and_its_cache_are_found(box: Scratch) -> None:
    """Under any host name; a volume is known by its name, whatever it is called inside."""
    network, volume = await box.network("net"), await box.volume("weights")
    found = await look_inside(
        box,
        binds=[f"{volume}:/weights"],
        host={"NetworkMode": network},
        env=["HF_HOME=/weights"],
        Hostname="orchestrator",
    )
    assert (found.network, found.networks, found.project) == (network, (network,), "")
    assert found.hf_cache == volume
    assert Mount(volume, "/weights") in found.mounts
    assert Mount(str(SOURCES), "/sources") in found.mounts


async def test_inside_compose_its_project_and_its_default_network_are_found(box: Scratch, tmp_path: Path) -> None:
    """Where there are several networks, the project's default one is where engines are."""
    project = f"{box.prefix}-p"
    networks = [await box.network("a"), await box.network("p_default"), await box.network("z")]
    ours = await box.container("us", host={"NetworkMode": networks[0]}, labels={"com.docker.compose.project": project})
    for network in networks[1:]:
        await api.call(box.docker, "POST", f"networks/{network}/connect", body={"Container": ours["Id"]})
    table = tmp_path / "mountinfo"
    table.write_text(f"1 2 3:4 /var/lib/docker/containers/{ours['Id']}/hosts /etc/hosts rw - ext4 /dev/x rw\n")
    found = await look_around(box.docker, Docker(), {}, table)
    assert (found.container, found.project) == (ours["Id"], project)
    assert (found.network, found.networks) == (f"{project}_default", tuple(sorted(networks)))


@pytest.mark.usefixtures("python")
async def test_inside_on_the_hosts_network_engines_are_met_on_loopback(box: Scratch, tmp_path: Path) -> None:
    """A folder below a mounted one is known by its path on the host; a volume's isn't one that can be mounted."""
    found = await look_inside(
        box, binds=[f"{tmp_path}:/data"], host={"NetworkMode": "host"}, env=["HF_HOME=/data/deep/hf"]
    )
    assert (found.network, found.networks) == ("", ())
    assert found.hf_cache == f"{tmp_path}/deep/hf"


@pytest.mark.usefixtures("python")
async def test_inside_without_a_mounted_cache_there_is_none_to_share(box: Scratch) -> None:
    """Neither is a folder inside a volume one."""
    volume = await box.volume("data")
    assert (await look_inside(box, "plain")).hf_cache == ""
    below = await look_inside(box, "below", binds=[f"{volume}:/data"], env=["HF_HOME=/data/hf"])
    assert below.hf_cache == ""


@pytest.mark.usefixtures("python")
async def test_a_container_that_shares_anothers_network_is_met_there(box: Scratch) -> None:
    """As a sidecar does (network_mode: service:…), which sees the files of the other."""
    network = await box.network("net")
    other = await box.container("other", host={"NetworkMode": network})
    found = await look_inside(box, host={"NetworkMode": f"container:{other['Id']}"}, container=other["Id"])
    assert found.network == network
