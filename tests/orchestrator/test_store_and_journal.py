"""What the journal keeps, and that nothing which happens to its file is an outage."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

import msgspec
import pytest

from modelswap.core.states import InstanceState
from modelswap.core.swap import SwapOutcome, SwapRecord
from modelswap.engines.base import Address
from modelswap.orchestrator.history import History
from modelswap.orchestrator.journal import Entry, Journal
from modelswap.orchestrator.store import BrokenDatabase, Store
from modelswap.runtimes.base import Running

ADDRESS = Address("127.0.0.1", 20001)
CONTAINED = Running(
    instance="a.1", model="a", definition="digest", address=Address("172.20.0.3", 8000), born=12.5, container="c0ffee"
)
FIRST_VERSION = """
create table meta (key text primary key, value text not null);
create table instances (
    instance text primary key, model text not null, definition text not null, host text not null, port integer not null,
    slots integer not null, state text not null, pid integer not null, born real not null, updated real not null);
create table gateways (gateway text primary key, seen real not null);
create table swaps (id integer primary key autoincrement, at real not null, record text not null);
create table timings (
    model text not null, mechanism text not null, count integer not null, mean real not null, last real not null,
    primary key (model, mechanism));
insert into instances values ('a.1', 'a', 'digest', '127.0.0.1', 20001, 3, 'ready', 41, 1.5, 1.0);
insert into gateways values ('g1', 1.0);
pragma user_version=1;
"""
"""As the first release wrote it."""


def set_aside(folder: Path) -> list[Path]:
    """Return the databases that were renamed aside."""
    return list(folder.glob("db.broken-*"))


async def opened(path: Path) -> tuple[Store, Journal]:
    """Return a store and a journal that has begun."""
    store = Store(path)
    await store.open()
    journal = Journal(store)
    await journal.begin()
    return store, journal


async def test_what_was_noted_is_there_for_the_next_one(tmp_path: Path) -> None:
    """Instances with identity, slots and state, and connected gateways survive; what ended doesn't."""
    store, journal = await opened(tmp_path / "db")
    await journal.intend("a.1", "a", "digest", ADDRESS)
    await journal.intend("b.1", "b", "digest", ADDRESS)
    journal.started(Running(instance="a.1", model="a", definition="digest", address=ADDRESS, pid=41, born=1.5))
    journal.opened("a.1", 4)
    journal.moved("a.1", InstanceState.READY)
    journal.moved("b.1", InstanceState.ABSENT)
    journal.gateway_came("g1")
    journal.gateway_came("g2")
    journal.gateway_came("g2")
    journal.gateway_went("g1")
    journal.gateway_went("g1")
    journal.moved("unknown", InstanceState.READY)
    await store.close()
    store, journal = await opened(tmp_path / "db")
    assert journal.entries == {
        "a.1": Entry(
            instance="a.1",
            model="a",
            definition="digest",
            address=ADDRESS,
            slots=4,
            state=InstanceState.READY,
            pid=41,
            born=1.5,
        )
    }
    assert journal.gateways == {"g2"}
    await store.close()


async def test_gateways_that_never_came_back_are_expected_only_once(tmp_path: Path) -> None:
    """One that died with its orchestrator must not make every later one wait a term for it."""
    store, journal = await opened(tmp_path / "db")
    journal.gateway_came("dead")
    journal.gateway_came("back")
    await store.close()
    store, journal = await opened(tmp_path / "db")
    assert journal.gateways == {"dead", "back"}
    journal.gateway_came("back")
    journal.gateway_came("new")
    journal.forget_unheard()
    assert journal.gateways == {"back", "new"}
    await store.close()
    store, journal = await opened(tmp_path / "db")
    assert journal.gateways == {"back", "new"}
    await store.close()


