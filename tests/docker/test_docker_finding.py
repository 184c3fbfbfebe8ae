"""Finding containers that somebody else made, in a real Docker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from modelswap.protocol.errors import Code
from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.compose import compose_of
from modelswap.runtimes.docker.finding import Ambiguous, NoSuchContainer, find_adopted, forbid_restarts
from modelswap.runtimes.docker.reach import address_of, started_at
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import Model
from tests.docker.scratch import Scratch, scratch

pytestmark = pytest.mark.docker

HOST = Surroundings()


@pytest.fixture
async def box() -> AsyncIterator[Scratch]:
    async with scratch() as made:
        yield made


def by_name(name: str) -> Model:
    return Model(model="org/name", container=name)


def by_service(service: str) -> Model:
    return Model(model="org/name", compose_service=service)


def labels(box: Scratch, service: str = "llm", project: str = "p", number: int = 1, **more: str) -> dict[str, str]:
    """Return what Compose 5 labels a service's container with; service and project are this test's alone."""
    ours = {
        "service": f"{box.prefix}-{service}",
        "project": f"{box.prefix}-{project}",
        "container-number": str(number),
        "oneoff": "False",
    }
    return {f"com.docker.compose.{name}": value for name, value in {**ours, **more}.items()}


async def test_a_container_is_found_by_its_name(box: Scratch) -> None:
    """Also a recreated one: it is looked up at every use."""
    first = await box.container("llm", start=False)
    spec = by_name(f"{box.prefix}-llm")
    assert (await find_adopted(box.docker, "m", spec, HOST, None))["Id"] == first["Id"]
    await api.call(box.docker, "DELETE", f"containers/{first['Id']}")
    with pytest.raises(NoSuchContainer, match="docker compose --profile models create") as caught:
        await find_adopted(box.docker, "m", spec, HOST, None)
    assert caught.value.code is Code.MODEL_START_FAILED
    second = await box.container("llm", start=False)
    assert (await find_adopted(box.docker, "m", spec, HOST, None))["Id"] == second["Id"] != first["Id"]


async def test_a_service_is_found_by_composes_labels(box: Scratch) -> None:
    """The only project that has it will do; `docker compose run` makes no service's container."""
    await box.container("run", start=False, labels=labels(box, oneoff="True"))
    await box.container("other", start=False, labels=labels(box, service="other"))
    spec = by_service(f"{box.prefix}-llm")
    with pytest.raises(NoSuchContainer, match=f"create {box.prefix}-llm"):
        await find_adopted(box.docker, "m", spec, HOST, None)
    made = await box.container("llm", start=False, labels=labels(box))
    found = await find_adopted(box.docker, "m", spec, HOST, None)
    assert found["Id"] == made["Id"]
    assert compose_of(found) == (f"{box.prefix}-p", f"{box.prefix}-llm")
    assert compose_of({"Config": {"Labels": None}}) == ("", "")


async def test_of_several_projects_one_must_be_named(box: Scratch) -> None:
    """By the config, else it is our own; the message names them."""
    made = {p: await box.container(p, start=False, labels=labels(box, project=p)) for p in ("one", "two")}
    spec, one, two = by_service(f"{box.prefix}-llm"), f"{box.prefix}-one", f"{box.prefix}-two"
    with pytest.raises(Ambiguous, match=f"{one}, {two}; say which with docker.project"):
        await find_adopted(box.docker, "m", spec, HOST, None)
    ours = Surroundings(project=two)
    assert (await find_adopted(box.docker, "m", spec, HOST, one))["Id"] == made["one"]["Id"]
    assert (await find_adopted(box.docker, "m", spec, ours, None))["Id"] == made["two"]["Id"]
    assert (await find_adopted(box.docker, "m", spec, ours, one))["Id"] == made["one"]["Id"]
    with pytest.raises(NoSuchContainer, match="in project nobodys"):
        await find_adopted(box.docker, "m", spec, ours, "nobodys")


async def test_a_scaled_service_is_ambiguous(box: Scratch) -> None:
    """One model is one container."""
    for number in (1, 2):
        await box.container(f"llm-{number}", start=False, labels=labels(box, number=number))
    with pytest.raises(Ambiguous, match=f"{box.prefix}-llm-1, {box.prefix}-llm-2"):
        await find_adopted(box.docker, "m", by_service(f"{box.prefix}-llm"), HOST, None)


async def test_while_compose_replaces_one_the_running_is_taken_else_the_newer(box: Scratch) -> None:
    """It makes the new one beside the old, under the same number, and then removes the old."""
    spec = by_service(f"{box.prefix}-llm")
    old = await box.container("old", labels=labels(box))
    created = {"old": old["Created"]}
    new = await box.container("new", start=False, labels=labels(box))
    assert (await find_adopted(box.docker, "m", spec, HOST, None))["Id"] == old["Id"]
    await api.call(box.docker, "POST", f"containers/{old['Id']}/kill")
    await api.call(box.docker, "POST", f"containers/{old['Id']}/wait")
    # Lists tell whole seconds only; of two from the same second either will do.
    if new["Created"][:19] != created["old"][:19]:
        assert (await find_adopted(box.docker, "m", spec, HOST, None))["Id"] == new["Id"]
    await api.call(box.docker, "DELETE", f"containers/{old['Id']}")
    assert (await find_adopted(box.docker, "m", spec, HOST, None))["Id"] == new["Id"]


@pytest.mark.parametrize("policy", ["always", "unless-stopped", "on-failure"])
async def test_restarts_are_forbidden_once(box: Scratch, policy: str) -> None:
    """Docker would start the engine behind our back; what is right already is left alone."""
    made = await box.container("llm", start=False, host={"RestartPolicy": {"Name": policy}})
    assert await forbid_restarts(box.docker, made)
    found: dict[str, Any] = await find_adopted(box.docker, "m", by_name(made["Id"]), HOST, None)
    assert found["HostConfig"]["RestartPolicy"]["Name"] == "no"
    assert not await forbid_restarts(box.docker, found)


async def test_addresses_and_times_are_read_from_what_docker_says(box: Scratch) -> None:
    """On a network of their own and through a published port, stopped and started."""
    network = await box.network("net")
    bindings = {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]}
    made = await box.container(
        "llm",
        start=False,
        ExposedPorts={"8000/tcp": {}},
        host={"NetworkMode": network, "PortBindings": bindings},
    )
    assert started_at(made) == 0.0
    await api.call(box.docker, "POST", f"containers/{made['Id']}/start")
    found = await api.inspect(box.docker, made["Id"])
    assert found is not None
    published = address_of(found, HOST, 8000)
    assert published.host == "127.0.0.1" and published.port > 0
    inside = Surroundings(container="c", network=network, networks=(network,))
    assert address_of(found, inside, 8000).host == found["NetworkSettings"]["Networks"][network]["IPAddress"]
    now = (await api.call(box.docker, "GET", "info"))["SystemTime"]
    assert 0 <= started_at({"State": {"StartedAt": now}}) - started_at(found) < 60
