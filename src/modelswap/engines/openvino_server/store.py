"""Folders on disk that are there whole or not at all, for what is costly to make again.

A process may be killed at any moment, and several may start at once: a folder is filled under another name by whoever
holds the lock beside it, gets a list of its files with their sizes, and is then renamed. One whose files don't fit its
list (a crash of the machine, a full disk) counts as absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

_LIST: Final = "modelswap.json"
_UNFINISHED: Final = ".unfinished-"
_LOCK: Final = ".lock"


class _Contents(msgspec.Struct, frozen=True):
    files: dict[str, int]
    facts: dict[str, str | int | None] = {}


class Folder:
    """One such folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def facts(self) -> dict[str, str | int | None] | None:
        """Return what was noted when it was filled; None if it isn't there, or not whole."""
        try:
            contents = msgspec.json.decode((self.path / _LIST).read_bytes(), type=_Contents)
            whole = all((self.path / name).stat().st_size == size for name, size in contents.files.items())
        except (OSError, msgspec.DecodeError):
            return None
        return contents.facts if whole else None

    @contextmanager
    def fill(self, facts: dict[str, str | int | None]) -> Iterator[Path]:
        """Give an empty folder to fill; put it in place afterwards.

        Raises `OSError`; `BlockingIOError` while another process fills this or another one beside it.
        """
        parent = self.path.parent
        parent.mkdir(parents=True, exist_ok=True)
        with (parent / _LOCK).open("w") as lock:
            # The kernel lets go of it when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for abandoned in parent.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(abandoned, ignore_errors=True)
            unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=parent))
            try:
                yield unfinished
                files = {file.name: file.stat().st_size for file in unfinished.iterdir()}
                (unfinished / _LIST).write_bytes(msgspec.json.encode(_Contents(files, facts)))
                if self.facts() is None:
                    self.discard()
                    unfinished.replace(self.path)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)

    def discard(self) -> None:
        """Remove it, if it is there."""
        shutil.rmtree(self.path, ignore_errors=True)


def made_of(source: Path, cache: Path) -> Path | None:
    """Return the folder in which is kept what was made of a file, in whatever state that was; None if there is none."""
    with suppress(OSError):
        for folder in cache.iterdir():
            made = Folder(folder / "model")
            if ((made.facts() or {}).get("source")) == str(source.resolve()):
                return folder
    return None


def identity(file: Path, version: str) -> str:
    """Return a name for this very state of a file, as read by this version of a library. Raises `OSError`."""
    real = file.resolve()
    stat = real.stat()
    known = f"{real}\0{stat.st_size}\0{stat.st_mtime_ns}\0{version}"
    return f"{real.stem}-{hashlib.sha256(known.encode()).hexdigest()[:16]}"
