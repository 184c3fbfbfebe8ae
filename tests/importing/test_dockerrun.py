"""Containers in command lines."""

from __future__ import annotations

import pytest

from modelswap.importing.llamaswap.dockerrun import DockerRun, Existing, parse
from modelswap.importing.service import Port, Volume
from modelswap.importing.words import split


def run(command: str) -> DockerRun:
    """Return what a `docker run` makes."""
    found = parse("m", split(command, "cmd"))
    assert isinstance(found, DockerRun)
    return found


def test_everything_that_a_container_of_ours_can_have() -> None:
    """Options are read long and short, joined and apart, with a space and with an equals sign."""
    made = run(
        "docker run -itd --rm --init --name=x --gpus '\"device=0,2\"' -v /a:/b:ro -v=vol:/c -p5800:8000"
        " -p 127.0.0.1:1:2/tcp -e A=b -ePASSED --env-file f.env --shm-size 16g --ipc=host --ulimit memlock=-1"
        " --ulimit nofile=1:2"
        " --network llm --add-host h=10.0.0.1 --device /dev/kfd --entrypoint /run.sh --pull always -w /w"
        " --stop-timeout 30 --expose 9 --mount type=bind,src=/s,dst=/t,readonly org/image:tag serve --port 8000 -v"
    )
    service = made.service
    assert (service.image, service.command) == ("org/image:tag", ["serve", "--port", "8000", "-v"])
    assert service.gpus == ["0", "2"]
    assert service.volumes == [Volume("/a", "/b", True), Volume("vol", "/c", named=True), Volume("/s", "/t", True)]
    assert service.ports == [Port(8000, "5800"), Port(2, "1", "127.0.0.1")]
    assert service.env == {"A": "b", "PASSED": None}
    assert made.env_files == ["f.env"]
    assert (service.shm_size, service.ipc, service.ulimits) == ("16GiB", "host", {"memlock": -1, "nofile": 2})
    assert (service.network, service.extra_hosts, service.devices) == ("llm", ["h:10.0.0.1"], ["/dev/kfd"])
    assert (service.entrypoint, service.pull, service.folder, service.grace) == (["/run.sh"], "always", "/w", 30)
    assert service.exposed == [9]
    assert service.lost == []


@pytest.mark.parametrize(
    ("option", "gpus"),
    [
        ("--gpus all", "all"),
        ("--gpus=2", 2),
        ("--gpus device=1", ["1"]),
        ("--runtime=nvidia", "all"),
        ("--device nvidia.com/gpu=all", "all"),
        ("--device nvidia.com/gpu=0 --device nvidia.com/gpu=1", ["0", "1"]),
        ("", None),
    ],
)
def test_gpus(option: str, gpus: object) -> None:
    """Docker's and podman's ways of giving GPUs."""
    assert run(f"docker run {option} image").service.gpus == gpus


@pytest.mark.parametrize("option", ["--privileged", "-u 1000", "--cap-add=ALL", "--network host", "-v /data", "-m 8g"])
def test_what_it_cannot_have_is_named(option: str) -> None:
    """An option without a counterpart is in the list of losses, and the image is found all the same."""
    service = run(f"docker run {option} image arg").service
    assert (service.image, service.command) == ("image", ["arg"])
    assert len(service.lost) == 1


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("docker start -a llm", Existing("llm", compose=False)),
        ("podman container start llm", Existing("llm", compose=False)),
        ("docker compose -f /x/compose.yaml up --no-deps llm", Existing("llm", compose=True)),
        ("docker-compose up -t 5 llm", Existing("llm", compose=True)),
        ("docker compose up", None),
        ("docker start", None),
        ("docker ps", None),
        ("docker run --rm", None),
        ("llama-server -m x", None),
        ("", None),
    ],
)
def test_other_command_lines(command: str, expected: Existing | None) -> None:
    """Containers that exist are recognised; what is no container is none."""
    assert parse("m", split(command, "cmd")) == expected
