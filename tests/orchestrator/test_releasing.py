"""Whether the device's memory is verified free before the next start."""

from __future__ import annotations

import asyncio

import pytest

from modelswap.core import events
from modelswap.devices.errors import DeviceUnreadable
from modelswap.orchestrator.releasing import verify_released
from modelswap.spec.config import Device, Model
from tests.orchestrator.fakes import World, config, until

GPU = "gpu0"


def model(**settings: object) -> Model:
    """Return a model's config."""
    return config(a=settings).models["a"]


async def test_free_memory_is_released_at_once(world: World) -> None:
    """The engine's target is there."""
    world.engine.needs = 80
    await verify_released(world.outside, GPU, Device(), model(), world.engine)
    assert [event.device for event in world.of(events.Released)] == [GPU]


async def test_a_device_without_readings_is_believed(world: World) -> None:
    """Where nothing can be read the last holder's end is all there is."""
    world.device.reading = None
    await verify_released(world.outside, GPU, Device(), model(), world.engine)
    assert [type(event) for event in world.events] == [events.Released]


async def test_a_model_gone_from_the_config_needs_only_a_settled_device(world: World) -> None:
    """Without a target, free memory must have stopped growing."""
    await verify_released(world.outside, GPU, Device(), None, None)
    assert [type(event) for event in world.events] == [events.Released]


async def test_strict_tells_the_holders_and_watches_until_it_is_free(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ReleaseFailed` names who holds the memory; `Released` comes when it is back after all."""
    monkeypatch.setattr("modelswap.orchestrator.releasing.WATCH_TERM", 0.05)
    monkeypatch.setattr("modelswap.orchestrator.releasing.WATCH_PAUSE", 0.001)
    world.device.hold(60)
    config_ = Device(release_timeout=0.05)
    job = asyncio.create_task(verify_released(world.outside, GPU, config_, model(memory="80B"), world.engine))
    await until(lambda: bool(world.of(events.ReleaseFailed)))
    assert "PID 4121, python" in world.of(events.ReleaseFailed)[0].message
    reads = world.device.reads
    await until(lambda: world.device.reads > reads + 5)
    assert not world.of(events.Released)
    world.device.hold(0)
    await job
    assert [type(event) for event in world.events] == [events.ReleaseFailed, events.Released]


async def test_warn_goes_on(world: World) -> None:
    """After the time limit the swap continues."""
    world.device.hold(60)
    config_ = Device(release_timeout=0.05, on_release_timeout="warn")
    await verify_released(world.outside, GPU, config_, model(memory="80B"), world.engine)
    assert [type(event) for event in world.events] == [events.Released]


async def test_a_model_that_can_never_fit_does_not_hold_up_the_others(world: World) -> None:
    """It is refused at its own start instead."""
    await verify_released(world.outside, GPU, Device(), model(memory="1KiB"), world.engine)
    assert [type(event) for event in world.events] == [events.Released]


@pytest.mark.parametrize("error", [DeviceUnreadable("fell off the bus"), RuntimeError("fell off the bus")])
async def test_a_device_that_stops_answering_is_a_failed_release(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Strict waits until it can be read again."""
    monkeypatch.setattr("modelswap.orchestrator.releasing.WATCH_PAUSE", 0.001)
    world.device.error = error
    job = asyncio.create_task(verify_released(world.outside, GPU, Device(), model(), world.engine))
    await until(lambda: bool(world.of(events.ReleaseFailed)))
    world.device.error = None
    await job
    assert world.of(events.ReleaseFailed)[0].message == "fell off the bus"
    assert world.of(events.Released)


async def test_without_a_target_the_usual_memory_is_waited_for(world: World) -> None:
    """A model that can't say what it needs waits for what was free when the device was last empty."""
    await verify_released(world.outside, GPU, Device(), model(), world.engine)
    world.device.hold(60)
    job = asyncio.create_task(verify_released(world.outside, GPU, Device(), model(), world.engine))
    reads = world.device.reads
    await until(lambda: world.device.reads > reads + 5)
    assert len(world.of(events.Released)) == 1
    world.device.hold(0)
    await job
    assert len(world.of(events.Released)) == 2


async def test_less_than_usual_is_no_failure(world: World) -> None:
    """If somebody else came to stay, a model without a target is tried after the time limit, also when strict."""
    await verify_released(world.outside, GPU, Device(), model(), world.engine)
    world.device.hold(60)
    for _ in range(2):
        await verify_released(world.outside, GPU, Device(release_timeout=0.05), model(), world.engine)
    assert [type(event) for event in world.events] == [events.Released] * 3


async def test_asking_for_less_is_a_remedy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was too much is looked for no more once the config, loaded anew, says less."""
    monkeypatch.setattr("modelswap.orchestrator.releasing.WATCH_TERM", 0.2)
    monkeypatch.setattr("modelswap.orchestrator.releasing.WATCH_PAUSE", 0.001)
    world.device.hold(50)
    config_, wanted = Device(release_timeout=0.02), model(memory="80B")
    job = asyncio.create_task(
        verify_released(world.outside, GPU, config_, wanted, world.engine, current=lambda: wanted)
    )
    await until(lambda: bool(world.of(events.ReleaseFailed)))
    wanted = model(memory="40B")
    await asyncio.wait_for(job, 30)
    assert world.of(events.Released)
