"""The doctor on Docker, images, and containers that somebody else made."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from modelswap.cli.doctor import adopted, engine, images, outside
from modelswap.cli.doctor.finding import Finding, Level
from modelswap.cli.doctor.scene import Gpu, ToldElsewhere
from modelswap.devices.amdcards import Nodes
from modelswap.runtimes.docker.client import DockerAway
from modelswap.runtimes.docker.images import Image
from modelswap.runtimes.docker.surroundings import NoSuchNetwork, Surroundings
from modelswap.spec.config import Model
from tests.cli.doctoring import GIB, FakeDocker, config, gpu_of, levels, scene

OK, NOTE, WARNING, PROBLEM = Level.OK, Level.NOTE, Level.WARNING, Level.PROBLEM
ADOPTED = "a: {container: llm-1, model: org/m, memory: 5GiB, concurrency: 8}"
MANAGED = "a: {image: i, model: org/m, volumes: ['c1:/root/.cache/vllm']}"
HERE = Image("sha256:1", ("vllm", "serve"), (8000,))


def away(cause: OSError) -> DockerAway:
    """Return the error of a connection that failed for ``cause``."""
    error = DockerAway("Docker can't be used")
    error.__cause__ = cause
    return error


# Docker


async def test_docker_is_left_alone_where_no_model_needs_it() -> None:
    """A machine without Docker, and models that are processes, is a right one."""
    seen = scene(docker=away(ConnectionRefusedError()))
    assert levels(await engine.reached(seen)) == [NOTE]
    with pytest.raises(ToldElsewhere):
        await engine.gives_gpus(seen)


async def test_docker_that_is_away_is_one_problem() -> None:
    """It is told once, with what to start; checks that need it keep quiet."""
    seen = scene(MANAGED, docker=away(ConnectionRefusedError(111, "Connection refused")))
    (found,) = await engine.reached(seen)
    assert found.level is PROBLEM and "unix:///var/run/docker.sock" in found.message
    assert found.remedy is not None and "systemctl start docker" in found.remedy
    assert "Connection refused" in found.remedy
    for check in (images.here, images.settings, adopted.made_right, engine.gives_gpus):
        with pytest.raises(ToldElsewhere):
            await check(seen)


async def test_a_docker_that_is_mute_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something accepts the connection and says nothing: that ends the check in time, with what to look at."""
    monkeypatch.setattr(outside, "_ANSWER_SECONDS", 0.1)
    gone = asyncio.Event()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()
        writer.close()

    server = await asyncio.start_unix_server(mute, tmp_path / "docker.sock")
    env = {"DOCKER_HOST": f"unix://{tmp_path}/docker.sock"}
    try:
        async with outside.real_scene(tmp_path, config(MANAGED), config_error=None, deep=False, env=env) as seen:
            (found,) = await engine.reached(seen)
    finally:
        gone.set()
        server.close()
    assert found.level is PROBLEM and "Docker did not answer" in str(found.remedy)


async def test_a_socket_that_others_own_says_how_to_be_let_in(tmp_path: Path) -> None:
    """The group for a user, its number for a container."""
    socket = tmp_path / "docker.sock"
    socket.touch()
    seen = scene(MANAGED, docker=away(PermissionError(errno.EACCES, "denied")), env={"DOCKER_HOST": f"unix://{socket}"})
    (found,) = await engine.reached(seen)
    assert found.level is PROBLEM and "may not talk to Docker" in found.message
    assert found.remedy is not None and "usermod -aG docker" in found.remedy
    assert f"DOCKER_GID={socket.stat().st_gid}" in found.remedy
    gone = engine.unreached("tcp://h:1", PermissionError(), forbidden=True)
    assert gone.remedy is not None and "DOCKER_GID" not in gone.remedy


async def test_docker_that_answers() -> None:
    """Its version, API and address, and how engines will be reached."""
    found = await engine.reached(scene(MANAGED))
    assert levels(found) == [OK, OK]
    assert found[0].message == "Docker 28.0 (API 1.48) answers at unix:///var/run/docker.sock"


