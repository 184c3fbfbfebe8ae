"""What can go wrong when a model sleeps and wakes, one test each, on simulated engines in processes of their own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelswap.orchestrator import sleeping
from modelswap.orchestrator.measurements import FAILURES
from tests.system.sleepers import GIB, HELD, Rig, engines, rig, sleepable

pytestmark = pytest.mark.long


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Rig]:
    """Two models that sleep at level 1; ``a`` is resident."""
    async with rig(tmp_path) as made:
        for model in "ab":
            made.knows(model)
        await made.ensure("a")
        yield made


async def asleep_and_back(two: Rig) -> str:
    """Swap to ``b`` and back; returns how ``a`` came in."""
    answer = await two.ensure("b")
    assert answer.code is None, answer.message
    answer = await two.ensure("a")
    assert answer.code is None, answer.message
    return answer.mechanism


async def test_a_model_sleeps_and_wakes(two: Rig) -> None:
    """Without a failure: in the same process, with all that is measured, told and journalled."""
    pid = two.hosted("a").running
    assert (await two.ensure("b")).mechanism == "cold"
    assert two.state("a") == "asleep"
    hosted = two.hosted("a")
    assert hosted.residue == HELD // 20 and hosted.host_bytes > 0
    assert two.service.journal.entries[hosted.instance].asleep == 1
    assert (await two.ensure("a")).mechanism == "wake"
    assert two.hosted("a").running == pid and two.level("a", 1) is True
    assert two.service.journal.entries[hosted.instance].asleep == 0
    last = two.service.history.swaps()[0]
    assert (last["mechanism"], last["out"]) == ("wake", "sleep") and last["phases"]["canary"] > 0
    two.assert_sound()


async def test_sleep_returns_early(two: Rig) -> None:
    """The engine says that it sleeps before its memory is back: the next start waits for it."""
    await two.fault("a", early_sleep=0.5)
    assert await asleep_and_back(two) == "wake"
    two.assert_sound()


async def test_memory_is_released_late(two: Rig) -> None:
    """The device says later than the engine that the memory is free: the next start waits for it."""
    await two.fault("a", late_release=0.5)
    assert await asleep_and_back(two) == "wake"
    two.assert_sound()


async def test_memory_is_never_released(two: Rig) -> None:
    """An engine that keeps its memory asleep is stopped after ``release_timeout``."""
    await two.fault("a", early_sleep=3600.0)
    assert (await two.ensure("b")).code is None
    assert two.state("a") == "absent"
    two.assert_sound()


@pytest.mark.parametrize("fault", [{"sleep": "fail"}, {"sleep": "ignore"}])
async def test_sleep_is_refused(two: Rig, fault: dict[str, str]) -> None:
    """With an error, or with success and nothing done: the engine is stopped, and started anew when it is wanted."""
    await two.fault("a", **fault)
    assert await asleep_and_back(two) == "cold"
    assert two.level("a", 1) is None
    two.assert_sound()


async def test_a_level_that_fails_again_and_again_is_off(two: Rig) -> None:
    """After so many failures in a row it isn't tried any more; the calibration's own wish aside."""
    two.service.chooser.forced.clear()
    for _ in range(FAILURES):
        await two.fault("a", sleep="fail")
        assert await asleep_and_back(two) == "cold"
    assert two.level("a", 1) is False
    await two.until(lambda: two.sleep_level("a") == 2, "the other level is tried")


async def test_the_engine_hangs_in_sleep(two: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its limit it is killed."""
    monkeypatch.setattr(sleeping, "SLEEP_LIMIT", 0.5)
    await two.fault("a", hang="sleep")
    assert await asleep_and_back(two) == "cold"
    two.assert_sound()


@pytest.mark.parametrize("by", ["exit", "kill"])
async def test_the_engine_crashes_in_sleep(two: Rig, by: str) -> None:
    """Its memory is free then, too."""
    await two.fault("a", crash="sleep", by=by)
    assert await asleep_and_back(two) == "cold"
    two.assert_sound()


async def test_a_wake_runs_out_of_memory_once(two: Rig) -> None:
    """Once there is room it is told again, and wakes."""
    await two.ensure("b")
    await two.fault("a", wake="oom", nth=1)
    assert (await two.ensure("a")).mechanism == "wake"
    two.assert_sound()


async def test_a_wake_runs_out_of_memory_twice(two: Rig) -> None:
    """Then it is killed and started anew, for the same request; that says nothing about sleeping."""
    await two.ensure("b")
    await two.fault("a", wake="oom")
    answer = await two.ensure("a")
    assert (answer.code, answer.mechanism) == (None, "cold")
    assert two.level("a", 1) is None
    two.assert_sound()


async def test_the_engine_crashes_in_wake(two: Rig) -> None:
    """It is started anew, for the same request."""
    await two.ensure("b")
    await two.fault("a", crash="wake", by="kill")
    answer = await two.ensure("a")
    assert (answer.code, answer.mechanism) == (None, "cold")
    two.assert_sound()


