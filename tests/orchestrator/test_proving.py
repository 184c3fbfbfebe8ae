"""Whether what was measured still holds for what is started now."""

from __future__ import annotations

import pytest

from modelswap.engines.base import Address
from modelswap.orchestrator import proving
from modelswap.orchestrator.hosting import Outside
from modelswap.orchestrator.measurements import COLD
from tests.orchestrator.fakes import World


async def start(world: World, version: str, container: str, monkeypatch: pytest.MonkeyPatch) -> float | None:
    """Have somebody else's container prove itself; returns the start time that is known of it then."""

    async def told(_outside: Outside, _address: Address) -> str:
        return version

    monkeypatch.setattr(proving, "_version", told)
    world.engine.levels = (1,)
    world.engine.greedy_answer = ("the", "quick", "brown", "fox")
    hosted = world.host_running(f"a.1.{container}", container=container * 64, command=None)
    hosted.spec = hosted.spec.model_copy(update={"container": "theirs"})
    assert hosted.running is not None
    await proving.prove_cold(world.outside, hosted, hosted.running.address)
    found = world.measurements.seconds("a", "digest", COLD)
    world.measurements.took("a", "digest", COLD, 30.0)
    return found


async def test_somebody_elses_container_is_measured_anew_when_it_is_another_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its image and arguments are in no config of ours; a container that was made anew may have others."""
    assert await start(world, "0.32", "1", monkeypatch) is None
    assert await start(world, "0.32", "1", monkeypatch) == 30.0
    assert world.measurements.reference("a", "digest")
    assert await start(world, "0.32", "2", monkeypatch) is None
    assert await start(world, "0.33", "2", monkeypatch) is None
    assert not world.measurements.reference("a", "digest")
