"""What the Docker runtime promises beyond the contract of `Runtime`, on a real Docker Engine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from modelswap.engines.base import Launch
from modelswap.protocol.errors import Code
from modelswap.runtimes.base import Exit, NotPrepared, Running, StartFailed
from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.body import container_name
from modelswap.runtimes.docker.records import Start, Starts
from modelswap.runtimes.ports import Ports
from modelswap.spec import config
from tests.runtimes.docker_host import IMAGE, PORT, PYTHON, DockerHost, adopted, docker_host
from tests.runtimes.saying import until

pytestmark = pytest.mark.docker

GRACE = 20.0


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[DockerHost]:
    async with docker_host(tmp_path) as host:
        yield host


async def answer_of(running: Running) -> bytes:
    """Return what the engine at an instance's address says."""
    said = b""

    async def answered() -> bool:
        nonlocal said
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(running.address.host, running.address.port)
            said = await reader.read()
            writer.close()
        return bool(said)

    await until(answered)
    return said


async def is_running(host: DockerHost, container: str) -> bool:
    return bool((await host.inspect(container))["State"]["Running"])


async def test_a_container_is_used_again(host: DockerHost) -> None:
    """A model's next start is another instance in the same container, and each has its own part of the log."""
    first = await host.start("moment")
    before = await host.says(first, "moment")
    await host.runtime.stop(first, GRACE)
    second = await host.start("moment")
    after = await host.says(second, "moment")
    await host.says(second, "ready")
    assert first.container == second.container and first.born < second.born and before != after
    for instance, moment in ((first.instance, before), (second.instance, after), (None, after)):
        assert await host.runtime.log_tail(second.model, 10, instance) == [f"moment {moment[0]}", "ready"]
    await host.runtime.stop(second, GRACE)
    assert await host.runtime.log_tail(second.model, 1) == ["ready"]
    assert await host.runtime.wait(first) == Exit(-15)


async def test_a_container_made_ahead_is_the_one_that_starts(host: DockerHost) -> None:
    """Creating makes a container that doesn't run; the start takes it, and is reached through a loopback port."""
    order = await host.order_of("answer", f"{PORT},hello")
    await host.runtime.create(order)
    await host.runtime.create(order)
    [made] = await host.containers()
    assert made["State"] == "created"
    running = await host.runtime.start(order)
    assert running.container == made["Id"]
    assert running.address.host == "127.0.0.1"
    assert await answer_of(running) == b"hello"


async def test_a_changed_definition_makes_a_new_container(host: DockerHost) -> None:
    """A container of an old definition that runs is left alone, and removed once it has ended."""
    old = await host.start("obey")
    await host.configure(model=host.managed(ulimits={"nofile": 1000}))
    order = await host.order_of("obey")
    await host.runtime.create(order)
    assert await host.runtime.instances() == [old]
    await host.runtime.stop(old, GRACE)
    await host.runtime.rotate()
    assert await host.containers() == []
    new = await host.runtime.start(order)
    assert new.container != old.container
    assert await host.runtime.log_tail(old.model, 10, old.instance) == []


async def test_another_command_makes_a_new_container(host: DockerHost) -> None:
    """A container that was made from something else is replaced at the next start."""
    old = await host.start("say", "one")
    await host.runtime.stop(old, GRACE)
    new = await host.start("say", "two")
    await host.says(new, "two")
    assert new.container != old.container
    assert [each["Id"] for each in await host.containers()] == [new.container]


async def test_a_model_that_leaves_the_config_takes_its_container_along(host: DockerHost) -> None:
    """Containers of models that are gone are removed, but only ours."""
    await host.make("own", Labels={"com.docker.compose.service": "own"})
    await host.configure(other=host.managed(), own=adopted(container=f"{host.name}-own"))
    await host.runtime.create(await host.order_of("obey"))
    await host.runtime.create(await host.order_of("obey", model="other"))
    host.models = {f"{host.name}/other": host.models[f"{host.name}/other"]}
    await host.configure()
    names = sorted(each["Names"][0] for each in await host.containers())
    assert names == sorted([f"/{host.name}-own", f"/{container_name(f'{host.name}/other')}"])


async def test_a_strangers_container_of_our_name_is_not_touched(host: DockerHost) -> None:
    """A container that has the name of ours but isn't is named, with the way out."""
    body = {"Image": IMAGE, "Cmd": ["sleep", "1"]}
    name = container_name(host.model)
    made = await api.call(host.docker, "POST", "containers/create", params={"name": name}, body=body)
    with pytest.raises(StartFailed, match=f"docker rm -f {name}"):
        await host.start("obey")
    assert await host.inspect(made["Id"])