async def test_the_engine_hangs_in_wake(two: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its limit it is killed and started anew, for the same request."""
    await two.ensure("b")
    monkeypatch.setattr(sleeping, "SLEEP_LIMIT", 0.5)
    await two.fault("a", hang="wake")
    answer = await two.ensure("a")
    assert (answer.code, answer.mechanism) == (None, "cold")
    two.assert_sound()


@pytest.mark.parametrize("level", [1, 2])
async def test_it_talks_garbage_after_waking(two: Rig, level: int) -> None:
    """No request ever gets that: it is killed and started anew, and the level is off until it is calibrated."""
    two.knows("a", level)
    await two.ensure("b")
    await two.fault("a", garbled=level)
    answer = await two.ensure("a")
    assert (answer.code, answer.mechanism) == (None, "cold")
    assert two.level("a", level) is False
    two.service.chooser.forced.clear()
    two.service.chooser.tell()
    other = 3 - level
    await two.until(lambda: two.sleep_level("a") != level, "the level is off")
    await two.service.calibrator.calibrate("a")
    assert (two.level("a", level), two.level("a", other)) == (True, True)
    two.assert_sound()


async def test_it_dies_asleep(two: Rig) -> None:
    """It is noticed at once, and started anew when it is wanted."""
    await two.ensure("b")
    running = two.hosted("a").running
    assert running is not None
    os.kill(running.pid, signal.SIGKILL)
    await two.until(lambda: two.state("a") == "absent", "its death is noticed")
    assert (await two.ensure("a")).mechanism == "cold"
    two.assert_sound()


async def test_a_stranger_holds_memory(tmp_path: Path) -> None:
    """Whoever waits is told who it is; when it has gone, the sleeper wakes."""
    models = {"a": sleepable(tmp_path), "b": sleepable(tmp_path, f"--gpu-bytes={3 * GIB}")}
    async with rig(tmp_path, models, device={"release_timeout": 1.0}) as made:
        for model in "ab":
            made.knows(model)
            await made.ensure(model)
        made.ledger.add_foreign(4 * GIB, pid=4121, name="python")
        answer = await made.ensure("a")
        assert answer.code == "memory_not_released"
        assert "PID 4121, python, 4.0 GiB, not ours" in answer.message
        made.ledger.remove_foreign(pid=4121)
        await made.until(lambda: not made.service.shell.snapshot().devices[0].problem, "the memory is back")
        assert (await made.ensure("a")).mechanism == "wake"
        made.assert_sound()


async def test_sleepers_go_when_the_next_model_needs_what_they_hold(tmp_path: Path) -> None:
    """What a sleeper leaves on the device is counted; if that is what is missing, it is stopped."""
    models = {name: sleepable(tmp_path, "--residue-bytes", str(GIB)) for name in "abcd"}
    async with rig(tmp_path, models) as made:
        for model in "abcd":
            made.knows(model)
        for model in "abc":
            assert (await made.ensure(model)).code is None
        assert (made.state("a"), made.state("b")) == ("asleep", "asleep")  # 1 + 1 + 6 of 8 GiB
        assert (await made.ensure("d")).mechanism == "cold"
        await made.until(lambda: len(engines(tmp_path)) == 3, "one has been given up")
        assert sorted(made.state(model) for model in "abc") == ["absent", "asleep", "asleep"]
        made.assert_sound()


async def test_the_budget_for_host_memory_is_never_exceeded(tmp_path: Path) -> None:
    """With room for two sleepers and five models in rotation, no more than two ever sleep."""
    models = {name: sleepable(tmp_path, "--residue-bytes", "1") for name in "abcde"}
    budget = 48 << 20
    async with rig(tmp_path, models, device={"host_memory": budget}) as made:
        for model in models:
            made.knows(model)
            made.measured.slept(model, made.definition(model), 1, residue=1, host=20 << 20)
        outside, most, wakes = made.service.outside, 0, 0

        async def watch() -> None:
            while True:
                assert sum(one.host_bytes for one in outside.hosted.values()) <= budget
                await asyncio.sleep(0.001)

        watching = asyncio.create_task(watch())
        for _ in range(3):
            for model in models:
                answer = await made.ensure(model)
                assert answer.code is None
                wakes += answer.mechanism == "wake"
                most = max(most, sum(made.state(other) == "asleep" for other in models))
        assert not watching.done()
        watching.cancel()
        assert most == 2 and wakes >= 2
        made.assert_sound()


async def test_hooks_run_around_sleeping_and_waking_too(tmp_path: Path) -> None:
    """Each once, in order; also when the sleep failed and the engine was stopped instead."""
    out = tmp_path / "said"
    say = f"import os; open({str(out)!r}, 'a').write(os.environ['MODELSWAP_HOOK'] + ' ')"
    moments = ("before_load", "after_load", "before_unload", "after_unload")
    hooks = {moment: [{"command": [sys.executable, "-S", "-c", say]}] for moment in moments}
    async with rig(tmp_path, {"a": sleepable(tmp_path, hooks=hooks), "b": sleepable(tmp_path)}) as made:
        for model in "ab":
            made.knows(model)
        await made.ensure("a")
        assert await asleep_and_back(made) == "wake"
        await made.fault("a", sleep="fail")
        assert await asleep_and_back(made) == "cold"
        assert out.read_text().split() == [*moments, *moments, *moments[:2]]
