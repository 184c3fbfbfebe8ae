"""Reading files so that the kernel keeps them in its page cache: bounded in speed, and given up at any moment.

Blocks: it is for a thread of its own. Facts from the manual pages of preadv2(2), posix_fadvise(2) and ioprio_set(2);
seen with Linux 6.18 on ext4.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import psutil
import structlog

CHUNK: Final = 4 << 20
"""Bytes that are read at once, into the one buffer there is; between two it can be given up."""
LOOK_EVERY: Final = 64
"""After how many chunks it is looked anew whether memory is left."""

STRETCH: Final = 16
"""How many chunks are looked at together, whether they are all cached, before the stretch ahead of theirs is read.

So what the kernel reads ahead of us by itself (twice ``read_ahead_kb`` at most) doesn't pass for cached already: it
would be neither counted nor slowed down. Looking at each chunk took 1.6 times as long on a virtual disk that gives
1 GiB/s, since a look that finds nothing has a page read.
"""

_STEP: Final = 128 << 10
# Ahead of the engine's own reading the disk is ours, beside it nobody is to wait for us. Not the idle class: who needs
# a page that is on its way to us would wait as long as we do.
_LOWEST: Final = 7
_NOWAIT: Final = getattr(os, "RWF_NOWAIT", None)

_log = structlog.get_logger(__name__)


class Outcome(StrEnum):
    """How a reading ended."""

    DONE = "done"
    """All of it is cached, as far as it could be read."""
    STOPPED = "stopped"
    NO_ROOM = "no room"
    """Host memory is too short: it would push out what is needed."""


@dataclass(slots=True)
class Tally:
    """How far a reading is, in bytes: of ``total``, ``read`` came from disk and ``cached`` were there already."""

    total: int = 0
    read: int = 0
    cached: int = 0

    @property
    def left(self) -> int:
        """What is still to come."""
        return max(0, self.total - self.read - self.cached)


def read_ahead(
    files: Sequence[Path],
    tally: Tally,
    *,
    rate: int,
    room: Callable[[], int],
    pause: Callable[[float], bool],
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Read ``files`` in their order, ``rate`` bytes per second at most; ``tally`` is kept up to date meanwhile.

    ``room`` returns the bytes of memory that may be taken for what is left; asked at the beginning and now and then.
    ``pause`` waits for so many seconds and returns whether to stop; it is asked after each chunk. A file that can't be
    read, or not to its end, is passed over.
    """
    lower_priority()
    tally.total = sum(map(_size, files))
    reader = _Reader(tally, rate, room, pause, clock)
    for file in files:
        try:
            ended = reader.read(file)
        except OSError as error:
            _log.debug("can't be read ahead", file=str(file), error=str(error))
            continue
        if ended is not Outcome.DONE:
            return ended
    return Outcome.DONE


def lower_priority() -> None:
    """Have this thread's disk reads come after others', where the system knows such a thing."""
    with contextlib.suppress(psutil.Error, OSError, AttributeError):
        psutil.Process(threading.get_native_id()).ionice(psutil.IOPRIO_CLASS_BE, _LOWEST)


class _Reader:
    def __init__(
        self,
        tally: Tally,
        rate: int,
        room: Callable[[], int],
        pause: Callable[[float], bool],
        clock: Callable[[], float],
    ) -> None:
        self._tally = tally
        self._rate = rate
        self._room = room
        self._pause = pause
        self._clock = clock
        self._buffer = memoryview(bytearray(CHUNK))
        self._chunks = 0

    def read(self, file: Path) -> Outcome:
        with _opened(file) as number, _opened(file) as probe:
            found = os.fstat(number)
            if not stat.S_ISREG(found.st_mode):
                return Outcome.DONE
            _advise(number, "POSIX_FADV_SEQUENTIAL")
            _advise(probe, "POSIX_FADV_RANDOM")
            return self._read(number, probe, found.st_size)

    def _read(self, file: int, probe: int, size: int) -> Outcome:
        stretch = STRETCH * CHUNK
        stretches = [(at, min(stretch, size - at)) for at in range(0, size, stretch)]
        looked: list[bool] = []
        for at in range(0, size, CHUNK):
            length, here = min(CHUNK, size - at), at // stretch
            if self._chunks % LOOK_EVERY == 0 and self._room() < self._tally.left:
                return Outcome.NO_ROOM
            self._chunks += 1
            looked += (is_cached(probe, *each) for each in stretches[len(looked) : here + 2])
            began, came, rest = self._clock(), length, 0.0
            if looked[here]:
                self._tally.cached += length
            else:
                came = os.preadv(file, [self._buffer[:length]], at)
                self._tally.read += came
                rest = max(0.0, came / self._rate - (self._clock() - began))
            if self._pause(rest):
                return Outcome.STOPPED
            if came < length:
                break  # it has become shorter
        return Outcome.DONE


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    # A pipe would keep us waiting for its other end.
    number = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield number
    finally:
        os.close(number)


def _advise(number: int, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(number, 0, 0, getattr(os, advice))


def is_cached(file: int, at: int, length: int) -> bool:
    """Return whether a part of an open file is in the page cache, by a byte of every 128 KiB and its last one.

    False where the system or the file system can't tell. The page that is found missing is on its way afterwards; a
    disk that is quicker than the look passes for memory, which does no harm.
    """
    if _NOWAIT is None:
        return False
    byte = bytearray(1)
    try:
        return all(
            os.preadv(file, [byte], place, _NOWAIT) for place in (*range(at, at + length, _STEP), at + length - 1)
        )
    except OSError:
        return False


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