@pytest.mark.parametrize(
    ("said", "level"),
    [
        ({"Version": "20.10", "ApiVersion": "1.41"}, OK),
        ({"Version": "19.03", "ApiVersion": "1.40"}, WARNING),
        ({"Version": "18", "ApiVersion": "1.39"}, PROBLEM),
        ({"Version": "x"}, WARNING),
        ({"Version": "x", "ApiVersion": "one"}, WARNING),
    ],
)
def test_dockers_version(said: dict[str, str], level: Level) -> None:
    """Too old is a problem; one that doesn't say is odd."""
    assert engine.of_version(said, "here").level is level


def test_what_docker_says_of_itself() -> None:
    """Windows containers and rootless mode matter; nothing else does."""
    assert engine.of_info({"OSType": "linux"}) == []
    found = engine.of_info({"OSType": "windows", "SecurityOptions": ["name=rootless"]})
    assert levels(found) == [PROBLEM, NOTE]


@pytest.mark.parametrize(
    ("around", "words", "level"),
    [
        (Surroundings(), "through published loopback ports", OK),
        (Surroundings(network="n"), "reached on the network n", OK),
        (Surroundings(container="c", network="n"), "in a container: engines are reached on the network n", OK),
        (Surroundings(container="c"), "on no network", PROBLEM),
    ],
)
def test_how_engines_are_reached(around: Surroundings, words: str, level: Level) -> None:
    """On the host and in a container."""
    found = engine.of_surroundings(around)
    assert found.level is level and words in found.message


async def test_a_network_that_isnt_there() -> None:
    """What look_around says is the finding."""
    found = await engine.reached(scene(MANAGED, docker=FakeDocker(surroundings=NoSuchNetwork("no network x"))))
    assert levels(found) == [OK, PROBLEM] and found[1].message == "no network x"


async def test_docker_gives_gpus() -> None:
    """By NVIDIA's runtime or CDI; without, it depends on whether there is a GPU at all."""

    async def judged(around: Surroundings, **more: Any) -> Finding:
        (found,) = await engine.gives_gpus(scene(MANAGED, docker=FakeDocker(surroundings=around), **more))
        return found

    assert "NVIDIA runtime" in (await judged(Surroundings(gpus=True))).message
    assert "CDI" in (await judged(Surroundings(gpus=True, cdi=True))).message
    lacking = await judged(Surroundings())
    assert lacking.level is PROBLEM and "nvidia-ctk runtime configure" in str(lacking.remedy)
    none = gpu_of(free=1)
    nowhere = await judged(Surroundings(), gpu=type(none)("slot", "slot", None, "no driver"))
    assert nowhere.level is WARNING and "gpus: none" in str(nowhere.remedy)
    files = Nodes(("/dev/kfd", "/dev/dri/renderD129"))
    radeon = Gpu(
        "Radeon", "amdgpu", none.reading, amd=(Nodes(("/dev/kfd", "/dev/dri/renderD128")), files), own=files.paths
    )
    given = await judged(Surroundings(), gpu=radeon)
    assert given.level is OK and given.message.endswith("Radeon by its device files: /dev/kfd, /dev/dri/renderD129")


@pytest.mark.parametrize(
    ("given", "wants"),
    [
        ("", True),
        ("gpus: none", False),
        ("gpus: all, device: none", True),
        ("device: none", False),
        ("devices: [/dev/kfd]", False),
        ("gpus: [0]", True),
    ],
)
def test_which_models_want_gpus_of_docker(given: str, wants: bool) -> None:
    """Those that say so, and by default those that take turns on the GPU, unless they bring device files."""
    model = config(f"a: {{image: i, model: m{', ' if given else ''}{given}}}").models["a"]
    assert engine.wants_gpu(model) is wants


# Images


async def test_images_that_are_here_or_not() -> None:
    """Here; to be pulled; never to be pulled; without anything to start."""
    models = (
        "a: {image: here, model: m}, b: {image: missing, model: m}, c: {image: gone, model: m, pull: never},"
        " d: {engine: custom, image: empty}, e: {engine: custom, image: empty, command: [serve]}"
    )
    docker = FakeDocker(images={"here": HERE, "empty": Image("sha256:2", (), ())})
    found = await images.here(scene(models, docker=docker))
    assert levels(found) == [OK, NOTE, PROBLEM, PROBLEM, OK]
    assert found[1].remedy == "pull it ahead of time: modelswap pull b"
    assert "pull: never" in found[2].message and "models.d.command" in str(found[3].remedy)


