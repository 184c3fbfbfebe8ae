"""What is remembered of each model's ways in and out."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from modelswap.orchestrator.measurements import COLD, FAILURES, Measurements, agrees, kept_in, sleeping, table, waking
from modelswap.orchestrator.store import Store

LONG = ("the", "quick", "brown", "fox", "jumps", "over")


@pytest.fixture
async def store(tmp_path: Path) -> Store:
    """An open store."""
    made = Store(tmp_path / "db")
    await made.open()
    return made


async def test_everything_is_there_for_the_next_orchestrator(store: Store, tmp_path: Path) -> None:
    """Times, memory and the reference survive in the file."""
    first = Measurements(store)
    first.took("a", "d", COLD, 10.0)
    first.took("a", "d", waking(1), 3.0, first=True)
    first.took("a", "d", waking(1), 1.0)
    first.slept("a", "d", 1, residue=5, host=7)
    first.answered("a", "d", LONG)
    first.answered("a", "d", LONG)
    await store.close()
    again = Store(tmp_path / "db")
    await again.open()
    second = Measurements(again)
    await second.begin()
    assert second.seconds("a", "d", COLD) == 10.0
    wake = second.of("a", "d", waking(1))
    assert (wake.first, wake.steady, wake.count) == (3.0, 1.0, 2)
    assert (second.of("a", "d", sleeping(1)).residue, second.of("a", "d", sleeping(1)).host) == (5, 7)
    assert second.reference("a", "d") == LONG
    assert [row["mechanism"] for row in second.table([("a", "d")])] == ["cold", "sleep1", "wake1"]
    await again.close()


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return what files hold, and when they were written."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


async def test_who_only_looks_leaves_the_database_as_it_is(store: Store, tmp_path: Path) -> None:
    """It is read while its orchestrator runs, and after one was killed: nothing is made, locked or changed."""
    measured = Measurements(store)
    measured.took("a", "d", COLD, 10.0)
    await store.read("select 1")  # after what was sent
    before = contents(tmp_path)
    assert "db-wal" in before
    assert table(kept_in(tmp_path / "db"), [("a", "d")]) == measured.table([("a", "d")])
    assert contents(tmp_path) == before
    await store.close()


def test_a_database_that_isnt_one_tells_nothing(tmp_path: Path) -> None:
    """None there, no database, one without the table, records of another version."""
    assert kept_in(tmp_path / "db") == [] and not list(tmp_path.iterdir())
    (tmp_path / "db").write_text("no database at all, but long enough to be looked at as if it were one")
    assert kept_in(tmp_path / "db") == []
    with contextlib.closing(sqlite3.connect(tmp_path / "other")) as db:
        assert kept_in(tmp_path / "other") == []
        db.executescript("create table measurements (record); insert into measurements values ('{}'), (null)")
    assert kept_in(tmp_path / "other") == []


async def test_the_average_follows_and_a_first_time_does_not_count(store: Store) -> None:
    """A first sleep of 36 s doesn't make sleeping look slow."""
    measured = Measurements(store)
    measured.took("a", "d", sleeping(1), 36.0, first=True)
    assert measured.seconds("a", "d", sleeping(1)) is None
    measured.took("a", "d", sleeping(1), 1.0)
    measured.took("a", "d", sleeping(1), 2.0)
    assert measured.seconds("a", "d", sleeping(1)) == pytest.approx(1.3)
    await store.close()


async def test_the_first_start_of_all_does_not_count_once_there_is_a_second(store: Store) -> None:
    """It fills caches and compiles; until then there is nothing else to go by."""
    measured = Measurements(store)
    measured.took("a", "d", COLD, 300.0)
    assert measured.seconds("a", "d", COLD) == 300.0
    measured.took("a", "d", COLD, 30.0)
    known = measured.of("a", "d", COLD)
    assert (known.first, known.steady, known.count) == (300.0, 30.0, 2)
    measured.took("a", "d", COLD, 40.0)
    assert measured.seconds("a", "d", COLD) == pytest.approx(33.0)
    await store.close()


async def test_another_definition_or_engine_version_is_measured_anew(store: Store) -> None:
    """What was measured of something else is as if it weren't there, and another version forgets all."""
    measured = Measurements(store)
    measured.took("a", "d", COLD, 10.0)
    assert measured.seconds("a", "changed", COLD) is None
    assert measured.table([("a", "changed")]) == []
    measured.versioned("a", "d", "0.32")
    measured.versioned("a", "d", "0.32")
    measured.versioned("a", "d", "")
    assert measured.seconds("a", "d", COLD) == 10.0
    measured.versioned("a", "d", "0.33")
    assert measured.seconds("a", "d", COLD) is None
    assert measured.of("a", "d", COLD).version == "0.33"
    await store.close()


async def test_two_cold_starts_that_agree_make_the_reference(store: Store) -> None:
    """It is what they have in common; a model that answers differently each time has none, and is asked no more."""
    measured = Measurements(store)
    measured.answered("a", "d", LONG)
    assert measured.reference("a", "d") == () and measured.wants_answer("a", "d")
    measured.answered("a", "d", (*LONG[:4], "cat"))
    assert measured.reference("a", "d") == LONG[:4] and not measured.wants_answer("a", "d")
    for number in range(FAILURES + 1):
        measured.answered("b", "d", (str(number), *LONG))
    assert measured.reference("b", "d") == () and not measured.wants_answer("b", "d")
    assert "differently" in measured.of("b", "d", COLD).reason
    measured.answered("c", "d", None)
    measured.answered("c", "d", ("42",))
    measured.answered("c", "d", ("42",))
    assert measured.reference("c", "d") == ("42",)
    await store.close()


async def test_a_level_is_off_when_its_answers_were_wrong_or_it_failed_again_and_again(store: Store) -> None:
    """Single failures are forgiven by a success; being forgotten puts everything on again."""
    changed: list[str] = []
    measured = Measurements(store, changed.append)
    for _ in range(FAILURES - 1):
        measured.failed("a", "d", 1, "refused")
    assert measured.of("a", "d", sleeping(1)).ok is None
    measured.proved("a", "d", 1)
    for _ in range(FAILURES):
        measured.failed("a", "d", 1, "refused")
    assert measured.of("a", "d", sleeping(1)).ok is False
    measured.wrong("a", "d", 2, "gibberish")
    assert measured.of("a", "d", sleeping(2)).ok is False
    measured.forget("a")
    assert measured.of("a", "d", sleeping(1)).ok is None and measured.table([("a", "d")]) == []
    assert set(changed) == {"a"}
    await store.close()


def test_an_answer_agrees_if_it_begins_as_the_reference() -> None:
    """It may go on; it may not be shorter, different, or missing."""
    assert agrees(LONG, LONG[:4])
    assert not agrees(LONG[:3], LONG[:4])
    assert not agrees(("gibberish", *LONG), LONG[:4])
    assert not agrees(None, LONG[:4])