async def test_a_port_that_was_taken_meanwhile_is_exchanged(host: DockerHost) -> None:
    """If another program listens at the port that a container was to publish, it gets another one."""
    order = await host.order_of("answer", f"{PORT},hello")
    await host.runtime.create(order)
    [made] = await host.containers()
    bindings = (await host.inspect(made["Id"]))["HostConfig"]["PortBindings"]
    port = int(bindings[f"{PORT}/tcp"][0]["HostPort"])
    with socket.create_server(("127.0.0.1", port)):
        running = await host.runtime.start(order)
        assert running.address.port != port
        assert await answer_of(running) == b"hello"


async def test_a_missing_image_has_to_be_prepared(host: DockerHost) -> None:
    """Without its image a model can't be given a place, nor be started."""
    order = await host.order_of("obey")
    missing = order.spec.model_copy(update={"image": f"{host.name}:never"})
    with pytest.raises(NotPrepared):
        await host.runtime.allocate(missing)
    with pytest.raises(NotPrepared):
        await host.runtime.start(msgspec.structs.replace(order, spec=missing))


async def test_no_gpus_is_a_lasting_failure_with_a_remedy(host: DockerHost) -> None:
    """Where Docker can't give GPUs, a model that wants one is broken, and told how to mend it."""
    await host.configure(model=host.managed(gpus="all"))
    with pytest.raises(StartFailed, match="nvidia-container-toolkit") as failed:
        await host.start("obey")
    assert failed.value.code is Code.MODEL_BROKEN
    assert await host.runtime.instances() == []


async def test_an_adopted_container_without_its_program_is_a_lasting_failure(host: DockerHost) -> None:
    """What Docker says of a program that isn't there is passed on."""
    await host.make("own", ["no-such-program"], HostConfig={"Init": False})
    await host.configure(own=adopted(container=f"{host.name}-own"))
    with pytest.raises(StartFailed, match="no-such-program") as failed:
        await host.start(model="own")
    assert failed.value.code is Code.MODEL_BROKEN


async def test_a_removed_container_has_ended_and_is_made_again(host: DockerHost) -> None:
    """``docker rm -f`` ends an instance, and the model's next start has a new container."""
    running = await host.start("obey")
    await api.call(host.docker, "DELETE", f"containers/{running.container}", params={"force": "1"})
    async with asyncio.timeout(5):
        await host.runtime.wait(running)
    again = await host.start("obey")
    assert again.container != running.container
    await host.runtime.stop(running, 0)
    assert await host.runtime.instances() == [again]


async def test_an_end_from_outside_is_noticed_at_once(host: DockerHost) -> None:
    """``docker kill`` is seen well within a second, and isn't taken for our own doing."""
    running = await host.start("obey")
    waiting = asyncio.create_task(host.runtime.wait(running))
    await host.says(running, "ready")
    began = time.monotonic()
    await host.post(running.container, "kill")
    assert await waiting == Exit(-9)
    assert time.monotonic() - began < 1.0


async def test_memory_limits_are_told_apart(host: DockerHost) -> None:
    """An engine that the kernel kills at its container's memory limit says so."""
    await host.make("own", [*PYTHON, "eat"], HostConfig={"Memory": 64_000_000, "MemorySwap": 64_000_000})
    await host.configure(own=adopted(container=f"{host.name}-own"))
    ended = await host.runtime.wait(await host.start(model="own"))
    assert ended.oom and not ended.killed


async def test_a_later_start_is_left_alone(host: DockerHost) -> None:
    """Stopping an instance whose container somebody has restarted since doesn't stop what runs now."""
    running = await host.start("obey")
    await host.post(running.container, "restart")
    await host.runtime.wait(running)
    await host.runtime.stop(running, 0)
    assert await is_running(host, running.container)
    assert not await host.runtime.listening(running)
    [other] = await host.runtime.instances()
    assert other.container == running.container and other.instance != running.instance
    assert host.runtime.foreign(other)


async def test_a_cancelled_start_leaves_nothing(host: DockerHost) -> None:
    """Whoever cancels a start has nothing to stop."""
    order = await host.order_of("obey")
    await host.runtime.create(order)
    for turns in range(12):
        starting = asyncio.create_task(host.runtime.start(order))
        for _ in range(turns):
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert await host.runtime.instances() == []
        [made] = await host.containers()
        assert not await is_running(host, made["Id"])


