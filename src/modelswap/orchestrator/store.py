"""SQLite in a thread of its own, which goes on whatever happens to its file."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import structlog

_log = structlog.get_logger(__name__)

Statement = tuple[str, tuple[Any, ...]]

_CORRUPT: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_REMEDIES: Final = {
    sqlite3.SQLITE_FULL: "the disk is full; free some space",
    sqlite3.SQLITE_READONLY: "it can't be written; see its owner and mode",
    sqlite3.SQLITE_IOERR: "the disk reports an error; see dmesg",
    sqlite3.SQLITE_CANTOPEN: "it can't be opened; see the folder's owner and mode",
    sqlite3.SQLITE_BUSY: "another program has locked it",
}

_VERSION: Final = 3
_SCHEMA: Final = """
create table if not exists meta (key text primary key, value text not null);
create table if not exists instances (
    instance text primary key, model text not null, definition text not null, host text not null, port integer not null,
    slots integer not null, state text not null, pid integer not null, born real not null, updated real not null,
    container text not null default '', asleep integer not null default 0);
create table if not exists gateways (gateway text primary key, seen real not null);
create table if not exists swaps (
    id integer primary key autoincrement, at real not null, record text not null);
create table if not exists timings (
    model text not null, mechanism text not null, count integer not null, mean real not null, last real not null,
    primary key (model, mechanism));
create table if not exists measurements (
    model text not null, mechanism text not null, record text not null, primary key (model, mechanism));
"""
_STEPS: Final = {
    # Instances in containers.
    1: "alter table instances add column container text not null default ''",
    # Instances that sleep.
    2: "alter table instances add column asleep integer not null default 0",
}
"""How a file of an earlier version becomes one of the next."""


class BrokenDatabase(sqlite3.DatabaseError):
    """The file is a database, but not one that can be used."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


class Store:
    """A database of which losing anything is a nuisance and never an outage.

    A corrupt file is renamed aside and begun anew (``on_renewed`` is then called on the event loop); one that can't be
    opened is replaced by one in memory; a write that fails is told once and forgotten. ``problem`` says what is wrong
    now, None if nothing.
    """

    def __init__(self, path: Path, on_renewed: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._on_renewed = on_renewed
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._db: sqlite3.Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._in_memory = ""
        self.problem: str | None = None
        self.failures = 0
        """Writes that were not kept."""

    async def open(self) -> None:
        """Open or create the database."""
        self._loop = asyncio.get_running_loop()
        await self._loop.run_in_executor(self._thread, self._open)

    async def close(self) -> None:
        """Finish what was sent, and close."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=True)

    async def read(self, query: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of a query; none if the database can't be read."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, query, parameters)

    async def write(self, *statements: Statement) -> bool:
        """Carry out ``statements`` as one transaction, after all that was sent before; returns whether it is kept."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._write, statements)

    def send(self, *statements: Statement) -> None:
        """Like `write`, without waiting for it."""
        self._thread.submit(self._write, statements)

    # ── in the thread ────────────────────────────────────────────────────────────────────────────────────

    def _open(self) -> None:
        try:
            self._db = self._connect()
        except sqlite3.DatabaseError as error:
            if error_code(error) in _CORRUPT:
                self._renew(error)
            else:
                self._fall_back(error)

    def _connect(self) -> sqlite3.Connection:
        # No waiting for locks: the state folder is ours alone.
        db = sqlite3.connect(self._path, timeout=0.5, check_same_thread=False)
        try:
            db.execute("pragma journal_mode=wal")
            db.execute("pragma synchronous=normal")  # survives our death; a power cut ends the engines anyway
            version = db.execute("pragma user_version").fetchone()[0]
            if version not in (0, _VERSION, *_STEPS):
                raise BrokenDatabase(f"written by another version of modelswap (its version is {version})")
            if (found := db.execute("pragma quick_check(1)").fetchone()[0]) != "ok":
                raise BrokenDatabase(str(found))
            for step in range(version or _VERSION, _VERSION):
                db.executescript(f"begin; {_STEPS[step]}; pragma user_version={step + 1}; commit;")
            db.executescript(_SCHEMA)
            db.execute(f"pragma user_version={_VERSION}")
        except BaseException:
            db.close()
            raise
        return db

    def _renew(self, error: sqlite3.DatabaseError) -> None:
        """Begin anew beside the broken file."""
        self._close()
        aside = self._path.with_name(f"{self._path.name}.broken-{int(time.time())}")
        _log.warning("database is broken; starting a new one", path=str(self._path), aside=str(aside), error=str(error))
        try:
            self._path.replace(aside)
            for suffix in ("-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
            self._db = self._connect()
        except (OSError, sqlite3.DatabaseError) as again:
            self._fall_back(again)
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                self._loop.call_soon_threadsafe(self._on_renewed)

    def _fall_back(self, error: Exception) -> None:
        self._in_memory = self._explain(error)
        self._tell(self._in_memory)
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        self._db.executescript(_SCHEMA)

    def _close(self) -> None:
        if self._db is not None:
            # A full disk can make even closing fail, and there is nothing left to do then.
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _read(self, query: str, parameters: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if self._db is None:
            return []
        try:
            return self._db.execute(query, parameters).fetchall()
        except sqlite3.DatabaseError as error:
            if error_code(error) in _CORRUPT:
                self._renew(error)
            else:
                self._tell(self._explain(error))
            return []

    def _write(self, statements: tuple[Statement, ...]) -> bool:
        for _ in range(2):
            if self._db is None:
                return False
            try:
                with self._db:
                    for statement, parameters in statements:
                        self._db.execute(statement, parameters)
            except sqlite3.DatabaseError as error:
                if error_code(error) in _CORRUPT:
                    self._renew(error)
                    continue
                self.failures += 1
                self._tell(self._explain(error))
                return False
            self._tell(self._in_memory or None)
            return not self._in_memory
        return False

    def _tell(self, problem: str | None) -> None:
        if problem != self.problem:
            if problem is None:
                _log.info("database works again", path=str(self._path))
            else:
                _log.warning("state is not kept; serving goes on", problem=problem)
            self.problem = problem

    def _explain(self, error: Exception) -> str:
        code = error_code(error) if isinstance(error, sqlite3.Error) else None
        remedy = _REMEDIES.get(code, "") if code is not None else ""
        return f"{self._path}: {error}" + (f" ({remedy})" if remedy else "")


def peek(path: Path, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query on a file that may be somebody else's just now; none if it can't be read.

    A copy is read, so that nothing is made, locked or mended beside the file: SQLite does all of that even for who
    only reads, if there is a write-ahead log.
    """
    with tempfile.TemporaryDirectory(prefix="modelswap-") as folder:
        copy = Path(folder) / path.name
        try:
            for suffix in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(path.with_name(path.name + suffix), copy.with_name(copy.name + suffix))
            if not copy.is_file():
                return []
            with contextlib.closing(sqlite3.connect(copy)) as db:
                return db.execute(query).fetchall()
        except (OSError, sqlite3.Error):
            return []


def error_code(error: sqlite3.Error) -> int | None:
    """Return SQLite's primary result code; None if the error is not SQLite's own."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else int(code) & 0xFF
