"""How models are made ready ahead of time: image, weights, container, and every way in which that fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from modelswap.core import effects, events
from modelswap.orchestrator.hosting import Preparing
from modelswap.orchestrator.preparing import NoWeights, needed, prepare
from modelswap.orchestrator.service import Service
from modelswap.orchestrator.tasks import cancel
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.base import NotPrepared, Report
from modelswap.spec.config import Model
from tests.orchestrator.fakes import Bench, World, config, until

MANAGED = {"command": None, "image": "engine:1"}
ADOPTED = {"command": None, "container": "llm"}


class FakeWeights(NoWeights):
    """Weights for every model, which come when ``gate`` is open."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.cancelled = 0

    def wanted(self, spec: Model) -> bool:
        """See `Weights`."""
        return True

    async def fetch(self, name: str, spec: Model, report: Report) -> None:
        """See `Weights`."""
        self.fetched.append(name)
        report("weights", 0.25)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error

    async def size(self, name: str, spec: Model) -> int | None:
        """See `Weights`."""
        return 1000

    async def files(self, name: str, spec: Model) -> list[Path]:
        """See `Weights`."""
        return []


class Job:
    """One preparing of model ``a``, and how it ended."""

    def __init__(self, world: World, weights: FakeWeights | None = None, **settings: Any) -> None:
        self.world = world
        self.weights = weights
        self.spec = config(a={**MANAGED, **settings}).models["a"]
        self.preparing = Preparing("a", "digest", world.outside.clock())
        world.outside.preparing["a"] = self.preparing
        self.ended: list[tuple[bool, float]] = []

    async def run(self, before: asyncio.Task[None] | None = None) -> None:
        """Carry it out."""
        await prepare(
            self.world.outside,
            self.preparing,
            self.spec,
            self.world.engine,
            self.weights or NoWeights(),
            before=before,
            ended=lambda well, seconds: self.ended.append((well, seconds)),
        )


async def test_image_then_weights_then_container(world: World) -> None:
    """Each once, in this order; then it is `Prepared`, and nothing of it is left under way."""
    weights = FakeWeights()
    weights.gate.clear()
    job = Job(world, weights)
    running = asyncio.create_task(job.run())
    await until(lambda: bool(weights.fetched))
    assert world.runtime.fetched == ["a"] and world.runtime.created == []
    weights.gate.set()
    await running
    (order,) = world.runtime.created
    assert (order.model, order.definition, order.spec) == ("a", "digest", job.spec)
    (prepared,) = world.of(events.Prepared)
    assert (prepared.model, prepared.definition) == ("a", "digest")
    assert world.outside.preparing == {} and job.ended[0][0] and job.ended[0][1] >= 0
    assert world.runtime.orders == [] and not world.of(events.PrepareFailed)


async def test_a_process_needs_no_container(world: World) -> None:
    """Only its weights are fetched, and it takes no port."""
    job = Job(world, FakeWeights(), image=None, command=["serve"])
    await job.run()
    assert world.of(events.Prepared) and world.runtime.created == []


async def test_an_adopted_containers_command_is_not_ours_to_make(world: World) -> None:
    """An engine that could not be launched here is no reason not to find its container."""
    world.engine.launch_error = ModelswapError("no such program")
    await Job(world, image=None, container="llm").run()
    assert world.of(events.Prepared) and len(world.runtime.created) == 1


@pytest.mark.parametrize("where", ["image", "weights", "launch", "container"])
@pytest.mark.parametrize("code", [Code.MODEL_START_FAILED, Code.MODEL_BROKEN])
async def test_failures_are_told_with_their_code(world: World, where: str, code: Code) -> None:
    """A missing image or a full disk is told as what it is; a broken model is permanent."""
    error = ModelswapError("no such image; pull it", code=code)
    weights = FakeWeights()
    if where == "image":
        world.runtime.fetch_error = error
    elif where == "weights":
        weights.error = error
    elif where == "launch":
        world.engine.launch_error = error
    else:
        world.runtime.create_error = error
    job = Job(world, weights)
    await job.run()
    (failed,) = world.of(events.PrepareFailed)
    assert failed.message == "a can't be made ready: no such image; pull it"
    assert (failed.code, failed.permanent) == (code, code is Code.MODEL_BROKEN)
    assert (failed.model, failed.definition) == ("a", "digest")
    assert not world.of(events.Prepared) and [well for well, _ in job.ended] == [False]
    assert world.outside.preparing == {}


