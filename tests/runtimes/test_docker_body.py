"""What a managed container is made from, and when two such descriptions are the same."""

from __future__ import annotations

import string
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelswap.devices.amdcards import Nodes
from modelswap.engines.base import Address, Launch
from modelswap.engines.registry import engine_for
from modelswap.protocol.errors import Code
from modelswap.runtimes.base import StartFailed, StartOrder
from modelswap.runtimes.docker import body as bodies
from modelswap.runtimes.docker.body import container_name, container_port, create_body, fingerprint
from modelswap.runtimes.docker.images import Image
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import Model

IMAGE = Image("sha256:" + "a" * 64, ("vllm", "serve"), (8000,))
HOST = Surroundings(hf_cache="/home/me/.cache/huggingface", gpus=True)
INSIDE = Surroundings(container="c" * 64, network="stack_default", networks=("stack_default",), hf_cache="stack_hf")
CACHE = "/root/.cache/huggingface"
AMD = (
    Nodes(("/dev/kfd", "/dev/dri/renderD128"), (109,)),
    Nodes(("/dev/kfd", "/dev/dri/renderD129"), (0, 44, 109)),
)
NAMES = st.text(string.ascii_letters + string.digits + "/:._-@ é", min_size=1, max_size=200)


def vllm(**fields: Any) -> Model:
    return Model.model_validate({"model": "org/name", "image": "vllm/vllm-openai:v1", **fields})


def order(spec: Model, definition: str = "digest") -> StartOrder:
    launch = engine_for(spec.engine).launch("mistral", spec, Address("0.0.0.0", 8000), IMAGE.entrypoint)
    return StartOrder(
        instance="i", model="mistral", definition=definition, spec=spec, launch=launch, address=Address("0.0.0.0", 8000)
    )


def made(
    spec: Model,
    around: Surroundings = HOST,
    env: dict[str, str] | None = None,
    published: int | None = 20001,
    amd: tuple[Nodes, ...] = (),
) -> dict[str, Any]:
    return create_body(
        order(spec),
        IMAGE,
        around,
        port=8000,
        published=published,
        gpu=1,
        amd=amd,
        owner="me",
        env=env if env is not None else {},
    )


def variables(body: dict[str, Any]) -> dict[str, str]:
    return dict(each.split("=", 1) for each in body["Env"])


def test_the_program_is_the_entrypoint_and_the_rest_its_arguments() -> None:
    """Nothing of the image's own command is left over, and Docker neither restarts the engine nor leaves zombies."""
    body = made(vllm(args=["--max-model-len", "4096"]))
    assert body["Image"] == "vllm/vllm-openai:v1"
    assert body["Entrypoint"] == ["vllm"]
    assert body["Cmd"][:4] == ["serve", "org/name", "--max-model-len", "4096"]
    assert body["HostConfig"]["Init"] is True
    assert body["HostConfig"]["RestartPolicy"] == {"Name": "no"}
    assert "WorkingDir" not in body
    assert made(vllm(cwd="/srv"))["WorkingDir"] == "/srv"


def test_on_the_host_the_port_is_published_on_loopback_only() -> None:
    """Engines have open admin endpoints: nothing but this machine may reach them."""
    body = made(vllm())
    assert body["HostConfig"]["PortBindings"] == {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "20001"}]}
    assert body["ExposedPorts"] == {"8000/tcp": {}}
    assert "NetworkMode" not in body["HostConfig"]


def test_inside_a_container_nothing_is_published() -> None:
    """There the engine joins our network, unless its config names another."""
    body = made(vllm(), INSIDE, published=None)
    assert "PortBindings" not in body["HostConfig"]
    assert body["HostConfig"]["NetworkMode"] == "stack_default"
    assert made(vllm(network="other"), INSIDE, published=None)["HostConfig"]["NetworkMode"] == "other"


def test_the_hosts_network_has_no_ports_to_publish() -> None:
    """Docker warns about ports of a container on the host's network."""
    body = made(vllm(network="host"))
    assert body["HostConfig"]["NetworkMode"] == "host"
    assert "PortBindings" not in body["HostConfig"]
    assert "ExposedPorts" not in body