async def test_what_images_are_given(tmp_path: Path) -> None:
    """Folders that aren't there, compiled code that is lost, shared memory that is too little."""
    models = (
        f"a: {{image: i, model: m, volumes: ['{tmp_path}:/x', '{tmp_path}/none:/y']}},"
        " b: {image: i, model: m, args: [--enforce-eager, -tp, 2], shm_size: 64MiB},"
        " c: {image: i, model: m, volumes: ['v1:/root/.cache'], args: [--tensor-parallel-size, 2]},"
        " d: {image: i, model: m, env: {VLLM_CACHE_ROOT: /v}, volumes: ['v1:/v'], args: [-tp, 2], ipc: host},"
        " e: {engine: sglang, image: i, model: m, args: [--tp, 4], shm_size: 64MiB}"
    )
    found = await images.settings(scene(models))
    assert levels(found) == [WARNING, NOTE, WARNING, WARNING]
    assert found[3].message.startswith("e: 4 workers share 64")
    assert f"a: there is no {tmp_path}/none to mount at /y" in found[0].message
    assert found[1].message.startswith("a: what vLLM compiles") and found[2].message.startswith("b: 2 workers share 64")


@pytest.mark.parametrize(
    ("model", "user", "cache", "remedy"),
    [
        ("", "", "kept", None),
        ("", "root", "kept", None),
        ("", "", "", "drop docker.compile_cache: false"),
        ("", "vllm", "kept", "/srv/vllm-cache:/var/cache/modelswap"),
        ("volumes: ['/srv/vllm:/var/cache/modelswap']", "vllm", "kept", None),
        ("env: {VLLM_CACHE_ROOT: /v}", "", "kept", "vllm-cache:/v"),
        ("env: {VLLM_CACHE_ROOT: /v}, volumes: ['vv:/v']", "vllm", "", None),
    ],
)
async def test_compiled_code_that_is_lost(model: str, user: str, cache: str, remedy: str | None) -> None:
    """It isn't where modelswap keeps it, or the model; each reason has its own remedy."""
    docker = FakeDocker(images={"i": Image("1", (), (), user)}, surroundings=Surroundings(compile_cache=cache))
    found = await images.settings(scene(f"a: {{image: i, model: m, {model}}}", docker=docker))
    told = [each for each in found if "compiles" in each.message]
    assert levels(told) == [NOTE] * (remedy is not None)
    assert all(str(remedy) in str(each.remedy) for each in told)


@pytest.mark.parametrize("more", [{"env": {"DOCKER_HOST": "tcp://h:1"}}, {"docker": "inside"}])
async def test_folders_of_another_machine_are_not_looked_for(more: dict[str, Any]) -> None:
    """Only on Docker's own machine is its folder the one with that name."""
    if more.get("docker"):
        more = {"docker": FakeDocker(surroundings=Surroundings(container="c", network="n"))}
    assert await images.settings(scene("a: {image: i, model: m, volumes: ['/no/such:/root/.cache']}", **more)) == []


async def test_gpus_in_containers_are_looked_at_only_on_request() -> None:
    """Once an image, and only where the image is here."""
    models = (
        "a: {image: i, model: m}, b: {image: i, model: n}, c: {image: j, model: m}, d: {image: i, model: m, gpus: none}"
    )
    docker = FakeDocker(images={"i": HERE})
    with pytest.raises(ToldElsewhere):
        await images.see_gpus(scene(models, docker=docker))
    found = await images.see_gpus(scene(models, docker=docker, deep=True))
    assert levels(found) == [OK, NOTE] and docker.ran == ["a"]
    assert found[0].message == "a: its container sees GPU 0: NVIDIA L4"


@pytest.mark.parametrize(
    ("status", "said", "level"),
    [
        (0, "sh: 1: nvidia-smi: not found\n/dev/nvidia0\n", OK),
        (2, "ls: cannot access '/dev/nvidia[0-9]*'\n", PROBLEM),
        (125, 'could not select device driver "" with capabilities: [[gpu]]', PROBLEM),
        (0, "", PROBLEM),
    ],
)
def test_what_a_container_sees(status: int, said: str, level: Level) -> None:
    """Device files are enough; an error is told in its own words."""
    found = images.of_seen("a", status, said)
    assert found.level is level
    if level is PROBLEM and said:
        assert said.strip() in found.message


