"""At which levels somebody else's containers can sleep: by what they were started with."""

from __future__ import annotations

import pytest

from modelswap.engines.registry import engine_for
from modelswap.orchestrator.abilities import learn, sleep_levels
from modelswap.orchestrator.hosting import Hosted
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import Told
from modelswap.spec.config import Model
from tests.orchestrator.fakes import World

FLAG, DEVELOPS = "--enable-sleep-mode", {"VLLM_SERVER_DEV_MODE": "1"}
CAN = Told(("vllm", "serve", "org/m", FLAG), DEVELOPS)


def adopted(world: World, **settings: str) -> Hosted:
    """Return a vLLM container that somebody else made, and that runs."""
    hosted = world.host_running(container="c" * 64)
    hosted.spec = Model.model_validate({"engine": "vllm", "container": "theirs", **settings})
    hosted.engine = engine_for("vllm")
    return hosted


def levels(world: World, hosted: Hosted) -> tuple[int, ...]:
    """Return at which it can sleep, as far as is known."""
    return sleep_levels(world.outside, hosted.definition, hosted.spec, hosted.engine)


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (CAN, (1, 2)),
        (Told((*CAN.command, "--quantization", "awq"), DEVELOPS), (1,)),
        (Told((*CAN.command, "--runner", "pooling"), DEVELOPS), ()),
        (Told(CAN.command, {}), ()),
        (Told(("vllm", "serve", "org/m"), DEVELOPS), ()),
    ],
)
async def test_its_command_and_environment_tell(world: World, told: Told, expected: tuple[int, ...]) -> None:
    """As those of a model that we start; before it ran for the first time nobody knows."""
    hosted = adopted(world)
    world.runtime.commands["a"] = told
    assert levels(world, hosted) == ()
    await learn(world.outside, hosted)
    assert levels(world, hosted) == expected


async def test_what_the_config_says_goes_first(world: World) -> None:
    """``off`` is off; ``on`` is believed, whatever can be seen."""
    world.runtime.commands["a"] = CAN
    for said, expected in (("off", ()), ("on", (1, 2))):
        hosted = adopted(world, sleep=said)
        await learn(world.outside, hosted)
        assert levels(world, hosted) == expected


async def test_it_is_looked_at_anew_at_each_start(world: World) -> None:
    """Compose may have made it anew with another command; what can't be read is not known any more."""
    hosted = adopted(world)
    world.runtime.commands["a"] = CAN
    await learn(world.outside, hosted)
    world.runtime.commands["a"] = Told(("vllm", "serve", "org/m"), {})
    await learn(world.outside, hosted)
    assert levels(world, hosted) == ()
    world.runtime.commands["a"] = CAN
    await learn(world.outside, hosted)
    world.runtime.told_error = ModelswapError("Docker is away")
    await learn(world.outside, hosted)
    assert levels(world, hosted) == ()


async def test_of_ours_only_the_config_tells(world: World) -> None:
    """Nobody else says what they are started with."""
    hosted = world.host_running()
    hosted.spec = Model.model_validate({"engine": "vllm", "model": "org/m", "args": [FLAG], "env": DEVELOPS})
    hosted.engine = engine_for("vllm")
    world.runtime.commands["a"] = Told((), {})
    await learn(world.outside, hosted)
    assert levels(world, hosted) == (1, 2)