async def test_its_processes_are_known(host: DockerHost) -> None:
    """A process of a living container is its own, others are not."""
    running = await host.start("obey")
    pid = (await host.inspect(running.container))["State"]["Pid"]
    assert host.runtime.owns(pid)
    assert not host.runtime.owns(1)
    await host.runtime.stop(running, 0)
    assert not host.runtime.owns(pid)


async def test_records_are_kept_small(host: DockerHost) -> None:
    """Of a model's starts only the last is remembered, and of a model that has gone none."""
    folder = host.state_dir / "docker" / "starts"
    instances = []
    for _ in range(3):
        running = await host.start("obey")
        instances.append(running.instance)
        await host.runtime.stop(running, 0)
    await host.runtime.rotate()
    assert [path.stem for path in folder.iterdir()] == instances[-1:]
    host.models = {}
    await host.configure()
    await host.runtime.rotate()
    assert list(folder.iterdir()) == []


# Addresses


async def test_a_reused_address_is_not_the_former_instances(host: DockerHost) -> None:
    """On a network with one address, each instance has it in its turn, and only the one that runs is listening."""
    network = f"{host.name}-narrow"
    ipam = {"Config": [{"Subnet": "10.213.47.0/30", "Gateway": "10.213.47.1"}]}
    await api.call(host.docker, "POST", "networks/create", body={"Name": network, "IPAM": ipam})
    await host.reopen(config.Docker(network=network))
    await host.configure(one=host.managed(network=None), two=host.managed(network=None))
    one = await host.start("answer", f"{PORT},one", model="one")
    assert await answer_of(one) == b"one"
    assert await host.runtime.listening(one)
    await host.runtime.stop(one, GRACE)
    two = await host.start("answer", f"{PORT},two", model="two")
    assert two.address == one.address
    assert await answer_of(two) == b"two"
    assert await host.runtime.listening(two)
    assert not await host.runtime.listening(one)
    assert not (await host.inspect(two.container))["HostConfig"].get("PortBindings")


# Containers that somebody else made


