"""What reading ahead is worth: reading a file as an engine does at its start, off the disk and after it was read ahead.

A file is evicted from the page cache before every round; then it is mapped and touched from front to
back, as llama.cpp loads weights, with and without `modelswap.orchestrator.pagecache` having read it before at the
config's default rate, as it does while the old model drains. Rounds alternate. The time that the reading ahead takes
is told apart: it is hidden only as far as the drain, the putting out and the engine's imports last.

Usage: python bench/readahead.py [--gib N] [--rounds N] [--folder F], by default the current one; it must lie on a disk.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from modelswap.orchestrator.pagecache import CHUNK, Tally, is_cached, read_ahead
from modelswap.spec.config import Device


def make(path: Path, size: int) -> None:
    """Write random bytes and have them on disk."""
    block = os.urandom(CHUNK)
    with path.open("wb") as file:
        for _ in range(size // CHUNK):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def evict(path: Path) -> None:
    """Have the kernel forget what it has cached of a file; ends the program where it doesn't."""
    with path.open("rb") as file:
        for _ in range(100):  # a page that is busy at that moment is kept
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not any(is_cached(file.fileno(), at, 1) for at in range(0, path.stat().st_size, 64 * CHUNK)):
                break
        else:
            sys.exit(f"{path.parent} isn't on a disk: give another --folder")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(path: Path) -> float:
    """Return the seconds that touching every page takes."""
    began = time.perf_counter()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        mapped.madvise(mmap.MADV_WILLNEED)
        sum(mapped[:: mmap.PAGESIZE])
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=str(Path.cwd()))
    options = parser.parse_args()
    size, rate = options.gib << 30, int(Device().read_ahead)
    off_disk, ahead, cached = [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder, "weights")
        make(path, size)
        for _ in range(options.rounds):
            evict(path)
            off_disk.append(load(path))
            evict(path)
            began = time.perf_counter()
            read_ahead([path], Tally(), rate=rate, room=lambda: size, pause=threading.Event().wait)
            ahead.append(time.perf_counter() - began)
            cached.append(load(path))
    print(f"{options.gib} GiB, {options.rounds} rounds, medians")
    print(f"loaded off the disk      {statistics.median(off_disk):7.2f} s")
    print(f"loaded once read ahead   {statistics.median(cached):7.2f} s")
    print(f"reading ahead took       {statistics.median(ahead):7.2f} s (beside the drain)")
    print(f"ratio                    {statistics.median(off_disk) / statistics.median(cached):7.1f}")


if __name__ == "__main__":
    main()
