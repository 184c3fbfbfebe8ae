"""How fast a disk gives what isn't in the page cache."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path
from typing import Final

_CHUNK: Final = 4 << 20
_MOST: Final = 256 << 20
_SECONDS: Final = 0.5


def speed(place: Path) -> float | None:
    """Return the bytes a second at which the largest file in ``place`` is read past the page cache.

    At most 256 MiB are read, for half a second or as long as one read of 4 MiB takes. None where there is no file of
    that size, or no such reading (some file systems have none). Blocks.
    """
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    sizes = {file: file.stat().st_size for file in files}
    largest = max(sizes, key=lambda file: sizes[file], default=None)
    if largest is None or sizes[largest] < _CHUNK or not hasattr(os, "O_DIRECT"):
        return None
    with mmap.mmap(-1, _CHUNK) as buffer:  # reads past the cache want whole pages
        try:
            descriptor = os.open(largest, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return _read(descriptor, buffer, min(sizes[largest], _MOST))
        except OSError:
            return None
        finally:
            os.close(descriptor)


def _read(descriptor: int, buffer: mmap.mmap, size: int) -> float:
    began, done = time.monotonic(), 0
    while done + _CHUNK <= size and (done == 0 or time.monotonic() - began < _SECONDS):
        done += os.preadv(descriptor, [buffer], done)
    return done / max(time.monotonic() - began, 1e-6)
