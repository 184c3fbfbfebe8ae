"""The endpoints around sleeping, pinning and calibrating."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from modelswap.engines.base import CannotSleep, StandbyPlan
from modelswap.orchestrator import proving
from modelswap.orchestrator.measurements import COLD
from tests.orchestrator.conftest import Api
from tests.orchestrator.fakes import Bench, until


def pinned(api: Api) -> set[str]:
    """Return the pinned models."""
    return {view.name for view in api.service.shell.snapshot().models if view.pinned}


async def test_a_model_is_pinned_and_released(api: Api) -> None:
    """By any of its names; without one: what is resident, or every one."""
    status, body = await api.post("/pin", {"model": "first"})
    assert (status, body) == (200, {"model": "a", "pinned": True, "status": "accepted"})
    await until(lambda: pinned(api) == {"a"})
    assert (await api.post("/pin", {"model": "nope"}))[0] == 404
    assert (await api.post("/pin", {"model": "a", "pinned": "no"}))[0] == 400
    await api.post("/pin", {"pinned": False})
    await until(lambda: not pinned(api))


async def test_calibrating_starts_a_model_twice(api: Api, bench: Bench) -> None:
    """One that can't sleep is only started, and put out again each time; the result is kept, shown and told."""
    with api.service.feed.subscribe() as told:
        status, body = await api.post("/calibrate", {"model": "first"})
    assert status == 200 and body["models"] == ["a"]
    measured = body["measurements"]
    assert isinstance(measured, list)
    assert {row["mechanism"]: row["count"] for row in measured} == {"cold": 2, "stop": 2}
    assert not bench.runtime.living
    shown = await api.json("/status")
    assert shown["measurements"] == measured and shown["calibrating"] is None
    assert (await api.json("/models"))["models"][0]["measurements"] == measured
    kinds = [item.kind for item in (told.get_nowait() for _ in range(told.qsize())) if item is not None]
    assert kinds.count("calibration") >= 3 and kinds[-1] == "calibrated"
    status, body = await api.post("/calibrate", {})
    assert (status, body["models"]) == (200, ["a", "b"])


def resident(api: Api) -> str | None:
    """Return what has the device."""
    return next(view.resident for view in api.service.shell.snapshot().devices)


@pytest.mark.parametrize("before", ["a", "b"])
async def test_what_was_resident_before_comes_back(api: Api, before: str) -> None:
    """The calibrated model itself or another one; only once, if several are calibrated."""
    await api.post("/ensure_model", {"model": before})
    assert (await api.post("/calibrate", {"model": "a"}))[0] == 200
    await until(lambda: resident(api) == before)
    assert (await api.post("/calibrate", {}))[0] == 200
    await until(lambda: resident(api) == before)


async def leave_while_it_starts(api: Api, bench: Bench) -> None:
    """Ask for a calibration, and leave while the model starts."""
    bench.runtime.start_gate.clear()
    bench.runtime.starting.clear()
    asking = asyncio.create_task(api.post("/calibrate", {"model": "a"}))
    await until(bench.runtime.starting.is_set)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: api.service.calibrator.progress is None)
    bench.runtime.start_gate.set()


async def test_it_comes_back_after_a_failure_and_when_the_client_leaves(api: Api, bench: Bench) -> None:
    """However the calibration ends."""
    await api.post("/ensure_model", {"model": "b"})
    await leave_while_it_starts(api, bench)
    await until(lambda: resident(api) == "b")


async def test_a_start_from_standby_is_measured_beside_the_cold_ones(api: Api, bench: Bench) -> None:
    """Cold starts are cold though one waits; then it is used once."""
    bench.engine.standby_plan = StandbyPlan("key", ("python",), Path("wait.py"), {})
    bench.runtime.plans = [bench.engine.standby_plan]
    status, body = await api.post("/calibrate", {"model": "a"})
    assert status == 200
    measured = body["measurements"]
    assert isinstance(measured, list)
    assert {row["mechanism"]: row["count"] for row in measured} == {"cold": 2, "standby": 1, "stop": 3}
    await api.post("/ensure_model", {"model": "a"})
    assert bench.runtime.orders[-1].standby is not None


