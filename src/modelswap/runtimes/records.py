"""Which process is an instance's main one, written down at its start.

A child that made a session of its own looks just like a main process once its parent has died: same ids, no parent of
ours. And a program may write over the environment that others see, our ids included. The record tells in both cases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path

import msgspec

from modelswap.runtimes.base import Running
from modelswap.runtimes.logfiles import safe_name


class Records:
    """One small file per instance of which something lives."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, running: Running) -> None:
        """Write one down."""
        # Without it (a full disk, or we die just before) the oldest process of an instance counts as its main one.
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._path(running.instance).write_bytes(msgspec.json.encode(running))

    def all(self) -> list[Running]:
        """Return all that can be read."""
        found = []
        for path in self._folder.glob("*.json"):
            with contextlib.suppress(OSError, msgspec.DecodeError):
                found.append(msgspec.json.decode(path.read_bytes(), type=Running))
        return found

    def forget(self, instance: str) -> None:
        """Delete one."""
        with contextlib.suppress(OSError):
            self._path(instance).unlink(missing_ok=True)

    def keep_only(self, living: Collection[str]) -> None:
        """Delete those of all other instances."""
        names = {self._path(instance).name for instance in living}
        for path in self._folder.glob("*.json"):
            if path.name not in names:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _path(self, instance: str) -> Path:
        return self._folder / f"{safe_name(instance)}.json"