async def test_what_a_container_sees_of_amds() -> None:
    """The files that its user may use; without any it is told what that takes."""
    files = Nodes(("/dev/kfd", "/dev/dri/renderD128"))
    radeon = Gpu("Radeon", "amdgpu", gpu_of(free=1).reading, amd=(files,), own=files.paths)
    for said, level in (("/dev/kfd\n/dev/dri/renderD128\nuid=0(root)\n", OK), ("uid=1000 gid=1000\n", PROBLEM)):
        docker = FakeDocker(images={"i": HERE}, gpus=(0, said))
        (found,) = await images.see_gpus(scene(MANAGED, docker=docker, gpu=radeon, deep=True))
        assert found.level is level and docker.asked == [(files,)]
        assert found.message.endswith(
            "sees /dev/kfd; /dev/dri/renderD128" if level is OK else "no GPU (it said: uid=1000 gid=1000)"
        )
        assert level is OK or "models.a.devices" in str(found.remedy)


# Adopted containers


def container(**changed: Any) -> dict[str, Any]:
    """Return how Docker describes a container that is as it should be; ``changed`` replaces parts of it."""
    parts: dict[str, Any] = {
        "cmd": ["--model", "org/m", "--max-num-seqs", "8"],
        "entrypoint": ["vllm", "serve"],
        "exposed": {"8000/tcp": {}},
        "env": ["PATH=/bin"],
        "restart": "no",
        "ports": {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "49153"}]},
        "networks": {"llm_default": {"NetworkID": "n1"}},
        "mounts": [
            {"Type": "volume", "Name": "hf", "Source": "/x", "Destination": "/root/.cache/huggingface"},
            {"Type": "volume", "Name": "vllm", "Source": "/y", "Destination": "/root/.cache/vllm"},
        ],
        "host": {},
    }
    parts.update(changed)
    return {
        "Id": "c" * 64,
        "Name": "/llm-1",
        "State": {"Status": "exited"},
        "Config": {
            "Cmd": parts["cmd"],
            "Entrypoint": parts["entrypoint"],
            "Env": parts["env"],
            "ExposedPorts": parts["exposed"],
        },
        "HostConfig": {
            "RestartPolicy": {"Name": parts["restart"]},
            "PortBindings": parts["ports"],
            "NetworkMode": "llm_default",
            "DeviceRequests": [{"Count": -1}],
            "ShmSize": 64 << 20,
            "IpcMode": "private",
            **parts["host"],
        },
        "Mounts": parts["mounts"],
        "NetworkSettings": {"Networks": parts["networks"]},
    }


def model(text: str = ADOPTED) -> Model:
    """Return the model ``a``."""
    return config(text).models["a"]


def judged(text: str = ADOPTED, around: Surroundings | None = None, **changed: Any) -> list[Finding]:
    """Return what is found besides that the container is there."""
    first, *rest = adopted.of_container("a", model(text), container(**changed), around or Surroundings(), 24 * GIB)
    assert first.level is OK and first.message == "a: the container llm-1 is there (exited)"
    return rest


def test_a_container_as_it_should_be() -> None:
    """Nothing is said about it; on the host and in compose."""
    assert judged() == []
    inside = Surroundings(container="x", network="llm_default", networks=("llm_default",), hf_cache="hf")
    assert judged(around=inside, ports={}) == []
    assert judged(around=Surroundings(container="x", network="other", networks=("n1",)), ports={}) == []