async def test_a_pinned_model_keeps_what_is_known_of_it(api: Api, bench: Bench) -> None:
    """It is refused before anything is forgotten or stopped."""
    await api.post("/ensure_model", {"model": "a"})
    await api.post("/pin", {"model": "a"})
    await until(lambda: pinned(api) == {"a"})
    status, body = await api.post("/calibrate", {"model": "a"})
    assert status == 503 and "pinned" in str(body)
    assert resident(api) == "a" and len(bench.runtime.orders) == 1
    assert (await api.json("/status"))["measurements"]


async def test_a_level_that_fails_when_it_is_calibrated_is_off(
    api: Api, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was tried on purpose and did not do: no swap is spent on trying it again."""
    monkeypatch.setattr(proving, "VERSION_LIMIT", 0.01)  # nobody answers at its address
    bench.engine.levels = (1,)
    bench.engine.greedy_answer = ("the", "quick", "brown", "fox")
    bench.engine.sleep_errors = [CannotSleep("it would rather not")] * 9
    status, body = await api.post("/calibrate", {"model": "a"})
    assert status == 200
    (row,) = [row for row in body["measurements"] if row["mechanism"] == "sleep1"]  # type: ignore[attr-defined]
    assert row["ok"] is False and "rather not" in row["reason"]
    (cold,) = [row for row in body["measurements"] if row["mechanism"] == "cold"]  # type: ignore[attr-defined]
    assert cold["reference"] == "thequickbrownfox" and cold["first_seconds"] is not None


async def test_only_one_is_calibrated_at_a_time(api: Api, bench: Bench) -> None:
    """And a pinned one isn't, since it would not be put out."""
    bench.runtime.start_gate.clear()
    first = asyncio.create_task(api.post("/calibrate", {"model": "a"}))
    await until(bench.runtime.starting.is_set)
    status, body = await api.post("/calibrate", {"model": "b"})
    assert status == 400 and "a is being calibrated" in str(body)
    await api.post("/pin", {"model": "a"})
    bench.runtime.start_gate.set()
    status, body = await first
    assert status == 503 and "pinned" in str(body)
    assert api.service.calibrator.progress is None and not api.service.calibrator.idle


async def test_a_model_that_does_not_start_is_not_calibrated(api: Api, bench: Bench) -> None:
    """The reason comes back, and nothing is left of the attempt."""
    bench.engine.canary_error = TimeoutError()
    status, body = await api.post("/calibrate", {"model": "a"})
    assert status == 503 and "canary" in str(body)
    assert not api.service.chooser.forced and not api.service.calibrator.idle


async def test_a_client_that_leaves_ends_the_calibration(api: Api, bench: Bench) -> None:
    """The model is treated as before."""
    await leave_while_it_starts(api, bench)
    assert not api.service.calibrator.idle


async def test_a_start_measures(api: Api) -> None:
    """Without any calibration, too."""
    await api.post("/ensure_model", {"model": "a"})
    definition = api.service.configured.definitions["a"]
    assert api.service.outside.measurements.seconds("a", definition, COLD) is not None
    shown = await api.json("/status")
    assert set(shown["host_memory"]) == {"budget", "spent", "spare"}
    status, text = await api.get("/metrics")
    assert status == 200
    assert 'modelswap_mechanism_seconds_count{mechanism="cold",model="a"} 1.0' in text
    assert 'modelswap_mechanism_seconds_count{mechanism="wake2",model="b"} 0.0' in text
    assert 'orchestrator_swap_phase_seconds_count{phase="canary"} 1.0' in text
    assert 'orchestrator_swap_phase_seconds_count{phase="queue"} 1.0' in text
    assert 'modelswap_host_memory_bytes{kind="spent"} 0.0' in text and "modelswap_sleepers 0.0" in text
