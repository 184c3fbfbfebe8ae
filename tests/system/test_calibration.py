"""Calibrating real processes, and sleepers that outlive their orchestrator."""

from __future__ import annotations

from pathlib import Path

from tests.system.sleepers import rig, sleepable


async def test_calibrating_measures_every_way(tmp_path: Path) -> None:
    """Two cold starts that agree, then each level twice, with a fresh instance each."""
    async with rig(tmp_path) as made:
        rows = {row["mechanism"]: row for row in await made.service.calibrator.calibrate("a")}
        assert set(rows) == {"cold", "stop", "sleep1", "wake1", "sleep2", "wake2"}
        assert rows["cold"]["reference_tokens"] >= 4 and rows["cold"]["count"] == 4
        for level in (1, 2):
            sleep, wake = rows[f"sleep{level}"], rows[f"wake{level}"]
            assert sleep["ok"] is True and sleep["residue_bytes"] > 0 and sleep["host_bytes"] > 0
            assert (wake["count"], sleep["count"]) == (2, 2)
            assert None not in (wake["first_seconds"], wake["steady_seconds"], sleep["steady_seconds"])
        made.assert_sound()
        await made.until(lambda: made.sleep_level("a") in (1, 2), "it will be put to sleep")
        await made.ensure("a")
        await made.ensure("b")
        assert made.state("a") == "asleep"


async def test_calibrating_finds_a_level_that_breaks_the_model(tmp_path: Path) -> None:
    """Garbage after level 2: that one is off, and level 1 is used."""
    models = {"a": sleepable(tmp_path, "--fault", "garbled=2"), "b": sleepable(tmp_path)}
    async with rig(tmp_path, models) as made:
        await made.service.calibrator.calibrate("a")
        assert (made.level("a", 1), made.level("a", 2)) == (True, False)
        await made.until(lambda: made.sleep_level("a") == 1, "it will sleep at level 1")
        made.assert_sound()


async def test_swaps_alone_calibrate(tmp_path: Path) -> None:
    """In the background on first use: after two cold starts it sleeps."""
    async with rig(tmp_path) as made:
        mechanisms = [(await made.ensure(model)).mechanism for model in "ababab"]
        assert mechanisms == ["cold"] * 4 + ["wake"] * 2
        made.assert_sound()


async def test_a_sleeper_outlives_its_orchestrator(tmp_path: Path) -> None:
    """The next one adopts it asleep beside the resident one, knows what it takes, and wakes it."""
    async with rig(tmp_path, sweep=False) as first:
        first.knows("a")
        await first.ensure("a")
        await first.ensure("b")
        pid, taken = first.hosted("a").running, first.hosted("a").host_bytes
        assert pid is not None
    async with rig(tmp_path, anew=False) as second:
        await second.until(lambda: second.state("a") == "asleep" and second.state("b") == "ready", "both are adopted")
        hosted = second.hosted("a")
        assert (hosted.asleep, hosted.host_bytes) == (1, taken) and hosted.residue > 0
        assert (await second.ensure("a")).mechanism == "wake"
        assert second.hosted("a").running == pid
        second.assert_sound()