@pytest.mark.parametrize(
    ("changed", "level", "words", "remedy"),
    [
        ({"restart": "unless-stopped"}, WARNING, "by itself (unless-stopped)", 'restart: "no"'),
        (
            {"ports": {"8000/tcp": [{"HostIp": "", "HostPort": "8000"}]}},
            WARNING,
            "published on 0.0.0.0",
            '"127.0.0.1::8000"',
        ),
        ({"ports": {}}, PROBLEM, "port 8000 isn't published", '"127.0.0.1::8000"'),
        ({"cmd": ["org/m", "--port", "9000"]}, PROBLEM, "listens at port 9000", "models.a.port: 9000"),
        ({"host": {"DeviceRequests": None}}, WARNING, "given no GPU", "deploy.resources"),
        ({"cmd": ["org/m", "--max-num-seqs=64"]}, None, "", ""),
        ({"cmd": ["org/other"]}, PROBLEM, "serves its model as org/other", "models.a.model: org/other"),
        ({"cmd": ["x", "--served-model-name", "y", "org/m"]}, None, "", ""),
        ({"cmd": ["org/m", "-tp", "2"]}, PROBLEM, "2 workers share 64 MiB", "ipc: host"),
        ({"cmd": ["org/m", "-tp", "2"], "host": {"IpcMode": "host"}}, None, "", ""),
        ({"cmd": ["org/m", "-tp", "2"], "host": {"ShmSize": 8 << 30}}, None, "", ""),
        ({"host": {"DeviceRequests": [], "Runtime": "nvidia"}}, None, "", ""),
        ({"host": {"NetworkMode": "host"}, "ports": {}}, None, "", ""),
        ({"entrypoint": ["sh", "-c"], "cmd": ["exec vllm serve org/m --port 8000"]}, None, "", ""),
        ({"entrypoint": None, "cmd": ["it's odd ' ''"]}, None, "", ""),
    ],
)
def test_what_is_wrong_with_a_container(changed: dict[str, Any], level: Level | None, words: str, remedy: str) -> None:
    """Each fault gives its own finding, with what to write where."""
    found = judged(**changed)
    if level is None:
        assert found == []
    else:
        (only,) = found
        assert only.level is level and words in only.message and remedy in str(only.remedy)


def test_numbers_that_modelswap_doesnt_know_are_suggested() -> None:
    """What the container's command says of slots and memory is what to write into the config."""
    cmd = ["org/m", "--max-num-seqs", "64", "--gpu-memory-utilization", "0.5"]
    found = judged("a: {container: llm-1, model: org/m}", cmd=cmd)
    assert levels(found) == [NOTE, NOTE]
    assert found[0].remedy == "say models.a.concurrency: 64" and found[1].remedy == "say models.a.memory: 12GiB"


def test_weights_and_compiled_code_outlive_the_container() -> None:
    """Caches that aren't mounted are lost with it; another cache than ours is filled twice."""
    found = judged(mounts=[])
    assert levels(found) == [WARNING, NOTE]
    assert "downloaded again" in found[0].message and "what vLLM compiles" in found[1].message
    (found_one,) = judged(around=Surroundings(hf_cache="/srv/hf"))
    assert found_one.level is NOTE and found_one.remedy is not None and "docker.hf_cache: hf" in found_one.remedy
    eager = ["/models/m", "--enforce-eager", "--served-model-name", "org/m"]
    assert judged(mounts=[], cmd=eager) == []