def test_a_model_of_the_hub_gets_our_cache_and_our_token() -> None:
    """What was downloaded ahead of time is what the engine finds; its own settings go first."""
    ours = {"HF_TOKEN": "secret", "HF_ENDPOINT": "http://hub", "HF_HOME": "/elsewhere", "HOME": "/root"}
    body = made(vllm(), env=ours)
    assert body["HostConfig"]["Binds"] == [f"/home/me/.cache/huggingface:{CACHE}"]
    assert variables(body) == {"HF_HOME": CACHE, "HF_TOKEN": "secret", "HF_ENDPOINT": "http://hub"}
    assert variables(made(vllm(env={"HF_TOKEN": "theirs"}), env=ours))["HF_TOKEN"] == "theirs"
    assert made(vllm(), INSIDE)["HostConfig"]["Binds"] == [f"stack_hf:{CACHE}"]


def test_a_cache_of_its_own_is_left_alone() -> None:
    """Where the config mounts or names a Hugging Face cache, ours isn't mounted over it."""
    for volume in (f"mine:{CACHE}", f"mine:{CACHE}/hub:ro", "mine:/root/.cache", "/srv/root:/root/"):
        body = made(vllm(volumes=[volume]))
        assert body["HostConfig"]["Binds"] == [volume]
        assert "HF_HOME" not in variables(body)
    body = made(vllm(env={"HF_HOME": "/models/hf"}, volumes=["/srv:/models"]))
    assert body["HostConfig"]["Binds"] == ["/srv:/models"]
    assert variables(body) == {"HF_HOME": "/models/hf"}
    assert made(vllm(volumes=["mine:/root/.cache/vllm"]))["HostConfig"]["Binds"][-1].endswith(CACHE)


def test_who_needs_no_hub_gets_neither_cache_nor_token() -> None:
    """A token goes only to who may need it."""
    ours = {"HF_TOKEN": "secret"}
    local = made(vllm(model="/models/mistral"), env=ours)
    custom = made(Model(engine="custom", command=["serve"], image="thing"), env=ours)
    for body in (local, custom):
        assert body["HostConfig"]["Binds"] == []
        assert "secret" not in str(body)
    assert made(vllm(), Surroundings())["HostConfig"]["Binds"] == []


def test_gpus_are_asked_for_as_the_config_says() -> None:
    """``auto`` is the config's device, and nothing where Docker can't give GPUs or the model needs none."""
    gpu = {"Driver": "", "Capabilities": [["gpu"]]}
    cases: list[tuple[dict[str, Any], Surroundings, list[dict[str, Any]]]] = [
        ({}, HOST, [gpu | {"DeviceIDs": ["1"]}]),
        ({}, Surroundings(), []),
        ({"device": "none"}, HOST, []),
        ({"gpus": "none"}, HOST, []),
        ({"gpus": "all"}, Surroundings(), [gpu | {"Count": -1}]),
        ({"gpus": ["0", "GPU-1234"]}, HOST, [gpu | {"DeviceIDs": ["0", "GPU-1234"]}]),
    ]
    for fields, around, expected in cases:
        assert made(vllm(**fields), around)["HostConfig"]["DeviceRequests"] == expected