async def test_an_image_that_is_gone_again_is_a_failure_like_others(world: World) -> None:
    """What was fetched just now and is missing already would be missing the next time."""
    world.runtime.create_error = NotPrepared("the image has been removed")
    await Job(world).run()
    assert "the image has been removed" in world.of(events.PrepareFailed)[0].message


async def test_a_bug_is_reported_and_raised(world: World) -> None:
    """The scheduler hears of it, and the task's owner, too."""
    world.runtime.create_error = RuntimeError("unforeseen")
    with pytest.raises(RuntimeError, match="unforeseen"):
        await Job(world).run()
    (failed,) = world.of(events.PrepareFailed)
    assert failed.code is Code.INTERNAL and "unforeseen" in failed.message
    assert world.outside.preparing == {}


async def test_progress_is_told_at_most_four_times_a_second_and_the_last_of_it_in_any_case(world: World) -> None:
    """A pull reports every layer's every chunk; the first and the newest news matter."""
    world.runtime.fetch_reports = [("pulling", step / 1000) for step in range(1000)]
    world.runtime.fetch_gate.clear()
    loop = asyncio.get_running_loop()
    began = loop.time()
    job = Job(world)
    running = asyncio.create_task(job.run())
    await until(lambda: bool(world.of(events.PrepareStage)))
    assert (job.preparing.stage, job.preparing.fraction) == ("pulling", 0.999)
    world.runtime.fetch_gate.set()
    await running
    told = world.of(events.PrepareStage)
    assert len(told) <= 1 + (loop.time() - began) / 0.25
    assert (told[0].stage, told[0].fraction) == ("pulling", 0.999)


async def test_news_that_came_too_soon_are_told_a_little_later(world: World) -> None:
    """What is left untold is no more than a quarter of a second old; the same news is told once."""
    weights = FakeWeights()
    weights.gate.clear()
    job = Job(world, weights)
    world.runtime.fetch_gate.clear()
    running = asyncio.create_task(job.run())
    await until(lambda: bool(world.of(events.PrepareStage)))
    world.runtime.fetch_gate.set()
    await until(lambda: len(world.of(events.PrepareStage)) == 2)
    assert [told.stage for told in world.of(events.PrepareStage)] == ["pulling", "weights"]
    first, second = world.of(events.PrepareStage)
    assert second.at - first.at >= 0.2
    weights.gate.set()
    await running


async def test_cancelling_it_reports_nothing(world: World) -> None:
    """An orchestrator that ends leaves nothing behind: what was fetched is kept by whoever fetched it."""
    weights = FakeWeights()
    weights.gate.clear()
    running = asyncio.create_task(Job(world, weights).run())
    await until(lambda: bool(weights.fetched))
    await cancel(running)
    assert weights.cancelled == 1 and world.outside.preparing == {}
    assert not world.of(events.PrepareFailed) and not world.of(events.Prepared)


async def test_an_earlier_definitions_preparing_is_given_up_first(world: World) -> None:
    """Both would make the same container."""
    weights = FakeWeights()
    weights.gate.clear()
    old = Job(world, weights)
    before = asyncio.create_task(old.run())
    await until(lambda: bool(weights.fetched))
    new = Job(world)
    await new.run(before)
    assert before.cancelled() and weights.cancelled == 1
    assert len(world.of(events.Prepared)) == 1 and old.ended == [] and world.outside.preparing == {}


@pytest.mark.parametrize(
    ("settings", "weights", "wanted"),
    [({}, None, False), ({}, FakeWeights, True), (MANAGED, None, True), (ADOPTED, None, True)],
)
def test_what_has_to_be_made_ready(settings: dict[str, Any], weights: type[FakeWeights] | None, wanted: bool) -> None:
    """Containers in any case, processes if their weights are for us to download."""
    spec = config(a=settings).models["a"]
    assert needed(spec, weights() if weights is not None else NoWeights()) is wanted


async def ensure(service: Service, model: str) -> effects.Answer:
    """Have a model made resident."""
    number, answer = service.answers.expect()
    service.post(events.Ensure(at=service.clock(), request=number, model=model))
    return await answer


def managed(**settings: Any) -> dict[str, Any]:
    """Return a model in a container that we make."""
    return {**MANAGED, **settings}


