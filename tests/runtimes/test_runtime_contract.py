"""The contract of `Runtime`: what every runtime must do, whatever hosts its instances."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelswap.runtimes.base import Exit
from tests.runtimes.conftest import process_host
from tests.runtimes.contract_hosts import ContractHost, OnDocker, OnProcesses
from tests.runtimes.docker_host import docker_host

GRACE = 20.0


@pytest.fixture(params=["procfs", "psutil", pytest.param("docker", marks=pytest.mark.docker)])
async def host(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ContractHost]:
    """Give a host on each runtime."""
    if request.param == "docker":
        async with docker_host(tmp_path) as containers:
            yield OnDocker(containers)
    else:
        async with process_host(request.param, tmp_path / "state") as processes:
            yield OnProcesses(processes)


async def test_an_instance_runs_until_it_is_stopped(host: ContractHost) -> None:
    """An engine that obeys SIGTERM is stopped without force, and is listed for exactly as long as it lives."""
    running = await host.start("obey")
    await host.says(running, "ready")
    assert await host.runtime.instances() == [running]
    assert await host.runtime.stop(running, GRACE) == Exit(-15)
    assert await host.runtime.instances() == []


async def test_an_instance_that_ends_by_itself_tells_how(host: ContractHost) -> None:
    """The exit status of an engine that ends by itself reaches whoever waits, then or later."""
    running = await host.start("exit", 7)
    assert await host.runtime.wait(running) == Exit(7)
    assert await host.runtime.wait(running) == Exit(7)
    assert await host.runtime.stop(running, GRACE) == Exit(7)
    assert await host.runtime.instances() == []


async def test_an_engine_that_ignores_sigterm_is_killed(host: ContractHost) -> None:
    """After its grace, an engine is killed, and its exit says so."""
    running = await host.start("stubborn")
    await host.says(running, "ready")
    assert await host.runtime.stop(running, 0.05) == Exit(-9, killed=True)


async def test_no_grace_kills_at_once(host: ContractHost) -> None:
    """Grace 0 kills an engine that would have obeyed."""
    running = await host.start("obey")
    await host.says(running, "ready")
    assert await host.runtime.stop(running, 0) == Exit(-9, killed=True)


async def test_waiters_and_stoppers_see_the_same_end(host: ContractHost) -> None:
    """Any number of concurrent waits and stops return the same exit."""
    running = await host.start("obey")
    await host.says(running, "ready")
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(host.runtime.wait(running)) for _ in range(3)]
        tasks += [group.create_task(host.runtime.stop(running, GRACE)) for _ in range(3)]
    assert {task.result() for task in tasks} == {Exit(-15)}
    assert await host.runtime.stop(running, 0) == Exit(-15)


async def test_a_second_stop_can_be_harder(host: ContractHost) -> None:
    """A stop without grace cuts short another one's grace."""
    running = await host.start("stubborn")
    await host.says(running, "ready")
    patient = asyncio.create_task(host.runtime.stop(running, 1000))
    assert await host.runtime.stop(running, 0) == Exit(-9, killed=True)
    assert await patient == Exit(-9, killed=True)


async def test_a_cancelled_wait_disturbs_nobody(host: ContractHost) -> None:
    """Cancelling one of two waits leaves the other, and the instance, alone."""
    running = await host.start("obey")
    await host.says(running, "ready")
    stays, goes = (asyncio.create_task(host.runtime.wait(running)) for _ in range(2))
    await asyncio.sleep(0)
    goes.cancel()
    await asyncio.wait([goes])
    assert not stays.done()
    await host.runtime.stop(running, GRACE)
    assert await stays == Exit(-15)


async def test_a_child_that_went_away_is_stopped_with_its_engine(host: ContractHost) -> None:
    """A child in a session of its own that ignores SIGTERM is gone when stop returns."""
    running = await host.start("child-stays")
    await host.says(running, "ready")
    assert await host.runtime.stop(running, GRACE) == Exit(-15)
    assert await host.runtime.sweep(set()) == []


async def test_a_new_runtime_finds_and_stops_what_an_old_one_started(host: ContractHost) -> None:
    """Instances outlive the runtime object that started them, and are known in full to the next one."""
    running = await host.start("child-stays")
    await host.says(running, "ready")
    fresh = await host.renew()
    assert await fresh.instances() == [running]
    await fresh.stop(running, GRACE)
    assert await fresh.instances() == []
    assert await host.runtime.wait(running) == Exit(-15)


async def test_listening_is_told_of_the_instance_itself(host: ContractHost) -> None:
    """An instance listens once its process owns the socket at its address, and no more when it has ended."""
    running = await host.start("listen")
    await host.says(running, "ready")
    assert await host.runtime.listening(running)
    await host.runtime.stop(running, GRACE)
    assert not await host.runtime.listening(running)


async def test_listening_is_told_of_a_child(host: ContractHost) -> None:
    """A child in a session of its own may listen for its instance."""
    running = await host.start("child-listens")
    await host.says(running, "ready")
    assert await host.runtime.listening(running)


@pytest.mark.parametrize("behaviour", ["hold", "child-holds"])
async def test_its_host_memory_is_told(host: ContractHost, behaviour: str) -> None:
    """What an instance holds counts, also in a child with a session of its own; once it has ended it takes none."""
    running = await host.start(behaviour, 64)
    await host.says(running, "ready")
    assert 64 << 20 <= await host.runtime.host_bytes(running) < 128 << 20
    await host.runtime.stop(running, GRACE)
    assert await host.runtime.host_bytes(running) == 0


async def test_an_unknown_program_is_named(host: ContractHost) -> None:
    """A program that isn't there is named, and leaves nothing."""
    assert "no-such-program-anywhere" in await host.explains("no-such-program-anywhere")
    assert await host.runtime.instances() == []


async def test_log_tails_are_by_model_and_instance(host: ContractHost) -> None:
    """The tail is of the model's newest instance if none is named, and empty for a model never started."""
    old = await host.start("say", "old")
    await host.says(old, "ready")
    assert await host.runtime.log_tail(old.model, 10) == ["old", "ready"]
    if not host.side_by_side:
        await host.runtime.stop(old, GRACE)
    new = await host.start("say", "new")
    await host.says(new, "ready")
    assert await host.runtime.log_tail(new.model, 10) == ["new", "ready"]
    assert await host.runtime.log_tail(new.model, 1) == ["ready"]
    if host.side_by_side:
        assert await host.runtime.log_tail(old.model, 10, old.instance) == ["old", "ready"]
    assert await host.runtime.log_tail("another", 10) == []