async def test_generations_grow_even_when_the_clock_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation is at least Unix milliseconds, and greater than the one before."""
    store, journal = await opened(tmp_path / "db")
    before = time.time_ns() // 1_000_000
    first = await journal.begin()
    assert first >= before
    monkeypatch.setattr(time, "time_ns", lambda: 5_000_000)
    assert await journal.begin() == first + 1
    await store.close()


async def test_a_corrupt_file_is_renamed_aside(tmp_path: Path) -> None:
    """A new database is begun beside it, and works."""
    path = tmp_path / "db"
    path.write_bytes(b"this is not a database at all" * 100)
    store, journal = await opened(path)
    await journal.intend("a.1", "a", "digest", ADDRESS)
    assert store.problem is None
    assert len(set_aside(tmp_path)) == 1
    await store.close()
    store, journal = await opened(path)
    assert "a.1" in journal.entries
    await store.close()


async def test_a_file_of_another_version_is_renamed_aside(tmp_path: Path) -> None:
    """What we can't understand we don't touch."""
    with sqlite3.connect(tmp_path / "db") as db:
        db.execute("pragma user_version=99")
    db.close()
    store, _ = await opened(tmp_path / "db")
    assert len(set_aside(tmp_path)) == 1
    await store.close()


async def test_a_file_of_the_first_version_is_carried_over(tmp_path: Path) -> None:
    """Its instances, gateways and swaps are still there, and containers can be noted in it."""
    path = tmp_path / "db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(FIRST_VERSION)
    store, journal = await opened(path)
    assert journal.entries["a.1"].pid == 41 and journal.entries["a.1"].container == ""
    assert journal.gateways == {"g1"} and not set_aside(tmp_path)
    journal.started(CONTAINED)
    await store.close()
    store, journal = await opened(path)
    assert journal.entries["a.1"].container == "c0ffee"
    assert await store.read("pragma user_version") == [(3,)]
    await store.close()


async def test_a_step_that_failed_half_way_is_taken_again(tmp_path: Path) -> None:
    """The file is either of one version or of the next."""
    path = tmp_path / "db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(FIRST_VERSION)
        db.executescript("begin; alter table instances add column container text not null default '';")
    store, journal = await opened(path)
    assert "a.1" in journal.entries and not set_aside(tmp_path)
    await store.close()


async def test_a_sleep_is_noted_before_it_begins_and_after_it_has_ended(tmp_path: Path) -> None:
    """So that the next orchestrator takes nothing that is half asleep for awake."""
    store, journal = await opened(tmp_path / "db")
    await journal.intend("a.1", "a", "digest", ADDRESS)
    await journal.lay_down("a.1", 2)
    await journal.lay_down("unknown", 2)
    journal.moved("a.1", InstanceState.ASLEEP)
    assert await store.read("select asleep from instances") == [(2,)]
    journal.woke("a.1")
    await store.close()
    store, journal = await opened(tmp_path / "db")
    assert journal.entries["a.1"].asleep == 0
    await store.close()


async def test_what_somebody_else_started_is_noted_with_its_container(tmp_path: Path) -> None:
    """And found again by the next orchestrator, with the address it was last reached at."""
    store, journal = await opened(tmp_path / "db")
    await journal.intend("a.1", "a", "digest", ADDRESS)
    journal.started(CONTAINED)
    journal.found(msgspec.structs.replace(CONTAINED, instance="foreign.1"))
    journal.moved("foreign.1", InstanceState.READY)
    await store.close()
    store, journal = await opened(tmp_path / "db")
    for instance, state in (("a.1", InstanceState.STARTING), ("foreign.1", InstanceState.READY)):
        entry = journal.entries[instance]
        assert (entry.container, entry.born, entry.pid, entry.state) == ("c0ffee", 12.5, 0, state)
        assert entry.address == CONTAINED.address
    await store.close()


async def test_a_damaged_page_is_found_at_opening(tmp_path: Path) -> None:
    """Not only when it is read."""
    path = tmp_path / "db"
    store, journal = await opened(path)
    for number in range(200):
        await journal.intend(f"a.{number}", "a" * 200, "digest", ADDRESS)
    await store.close()
    content = bytearray(path.read_bytes())
    content[3 * 4096 : 5 * 4096] = b"\xff" * 2 * 4096
    path.write_bytes(content)
    store, journal = await opened(path)
    assert set_aside(tmp_path)
    await store.close()


async def test_corruption_while_running_keeps_the_journal(tmp_path: Path) -> None:
    """The file is begun anew, and everything known is written into it."""
    path = tmp_path / "db"
    journal: Journal | None = None
    store = Store(path, on_renewed=lambda: journal.write_anew() if journal is not None else None)
    await store.open()
    journal = Journal(store)
    await journal.begin()
    await journal.intend("a.1", "a", "digest", ADDRESS)
    journal.gateway_came("g1")
    real, calls = store._db, []

    class Damaged:
        """A connection that finds its file damaged at the first statement."""

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

        def execute(self, *_: object) -> None:
            """Fail."""
            calls.append(1)
            raise BrokenDatabase("database disk image is malformed")

        def close(self) -> None:
            """Close the real one."""
            assert real is not None
            real.close()

    store._db = Damaged()  # type: ignore[assignment]
    assert await store.write(("delete from gateways where gateway = 'x'", ()))
    assert calls == [1]

    async def rows() -> int:
        return len(await store.read("select * from instances"))

    seen = 0
    while not seen:
        seen = await rows()
    assert await store.read("select gateway from gateways") == [("g1",)]
    await store.close()


async def test_a_broken_file_that_cannot_be_renamed_is_replaced_by_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept then, but everything works."""
    (tmp_path / "db").write_bytes(b"this is not a database at all" * 100)

    def refuse(*_: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "replace", refuse)
    store, journal = await opened(tmp_path / "db")
    await journal.intend("a.1", "a", "digest", ADDRESS)
    assert store.problem is not None and "not yours" in store.problem
    await store.close()