async def test_adopted_containers_may_publish_the_same_port(host: DockerHost) -> None:
    """What one container published is free when the next one starts, however fast that follows."""
    port = Ports(host.state_dir / "port").take()
    published = {"PortBindings": {f"{PORT}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}]}}
    for name in ("one", "two"):
        await host.make(name, [*PYTHON, "answer", f"{PORT},{name}"], HostConfig=published)
    await host.configure(
        one=adopted(container=f"{host.name}-one"),
        two=adopted(container=f"{host.name}-two"),
    )
    for name in ("one", "two") * 3:
        running = await host.start(model=name)
        assert await answer_of(running) == name.encode()
        await host.runtime.stop(running, 0)


@pytest.mark.parametrize("by", ["name", "labels"])
async def test_an_adopted_container_is_started_and_stopped(host: DockerHost, by: str) -> None:
    """An adopted container is found by its name or compose labels, and never removed; Docker doesn't restart it."""
    labels = {"com.docker.compose.project": host.name, "com.docker.compose.service": f"{host.name}-llm"}
    container = await host.make(
        "own", Labels=labels, HostConfig={"RestartPolicy": {"Name": "unless-stopped"}, "PortBindings": {}}
    )
    by_name, by_labels = adopted(container=f"{host.name}-own"), adopted(compose_service=f"{host.name}-llm")
    await host.configure(own=by_name if by == "name" else by_labels)
    assert (await host.inspect(container))["HostConfig"]["RestartPolicy"]["Name"] == "no"
    with pytest.raises(StartFailed, match="can't be reached"):
        await host.start(model="own")
    assert not await is_running(host, container)
    await host.remove_containers()

    anew = await host.make(
        "own",
        [*PYTHON, "answer", f"{PORT},own"],
        Labels=labels,
        HostConfig={"RestartPolicy": {"Name": "always"}},
    )

    async def forbidden() -> bool:
        return bool((await host.inspect(anew))["HostConfig"]["RestartPolicy"]["Name"] == "no")

    await until(forbidden)  # a recreated one, too
    running = await host.start(model="own")
    assert running.container == anew
    assert await answer_of(running) == b"own"
    assert not host.runtime.foreign(running)
    assert await host.runtime.instances() == [running]
    await host.runtime.stop(running, GRACE)
    host.models.pop(f"{host.name}/own")
    await host.configure()
    await host.runtime.rotate()
    assert await host.inspect(anew)


# Starts by somebody else


async def test_a_start_by_somebody_else_appears(host: DockerHost) -> None:
    """A configured model's container that others start is told of within a second, and its end, too."""
    container = await host.make("own")
    await host.configure(own=adopted(container=f"{host.name}-own"))
    appearing = asyncio.create_task(host.runtime.appeared())
    began = time.monotonic()
    await host.post(container, "start")
    running = await appearing
    assert time.monotonic() - began < 1.0 + GRACE * 0.05
    assert running.model == f"{host.name}/own" and running.container == container
    assert host.runtime.foreign(running)
    assert await host.runtime.instances() == [running]
    fresh = await host.open()
    assert await fresh.instances() == [running]
    assert fresh.foreign(running)
    waiting = asyncio.create_task(fresh.wait(running))
    assert await fresh.sweep(set()) == []
    await host.post(container, "stop")
    assert (await waiting).code == -15
    assert await fresh.instances() == []


async def test_our_own_starts_do_not_appear(host: DockerHost) -> None:
    """What we start is no news, nor is what was listed."""
    container = await host.make("own")
    await host.configure(own=adopted(container=f"{host.name}-own"))
    appearing = asyncio.create_task(host.runtime.appeared())
    ours = await host.start("obey")
    await host.post(ours.container, "restart")
    appeared = await appearing
    assert appeared.container == ours.container
    await host.post(container, "start")
    fresh = await host.open()
    listed = {running.container for running in await fresh.instances()}
    assert listed == {container, ours.container}
    silent = asyncio.create_task(fresh.appeared())
    await fresh.rotate()
    assert not silent.done()
    silent.cancel()


async def test_a_container_that_nobody_wants_any_more_is_killed(host: DockerHost) -> None:
    """If somebody starts a container of an old definition, it is killed: it is ours, and nothing we would run."""
    running = await host.start("obey")
    await host.configure(model=host.managed(ulimits={"nofile": 1000}))
    await host.runtime.stop(running, GRACE)
    await host.post(running.container, "start")

    async def ended() -> bool:
        return not await is_running(host, running.container)

    await until(ended)
    assert await host.runtime.instances() == []


async def test_a_start_that_somebody_else_was_faster_with_becomes_ours(host: DockerHost) -> None:
    """If the container runs already when it is to be started, that start is the instance, and the other one is over."""
    first = await host.start("answer", f"{PORT},hello")
    await host.runtime.stop(first, GRACE)
    appearing = asyncio.create_task(host.runtime.appeared())
    await host.post(first.container, "start")
    theirs = await appearing
    waiting = asyncio.create_task(host.runtime.wait(theirs))
    ours = await host.start("answer", f"{PORT},hello")
    assert (ours.container, ours.born) == (theirs.container, theirs.born)
    assert await waiting == Exit(None)
    assert await host.runtime.stop(theirs, 0) == Exit(None)
    assert await host.runtime.instances() == [ours]
    assert not host.runtime.foreign(ours)
    assert await answer_of(ours) == b"hello"


# A new orchestrator


async def test_a_start_is_found_that_was_not_recorded_in_full(host: DockerHost) -> None:
    """If we die between ordering a start and noting that it was done, the next one of us knows whose it is."""
    order = await host.order_of("obey")
    await host.runtime.create(order)
    [made] = await host.containers()
    unfinished = Start(
        instance="unfinished",
        model=order.model,
        definition=order.definition,
        container=made["Id"],
        port=PORT,
        written=time.time(),
    )
    Starts(host.state_dir / "docker" / "starts").write(unfinished)
    fresh = await host.open()
    assert await fresh.instances() == []
    await host.post(made["Id"], "start")
    later = await host.open()
    [found] = await later.instances()
    assert found.instance == "unfinished" and not later.foreign(found)
    assert await later.log_tail(order.model, 10) in ([], ["ready"])
    newest = await host.open()  # the ones before it may not act any more
    assert await newest.instances() == [found]
    assert await newest.sweep({"unfinished"}) == []
    assert len(await newest.sweep(set())) == 1
    assert await newest.wait(found) == Exit(-9, killed=True)


async def test_an_instance_that_ended_meanwhile_tells_how(host: DockerHost) -> None:
    """A new runtime knows how an instance ended while there was none."""
    running = await host.start("exit", 7)
    await host.runtime.wait(running)
    fresh = await host.open()
    assert await fresh.wait(running) == Exit(7)
    assert await fresh.log_tail(running.model, 10) == ["leaving"]


async def test_a_second_start_of_a_running_model_is_refused(host: DockerHost) -> None:
    """A container runs one instance at a time; the one that runs is left alone."""
    running = await host.start("obey")
    with pytest.raises(StartFailed, match="runs already"):
        await host.runtime.start(host.order(Launch((*PYTHON, "obey", ""), {}), (await host.order_of("obey")).address))
    assert await host.runtime.instances() == [running]
