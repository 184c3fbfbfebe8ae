"""An orchestrator that stood still while another one took over its Docker: it must not act there any more."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import structlog

from modelswap.engines.base import Launch, StandbyPlan
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import Known, Running, StartOrder
from modelswap.runtimes.docker.opening import open_runtime
from modelswap.runtimes.docker.owner import OtherOwner
from modelswap.runtimes.docker.runtime import DockerRuntime
from modelswap.spec import config
from modelswap.spec.config import Model
from modelswap.testing.waiting import until
from tests.runtimes.docker_fake import FakeDocker, fake_docker

SPEC = Model(engine="custom", command=["serve"], image="img", port=8000)


class Bench:
    """A runtime over a fake engine, with one engine running; ``lost`` is what it told of having been overruled."""

    def __init__(self, fake: FakeDocker, runtime: DockerRuntime, lost: list[ModelswapError]) -> None:
        self.fake = fake
        self.runtime = runtime
        self.lost = lost
        self.running: Running

    async def order(self, instance: str) -> StartOrder:
        """Return an order for the model."""
        place = await self.runtime.allocate(SPEC)
        launch = Launch((*(place.program or ()), "--now"), {})
        return StartOrder(instance=instance, model="m", definition="d", spec=SPEC, launch=launch, address=place.address)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with contextlib.AsyncExitStack() as stack:
        fake = await stack.enter_async_context(fake_docker(tmp_path / "docker.sock"))
        lost: list[ModelswapError] = []
        opened = open_runtime(
            tmp_path / "state", config.Docker(host=fake.host), gpu=0, port_of=lambda _: 8000, on_lost=lost.append
        )
        runtime = await stack.enter_async_context(opened)
        await runtime.configure({"m": Known(SPEC, "d")})
        bench = Bench(fake, runtime, lost)
        bench.running = await runtime.start(await bench.order("first"))
        yield bench


async def overruled(bench: Bench, rank: int = 7) -> OtherOwner:
    bench.fake.usurp(rank)
    await until(lambda: bench.lost)
    [told] = bench.lost
    assert isinstance(told, OtherOwner)
    return told


@pytest.mark.parametrize("rank", [1, 7], ids=["our very volume", "a higher one"])
async def test_it_is_told_once_who_rules_now(bench: Bench, rank: int) -> None:
    """Enough to find the other one, and what became of our engines."""
    told = await overruled(bench, rank)
    assert "pid 4711 on elsewhere, since 2026-01-01" in str(told) and "run on" in str(told)
    assert list(bench.fake.volumes) == [f"modelswap-owner-{rank}"]


ACTS: list[Callable[[Bench], Awaitable[object]]] = [
    lambda bench: bench.runtime.stop(bench.running, 20.0),
    lambda bench: bench.runtime.sweep(set()),
    lambda bench: bench.runtime.configure({}),
]


@pytest.mark.parametrize("act", ACTS, ids=["stop", "sweep", "configure"])
async def test_it_stops_nothing_any_more(bench: Bench, act: Callable[[Bench], Awaitable[object]]) -> None:
    """What runs may be the other one's by now."""
    await overruled(bench)
    with pytest.raises(OtherOwner, match="pid 4711"):
        await act(bench)
    await bench.runtime.rotate()
    container = bench.fake.only()
    assert container.running and container.signals == []


async def test_it_starts_nothing_any_more(bench: Bench) -> None:
    """Neither an engine, nor one that waits, nor is a container made."""
    bench.fake.die(bench.fake.only(), 0)
    await bench.runtime.wait(bench.running)
    order = await bench.order("second")
    await overruled(bench)
    for act in (bench.runtime.start, bench.runtime.create):
        with pytest.raises(OtherOwner):
            await act(order)
    await bench.runtime.stand_by([StandbyPlan("k", ("python3",), Path(__file__), {}, spec=SPEC)])
    assert bench.runtime.standbys() == []
    assert not bench.fake.only().running


async def test_what_nobody_wants_is_left_to_the_other_one(bench: Bench) -> None:
    """A container of ours that no model is configured with may have been started by whoever rules now."""
    await bench.runtime.stop(bench.running, 20.0)
    await bench.runtime.configure({"m": Known(SPEC, "changed")})
    container = bench.fake.only()
    await overruled(bench)
    with structlog.testing.capture_logs() as logs:
        bench.fake.begin(container)
        assert [one.container for one in await bench.runtime.instances()] == [container.id]
    assert not any("killed" in entry["event"] for entry in logs)


async def test_a_volume_that_was_pruned_is_made_again(bench: Bench) -> None:
    """Nobody has taken our place, so nothing is lost."""
    name = bench.fake.owner()
    token = bench.fake.volumes[name]["Labels"]["io.modelswap.token"]
    bench.fake.prune(name)
    await until(lambda: name in bench.fake.volumes)
    assert bench.fake.volumes[name]["Labels"]["io.modelswap.token"] == token
    assert bench.lost == []
    await bench.runtime.stop(bench.running, 20.0)