async def test_corruption_found_by_reading_is_mended_too(tmp_path: Path) -> None:
    """The query has no rows, and the next one works."""
    store, _ = await opened(tmp_path / "db")
    assert store._db is not None
    store._db.close()

    class Damaged:
        def execute(self, *_: object) -> None:
            raise BrokenDatabase("database disk image is malformed")

        def close(self) -> None:
            raise sqlite3.OperationalError("disk full")

    store._db = Damaged()  # type: ignore[assignment]
    assert await store.read("select 1") == []
    assert await store.read("select 1") == [(1,)]
    await store.close()
    assert not store._write((("select 1", ()),))


async def test_a_full_disk_is_named_and_forgiven(tmp_path: Path) -> None:
    """Writes fail with a remedy, nothing is raised, and it works again once there is space."""
    store, journal = await opened(tmp_path / "db")
    pages = (await store.read("pragma page_count"))[0][0]
    await store.read(f"pragma max_page_count={pages}")
    for number in range(50):
        await journal.intend(f"a.{number}", "a" * 500, "digest", ADDRESS)
    assert store.problem is not None and "the disk is full; free some space" in store.problem
    assert store.failures > 0 and len(journal.entries) == 50
    await store.read("pragma max_page_count=100000")
    assert await store.write(("insert or replace into meta values ('k', 'v')", ()))
    assert store.problem is None
    await store.close()


async def test_a_place_that_cannot_be_opened_is_replaced_by_memory(tmp_path: Path) -> None:
    """The orchestrator runs, and says that nothing is kept."""
    (tmp_path / "db").mkdir()
    store, journal = await opened(tmp_path / "db")
    await journal.intend("a.1", "a", "digest", ADDRESS)
    assert "a.1" in journal.entries and await store.read("select instance from instances") == [("a.1",)]
    assert store.problem is not None and "can't be opened" in store.problem
    assert not await store.write(("delete from meta", ()))
    await store.close()


async def test_a_read_only_database_is_named(tmp_path: Path) -> None:
    """Reading goes on, writing is told."""
    store, journal = await opened(tmp_path / "db")
    await store.read("pragma query_only=1")
    await journal.intend("a.1", "a", "digest", ADDRESS)
    assert store.problem is not None and "can't be written" in store.problem
    await store.close()


async def test_unreadable_rows_and_queries_are_no_outage(tmp_path: Path) -> None:
    """A query that fails has no rows; a state that nobody knows is skipped."""
    store, journal = await opened(tmp_path / "db")
    await journal.intend("a.1", "a", "digest", ADDRESS)
    await store.write(("update instances set state = 'dancing'", ()))
    assert await store.read("select * from nowhere") == []
    assert store.problem is not None
    again = Journal(store)
    await again.begin()
    assert again.entries == {}
    await store.close()
    assert await _closed_read(store) == []


async def _closed_read(store: Store) -> list[tuple[object, ...]]:
    return store._read("select 1", ())


def record(target: str | None = "b", seconds: float = 2.0, outcome: SwapOutcome = SwapOutcome.OK) -> SwapRecord:
    """Return a swap."""
    return SwapRecord(
        device="gpu0",
        source="a",
        target=target,
        mechanism="cold" if target else "stop",
        outcome=outcome,
        seconds=seconds,
        queue=0.5,
        phases={"in": seconds},
    )


async def test_history_is_kept_with_mean_times(tmp_path: Path) -> None:
    """Newest first; means count only swaps that brought the model in."""
    store = Store(tmp_path / "db")
    await store.open()
    history = History(store)
    await history.begin()
    for swap in (record(seconds=2.0), record(seconds=4.0), record(outcome=SwapOutcome.FAILED), record(target=None)):
        history.add(swap)
    await store.write(("insert into swaps (at, record) values (1, 'rubbish')", ()))
    await store.close()
    store = Store(tmp_path / "db")
    await store.open()
    history = History(store)
    await history.begin()
    assert [swap["target"] for swap in history.swaps()] == [None, "b", "b", "b"]
    assert history.timings() == [
        {"model": "b", "mechanism": "cold", "count": 2, "mean_seconds": 3.0, "last_seconds": 4.0}
    ]
    await store.close()


async def test_sent_statements_keep_their_order(tmp_path: Path) -> None:
    """What isn't waited for is still done in the order it was said."""
    store = Store(tmp_path / "db")
    await store.open()
    for number in range(100):
        store.send(("insert or replace into meta values ('n', ?)", (str(number),)))
    assert await store.read("select value from meta where key = 'n'") == [("99",)]
    await store.close()
    assert not set_aside(tmp_path)
