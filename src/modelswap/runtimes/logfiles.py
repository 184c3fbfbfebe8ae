"""Engines' log files: where they are, how they are rotated and read.

An engine appends to ``logs/MODEL/INSTANCE.log`` for as long as it lives, whoever watches. So that it needn't know, a
log is rotated by copying and truncating: what an engine writes in the microseconds between the two is lost.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

_KEPT_INSTANCES: Final = 3
_COPIES: Final = (".1", ".2")
_CHUNK: Final = 1024 * 1024
_TAIL_BYTES: Final = 1024 * 1024
_LINE_CHARS: Final = 4000
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

# Colours and cursor movements (CSI), titles and links (OSC), and the short two-character escapes.
_ANSI: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def safe_name(name: str) -> str:
    """Return a file name for a model or instance, different for different names."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:80]
    if cleaned == name and name:
        return name
    return f"{cleaned}-{hashlib.blake2s(name.encode(errors='surrogateescape'), digest_size=4).hexdigest()}"


def clean(line: str) -> str:
    """Return a log line as people saw it: without escapes and control characters, a progress bar's last state only."""
    states = [state for state in _ANSI.sub("", line).split("\r") if state.strip()]
    return _CONTROL.sub("", states[-1])[:_LINE_CHARS] if states else ""


class LogFiles:
    """The log files under one folder; ``size`` in bytes is where a log is rotated."""

    def __init__(self, root: Path, size: int) -> None:
        self._root = root
        self._size = size
        self._newest: dict[str, str] = {}

    def path(self, model: str, instance: str) -> Path:
        """Return where an instance's log is."""
        return self._root / safe_name(model) / f"{safe_name(instance)}.log"

    def open(self, model: str, instance: str) -> int:
        """Return a descriptor that appends to a new instance's log; raises `OSError`."""
        path = self.path(model, instance)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._newest[model] = instance
        return descriptor

    def prune(self, model: str, living: Collection[str]) -> None:
        """Delete the logs of all but a model's newest instances, and never of one that lives."""
        folder = self._root / safe_name(model)
        spared = {f"{safe_name(instance)}.log" for instance in living}
        for log in _by_age(folder)[_KEPT_INSTANCES:]:
            if log.name not in spared:
                for path in (log, *_copies(log)):
                    path.unlink(missing_ok=True)

    def rotate(self) -> list[str]:
        """Rotate every log that has grown too large; returns what went wrong, in words for the user."""
        problems = []
        for log in self._root.glob("*/*.log"):
            try:
                if log.stat().st_size >= self._size:
                    _rotate(log)
            except FileNotFoundError:  # pruned meanwhile
                continue
            except OSError as error:
                if error.errno in _FULL:
                    _rotate_on_full_disk(log)
                    problems.append(f"no space left to keep the old part of {log}: it was dropped")
                else:
                    problems.append(f"can't rotate {log}: {error.strerror}")
        return problems

    def tail(self, model: str, lines: int, instance: str | None) -> list[str]:
        """Return the last lines of an instance's log, or of the model's newest; empty if there is none."""
        log = self._newest_log(model) if instance is None else self.path(model, instance)
        if log is None or lines <= 0:
            return []
        found: list[str] = []
        for path in (log, *_copies(log)):
            try:
                found = _last_lines(path, lines - len(found)) + found
            except FileNotFoundError:
                continue
            if len(found) >= lines:
                break
        return found

    def _newest_log(self, model: str) -> Path | None:
        if (instance := self._newest.get(model)) is not None:
            return self.path(model, instance)
        return next(iter(_by_age(self._root / safe_name(model))), None)


def _by_age(folder: Path) -> list[Path]:
    """Return a folder's logs, those written to last first."""
    aged = []
    for log in folder.glob("*.log"):
        try:
            aged.append((log.stat().st_mtime_ns, log))
        except FileNotFoundError:
            continue
    return [log for _, log in sorted(aged, reverse=True)]


def _copies(log: Path) -> list[Path]:
    return [log.with_name(log.name + suffix) for suffix in _COPIES]


def _rotate(log: Path) -> None:
    first, second = _copies(log)
    if first.exists():
        first.replace(second)
    source = os.open(log, os.O_RDWR | os.O_CLOEXEC)
    try:
        target = os.open(first, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            # Only what is there now and what comes while we copy, but at most twice as much: an engine may write
            # faster than the disk copies.
            limit = 2 * os.fstat(source).st_size
            while limit > 0 and (chunk := os.read(source, _CHUNK)):
                limit -= len(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[os.write(target, view) :]
        finally:
            os.close(target)
        os.ftruncate(source, 0)
    finally:
        os.close(source)


def _rotate_on_full_disk(log: Path) -> None:
    """Give the disk back what old logs hold: a full disk stops engines, and a log's old part is worth less."""
    for copy in _copies(log):
        copy.unlink(missing_ok=True)
    os.truncate(log, 0)


def _last_lines(path: Path, lines: int) -> list[str]:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - _TAIL_BYTES)
        file.seek(start)
        text = file.read(_TAIL_BYTES).decode(errors="replace")
    split = text.removesuffix("\n").split("\n") if text else []
    if start and len(split) > 1:
        del split[0]  # its beginning was not read
    return [clean(line) for line in split[-lines:]]