async def test_nobody_is_put_out_for_a_model_that_is_not_ready_to_start(bench: Bench) -> None:
    """The resident model serves on while the other's image comes; then there is one swap, without that time in it."""
    bench.config = config(a=managed(), b={})
    bench.runtime.fetch_gate.clear()
    async with bench.running() as service:
        await ensure(service, "b")
        with service.feed.subscribe() as feed:
            asking = asyncio.create_task(ensure(service, "a"))
            await until(lambda: bench.runtime.fetched == ["a"])
            assert len(bench.runtime.living) == 1 and not service.shell.snapshot().swaps
            (preparing,) = service.outside.preparing.values()
            assert (preparing.stage, preparing.fraction) == ("pulling", 0.5)
            bench.runtime.fetch_gate.set()
            assert (await asking).mechanism == "cold"
            kinds = [feed.get_nowait() for _ in range(feed.qsize())]
        assert [order.model for order in bench.runtime.orders] == ["b", "a"]
        assert [order.model for order in bench.runtime.created] == ["a"]
        (said,) = [item.data for item in kinds if item is not None and item.kind == "prepare"]
        assert b'"outcome":"ok"' in said
        labels = {"model": "a", "outcome": "ok"}
        assert service.metrics.registry.get_sample_value("modelswap_prepare_seconds_count", labels) == 1


async def test_what_turns_out_to_be_missing_is_made_ready_again_for_the_same_waiters(bench: Bench) -> None:
    """Somebody has removed the container between its making and its start."""
    bench.config = config(a=managed(), b={})
    async with bench.running() as service:
        bench.runtime.start_error = NotPrepared("its container has been removed")
        asking = asyncio.create_task(ensure(service, "a"))
        await until(lambda: len(bench.runtime.created) == 2)
        bench.runtime.start_error = None
        assert (await asking).code is None


async def test_a_failure_refuses_whoever_waits(bench: Bench) -> None:
    """With the reason and the code, and it is counted."""
    bench.config = config(a=managed(), b={})
    bench.runtime.fetch_error = ModelswapError("there is no image engine:1; pull it", code=Code.MODEL_BROKEN)
    async with bench.running() as service:
        answer = await ensure(service, "a")
        assert answer.code is Code.MODEL_BROKEN and "there is no image engine:1" in answer.message
        labels = {"model": "a", "outcome": "failed"}
        assert service.metrics.registry.get_sample_value("modelswap_prepare_seconds_count", labels) == 1


async def test_a_reload_gives_up_what_is_made_ready_for_an_earlier_definition(bench: Bench) -> None:
    """And whoever waits gets the new one's."""
    bench.config = config(a=managed(), b={})
    bench.runtime.fetch_gate.clear()
    async with bench.running() as service:
        asking = asyncio.create_task(ensure(service, "a"))
        await until(lambda: bench.runtime.fetched == ["a"])
        bench.config = config(a=managed(image="engine:2"), b={})
        await service.reload()
        await until(lambda: bench.runtime.fetched == ["a", "a"])
        bench.runtime.fetch_gate.set()
        assert (await asking).code is None
        assert [order.spec.image for order in bench.runtime.created] == ["engine:2"]


async def test_a_second_order_to_prepare_changes_nothing(bench: Bench) -> None:
    """One at a time per model; one that is given up just now doesn't count."""
    bench.config = config(a=managed(), b={})
    bench.runtime.fetch_gate.clear()
    async with bench.running() as service:
        asking = asyncio.create_task(ensure(service, "a"))
        await until(lambda: bench.runtime.fetched == ["a"])
        effect = effects.Prepare(model="a", definition=service.configured.definitions["a"])
        service._carrier.carry(effect)
        service._carrier.carry(effects.Prepare(model="a", definition="older"))
        first = service.outside.preparing["a"]
        assert first.job is not None
        first.job.cancel()
        service._carrier.carry(effect)
        assert service.outside.preparing["a"] is not first
        await until(lambda: bench.runtime.fetched == ["a", "a"])
        bench.runtime.fetch_gate.set()
        assert (await asking).code is None and len(bench.runtime.created) == 1


async def test_an_orchestrator_that_ends_gives_up_what_it_prepares(bench: Bench) -> None:
    """The next one takes it up again."""
    bench.config = config(a=managed(), b={})
    bench.runtime.fetch_gate.clear()
    async with bench.running() as service:
        asking = asyncio.create_task(ensure(service, "a"))
        await until(lambda: bench.runtime.fetched == ["a"])
    asking.cancel()
    assert service.outside.preparing == {} and service.tasks.failures == 0