SGLANG = "a: {engine: sglang, container: llm-1, model: org/m, memory: 5GiB}"
SGLANG_CONTAINER: dict[str, Any] = {
    "entrypoint": ["/opt/nvidia/nvidia_entrypoint.sh"],
    "cmd": ["python3", "-m", "sglang.launch_server", "--model-path", "org/m", "--host", "0.0.0.0"],
    "exposed": {},
    "ports": {"30000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "49153"}]},
}


def test_sglang_is_judged_by_its_own_options() -> None:
    """What it loads and is called, its slots, share and workers, its cache; nothing is said of what vLLM compiles."""
    assert judged(SGLANG, **SGLANG_CONTAINER) == []
    cmd = SGLANG_CONTAINER["cmd"]

    def said(*more: str, text: str = SGLANG, **changed: Any) -> Finding:
        (only,) = judged(text, **{**SGLANG_CONTAINER, "cmd": [*cmd, *more], **changed})
        return only

    assert said("--max-running-requests", "64").remedy == "say models.a.concurrency: 64"
    no_memory = SGLANG.replace(", memory: 5GiB", "")
    assert said("--mem-fraction-static", "0.5", text=no_memory).remedy == "say models.a.memory: 12GiB"
    assert said("--served-model-name", "other").remedy == "say models.a.model: other"
    assert "2 workers share 64 MiB" in said("--tp-size", "2").message
    assert "downloaded again" in said(mounts=[]).message
    assert "listens at port 9000" in said("--port", "9000").message
    # It minds no name.
    assert judged("a: {engine: sglang, container: llm-1, memory: 5GiB}", **SGLANG_CONTAINER) == []
    assert adopted.weights_of(container(**SGLANG_CONTAINER)) == "org/m"


@pytest.mark.parametrize(
    ("env", "mount", "hf_cache", "remedy"),
    [
        (["HF_HUB_CACHE=/models"], {"Type": "bind", "Source": "/srv/m", "Destination": "/models"}, "", None),
        (["HF_HOME=/d/hf"], {"Type": "bind", "Source": "/srv", "Destination": "/d"}, "/srv/hf", None),
        (["XDG_CACHE_HOME=/c"], {"Type": "volume", "Name": "hf", "Destination": "/c/huggingface"}, "hf", None),
        (["HF_HOME=/d/hf"], {"Type": "bind", "Source": "/srv", "Destination": "/d"}, "x", "docker.hf_cache: /srv/hf"),
        (["HF_HOME=/d/hf"], {"Type": "volume", "Name": "v", "Destination": "/d"}, "x", "mount x as its HF_HOME"),
        (["HF_HUB_CACHE=/m"], {"Type": "bind", "Source": "/srv/m", "Destination": "/m"}, "x", "mount x as its HF_HOME"),
    ],
)
def test_a_cache_is_found_where_the_container_has_it(
    env: list[str], mount: dict[str, Any], hf_cache: str, remedy: str | None
) -> None:
    """By every variable that moves it, in a part of what is mounted, too; if it isn't ours, how it becomes so."""
    around = Surroundings(hf_cache=hf_cache)
    eager = ["org/m", "--enforce-eager"]
    found = judged(around=around, env=env, mounts=[mount], cmd=eager)
    if remedy is None:
        assert found == []
    else:
        (only,) = found
        assert only.level is NOTE and remedy in str(only.remedy)


def test_a_container_on_other_networks_than_ours() -> None:
    """In compose, the network must be shared."""
    inside = Surroundings(container="x", network="ours", networks=("ours",))
    (found,) = judged(around=inside)
    assert found.level is PROBLEM and "it is on llm_default" in found.message and "ours" in str(found.remedy)
    (found,) = judged(around=inside, networks={})
    assert "it is on no network" in found.message
    (found,) = judged(around=inside, host={"NetworkMode": "host"})
    assert found.level is PROBLEM and "network_mode: host" in str(found.remedy)


def test_other_servers_are_judged_by_what_is_known_of_them() -> None:
    """llama.cpp and custom servers have other ports, and no options that we read."""
    assert (
        judged("a: {engine: llamacpp, container: llm-1, memory: 1GiB, port: 8000}", cmd=["-m", "/x"], mounts=[]) == []
    )
    (guess,) = judged("a: {engine: custom, container: llm-1}", exposed={}, cmd=[])
    assert guess.level is WARNING and "port 8000 is a guess" in guess.message
    assert judged("a: {engine: custom, container: llm-1}", exposed={"53/udp": {}, "8000": {}}, cmd=[]) == []


async def test_a_container_that_isnt_there() -> None:
    """It is a problem with the command that makes it; the others are judged all the same."""
    docker = FakeDocker(containers={"a": container()})
    found = await adopted.made_right(scene(ADOPTED + ", b: {container: llm-2, memory: 1GiB}", docker=docker))
    assert levels(found) == [OK, PROBLEM]
    assert (found[1].message, found[1].remedy) == ("b: there is no container x", "make it")


async def test_no_adopted_models_no_findings() -> None:
    """Nothing is asked then."""
    with pytest.raises(ToldElsewhere):
        await adopted.made_right(scene(MANAGED))


def test_what_a_container_loads_is_read_from_its_command() -> None:
    """As an option, after ``serve``, or not at all."""
    assert adopted.weights_of(container()) == "org/m"
    assert adopted.weights_of(container(cmd=["org/n", "--port", "1"])) == "org/n"
    assert adopted.weights_of(container(entrypoint=["x"], cmd=[])) is None
    assert adopted.weights_of(container(cmd=["--port", "1"])) is None