def test_gpus_that_docker_knows_by_cdi_only_get_their_qualified_names() -> None:
    """A machine with CDI and without NVIDIA's runtime refuses the usual request."""
    around = Surroundings(gpus=True, cdi=True)

    def asked(**fields: Any) -> Any:
        return made(vllm(**fields), around)["HostConfig"]["DeviceRequests"]

    assert asked() == [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=1"]}]
    assert asked(gpus="all") == [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=all"]}]
    assert asked(gpus=["vendor.com/device=0"]) == [{"Driver": "cdi", "DeviceIDs": ["vendor.com/device=0"]}]


@pytest.mark.parametrize(
    ("fields", "files", "groups"),
    [
        ({}, ["/dev/kfd", "/dev/dri/renderD129"], ["44", "109"]),
        ({"device": "none"}, [], None),
        ({"gpus": "none"}, [], None),
        ({"gpus": "all"}, ["/dev/kfd", "/dev/dri/renderD128", "/dev/dri/renderD129"], ["44", "109"]),
        ({"gpus": ["0"]}, ["/dev/kfd", "/dev/dri/renderD128"], ["109"]),
        # Who names such files has said what it is to see.
        ({"devices": ["/dev/kfd", "/dev/dri"]}, ["/dev/kfd", "/dev/dri"], ["44", "109"]),
        ({"devices": ["/dev/dri/renderD128:/dev/dri/renderD128:rw"]}, ["/dev/dri/renderD128"], ["44", "109"]),
        ({"devices": ["/dev/snd"]}, ["/dev/snd", "/dev/kfd", "/dev/dri/renderD129"], ["44", "109"]),
        ({"devices": ["/dev/dri"], "gpus": ["1"]}, ["/dev/dri", "/dev/kfd"], ["44", "109"]),
        ({"devices": ["/dev/dri"], "gpus": "none"}, ["/dev/dri"], None),
    ],
)
@pytest.mark.parametrize("around", [Surroundings(), HOST, Surroundings(gpus=True, cdi=True)])
def test_amd_gpus_are_given_by_their_device_files(
    fields: dict[str, Any], files: list[str], groups: list[str] | None, around: Surroundings
) -> None:
    """Where the device is AMD's, files and groups are given and no NVIDIA GPU is asked for, whatever Docker has."""
    host = made(vllm(**fields), around, amd=AMD)["HostConfig"]
    assert [each["PathOnHost"] for each in host["Devices"]] == files
    assert host.get("GroupAdd") == groups
    assert host["DeviceRequests"] == []


def test_other_gpus_beside_amds_are_asked_for_by_name() -> None:
    """A UUID is NVIDIA's, a qualified name is whose it says; indices are AMD's."""
    host = made(vllm(gpus=["0", "GPU-1234"]), amd=AMD)["HostConfig"]
    assert host["DeviceRequests"] == [{"Driver": "", "Capabilities": [["gpu"]], "DeviceIDs": ["GPU-1234"]}]
    assert len(host["Devices"]) == 2
    host = made(vllm(gpus=["amd.com/gpu=0"]), Surroundings(), amd=AMD)["HostConfig"]
    assert (host["Devices"], "GroupAdd" in host) == ([], False)
    assert host["DeviceRequests"] == [{"Driver": "cdi", "DeviceIDs": ["amd.com/gpu=0"]}]


@pytest.mark.parametrize(("amd", "words"), [(AMD, "there are 0 to 1"), (AMD[:1], "there is one, index 0")])
def test_an_amd_gpu_that_is_not_there(amd: tuple[Nodes, ...], words: str) -> None:
    """It is an error that says which there are, and not a container that sees fewer."""
    with pytest.raises(StartFailed, match=f"AMD GPU 7, and {words}") as caught:
        made(vllm(gpus=["0", "7"]), amd=amd)
    assert caught.value.code is Code.MODEL_BROKEN


def test_without_an_amd_gpu_nothing_changes() -> None:
    """Containers that were made before have the same fingerprint still."""
    assert "GroupAdd" not in made(vllm())["HostConfig"]


def test_shared_memory_is_enough_for_vllm_unless_told_otherwise() -> None:
    """vLLM's workers need more than Docker's 64 MiB; who shares the host's has no need of it."""

    def host(**fields: Any) -> Any:
        return made(vllm(**fields))["HostConfig"]

    assert host()["ShmSize"] == 8 << 30
    assert host(shm_size="1GiB")["ShmSize"] == 1 << 30
    assert "ShmSize" not in host(ipc="host")
    assert host(ipc="host")["IpcMode"] == "host"
    custom = made(Model(engine="custom", command=["serve"], image="thing"))
    assert "ShmSize" not in custom["HostConfig"]


def test_devices_limits_and_hosts_are_passed_on() -> None:
    """In the words of the Engine API."""
    host = made(
        vllm(
            devices=["/dev/kfd", "/dev/dri:/dev/dri:rw", "/dev/a:/dev/b"],
            ulimits={"stack": 67108864, "memlock": -1},
            extra_hosts=["db:10.0.0.1"],
        )
    )["HostConfig"]
    assert host["Devices"] == [
        {"PathOnHost": "/dev/kfd", "PathInContainer": "/dev/kfd", "CgroupPermissions": "rwm"},
        {"PathOnHost": "/dev/dri", "PathInContainer": "/dev/dri", "CgroupPermissions": "rw"},
        {"PathOnHost": "/dev/a", "PathInContainer": "/dev/b", "CgroupPermissions": "rwm"},
    ]
    assert host["Ulimits"] == [
        {"Name": "memlock", "Soft": -1, "Hard": -1},
        {"Name": "stack", "Soft": 67108864, "Hard": 67108864},
    ]
    assert host["ExtraHosts"] == ["db:10.0.0.1"]


def test_labels_tell_whose_it_is_and_what_from() -> None:
    """A later run finds its own containers by them, and sees whether they are still right."""
    body = made(vllm())
    assert body["Labels"] == {
        "io.modelswap.model": "mistral",
        "io.modelswap.owner": "me",
        "io.modelswap.definition": "digest",
        "io.modelswap.image": IMAGE.id,
        "io.modelswap.body": fingerprint(body),
    }


def test_the_fingerprint_is_of_what_matters() -> None:
    """Who made it, from which config file and on which port is published doesn't count; whether one is does."""
    spec = vllm()
    first = made(spec)
    same = create_body(order(spec, "other"), IMAGE, HOST, port=8000, published=20002, gpu=1, owner="you", env={})
    assert fingerprint(first) == fingerprint(same) == first["Labels"][bodies.BODY]
    moved = msgspec.structs.replace(IMAGE, id="sha256:" + "b" * 64)
    others = [
        create_body(order(spec), moved, HOST, port=8000, published=20001, gpu=1, owner="me", env={}),
        create_body(order(spec), IMAGE, HOST, port=8001, published=20001, gpu=1, owner="me", env={}),
        create_body(order(spec), IMAGE, HOST, port=8000, published=20001, gpu=0, owner="me", env={}),
        made(spec, published=None),
        made(spec, INSIDE),
        made(spec, env={"HF_TOKEN": "new"}),
        made(vllm(args=["--seed", "1"])),
        made(vllm(volumes=["vol:/b"])),
        made(vllm(api_key="key")),
    ]
    digests = [fingerprint(each) for each in (first, *others)]
    assert len(set(digests)) == len(digests)


def test_an_api_key_is_in_the_environment_and_in_no_label_or_argument() -> None:
    """Labels and arguments are shown by ``docker ps`` and ``docker inspect`` to whoever asks."""
    body = made(vllm(api_key="hush"))
    assert "VLLM_API_KEY=hush" in body["Env"]
    assert "hush" not in str(body["Labels"]) + str(body["Cmd"])


def test_an_image_without_entrypoint_is_started_as_the_engine_says() -> None:
    """The command of `custom` is the whole command line."""
    spec = Model(engine="custom", command=["serve", "--port", "{port}"], image="thing")
    launch = Launch(("serve", "--port", "9"), {})
    given = StartOrder(instance="i", model="m", definition="d", spec=spec, launch=launch, address=Address("0.0.0.0", 9))
    body = create_body(given, Image("x", (), ()), HOST, port=9, published=None, gpu=0, owner="me", env={})
    assert (body["Entrypoint"], body["Cmd"]) == (["serve"], ["--port", "9"])


@given(NAMES)
def test_every_model_gets_a_name_that_docker_takes(name: str) -> None:
    """``[a-zA-Z0-9][a-zA-Z0-9_.-]+`` is what Docker wants."""
    allowed = set(string.ascii_letters + string.digits + "_.-")
    assert container_name(name).startswith("modelswap-")
    assert set(container_name(name)) <= allowed


@given(NAMES, NAMES)
def test_different_models_get_different_names(one: str, other: str) -> None:
    """Two models never share a container, however alike their names look once they are made fit for Docker."""
    assert (container_name(one) == container_name(other)) == (one == other)


def test_plain_names_are_kept() -> None:
    """``docker ps -a | grep llm`` finds what one looks for."""
    assert container_name("mistral-llm") == "modelswap-mistral-llm"
    assert container_name("a/b") != container_name("a_b") == "modelswap-a_b"


def test_the_port_is_the_configs_else_the_exposed_else_the_usual_one() -> None:
    """Of several exposed ports the engine's usual one is taken, else the lowest."""
    assert container_port(vllm(port=9000), (8000,), 8000) == 9000
    assert container_port(vllm(), (5000,), 8000) == 5000
    assert container_port(vllm(), (), 8000) == 8000
    assert container_port(vllm(), (9090, 8000), 8000) == 8000
    assert container_port(vllm(), (9090, 7000), 8000) == 7000


def test_sglang_gets_the_cache_and_the_shared_memory_that_vllm_gets() -> None:
    """It loads from the hub and talks between processes in the same ways."""
    spec = Model.model_validate({"engine": "sglang", "model": "org/name", "image": "sglang"})
    body = made(spec, INSIDE)
    assert body["HostConfig"]["Binds"] == [f"stack_hf:{CACHE}"]
    assert body["HostConfig"]["ShmSize"] == made(vllm())["HostConfig"]["ShmSize"]
