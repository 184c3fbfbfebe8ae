"""Reading real files into the page cache: what comes there, how fast, and what ends it."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from modelswap.orchestrator import pagecache
from modelswap.orchestrator.pagecache import CHUNK, STRETCH, Outcome, Tally, is_cached, read_ahead

LARGE = 2 * CHUNK + 12345
PLENTY = 1 << 60


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder that isn't kept in memory, as /tmp may be."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


def written(path: Path, size: int = LARGE) -> Path:
    """Return a file of random bytes that lies on disk and isn't cached."""
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
        evict(path, file.fileno())
    return path


def evict(path: Path, file: int) -> None:
    """Have nothing of an open file cached; a page that is busy at that moment is kept by the kernel."""
    for _ in range(1000):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        if not path.stat().st_size or not any(cached(path)):
            return
    pytest.fail(f"{path.parent} keeps its files in memory")


def cached(path: Path) -> list[bool]:
    """Return of each page of a file whether it is cached, as mincore(2) tells."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as pages:
        held = (ctypes.c_ubyte * (-(-len(pages) // mmap.PAGESIZE)))()
        anchor = ctypes.c_char.from_buffer(pages)
        try:
            assert libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(len(pages)), held) == 0
        finally:
            del anchor
    return [bool(page & 1) for page in held]


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look with mincore(2): a disk that is quicker than the look passes for memory, which a test can't count on."""

    def look(file: int, at: int, length: int) -> bool:
        pages = cached(Path(f"/proc/self/fd/{file}").readlink())
        return all(pages[at // mmap.PAGESIZE : -(-(at + length) // mmap.PAGESIZE)])

    monkeypatch.setattr(pagecache, "is_cached", look)


@pytest.fixture(autouse=True)
def _priority() -> Iterator[None]:
    """Readings lower their thread's priority for good, which here is the tests'."""
    usual = psutil.Process().ionice()
    yield
    psutil.Process().ionice(*usual)


def touch(path: Path, at: int, length: int) -> None:
    """Have a part of a file cached, and no more."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for place in range(at, at + length, CHUNK):
            os.pread(file.fileno(), CHUNK, place)


class Pace:
    """A clock that moves when it is waited on, and by ``slow`` seconds each time it is looked at."""

    def __init__(self, slow: float = 0.0, *, stop_after: int | None = None) -> None:
        self.now = 0.0
        self.slow = slow
        self.pauses: list[float] = []
        self.stop_after = stop_after

    def clock(self) -> float:
        """Return the time."""
        self.now += self.slow
        return self.now

    def pause(self, seconds: float) -> bool:
        """Wait."""
        self.pauses.append(seconds)
        self.now += seconds
        return len(self.pauses) == self.stop_after


def read(
    *files: Path,
    rate: int = CHUNK,
    room: Callable[[], int] = lambda: PLENTY,
    pace: Pace | None = None,
) -> tuple[Outcome, Tally, Pace]:
    """Read files ahead, by default a chunk each second."""
    pace, tally = pace or Pace(), Tally()
    ended = read_ahead(files, tally, rate=rate, room=room, pause=pace.pause, clock=pace.clock)
    return ended, tally, pace


def test_every_byte_becomes_cached(disk: Path) -> None:
    """Files of any length, an empty one, too."""
    files = [written(disk / "a"), written(disk / "b", 1), written(disk / "c", CHUNK)]
    (disk / "empty").touch()
    assert not any(page for file in files for page in cached(file))
    ended, tally, _ = read(files[0], disk / "empty", *files[1:])
    assert ended is Outcome.DONE
    assert all(page for file in files for page in cached(file))
    assert tally == Tally(total=LARGE + 1 + CHUNK, read=LARGE + 1 + CHUNK)
    assert tally.left == 0


def test_what_is_cached_already_is_passed_over(disk: Path) -> None:
    """It isn't read again, takes no time, and is told apart; a stretch with a gap is read."""
    file = written(disk / "a")
    touch(file, 0, CHUNK)
    ended, tally, _ = read(file)
    assert (ended, tally.cached, tally.read) == (Outcome.DONE, 0, LARGE)
    ended, tally, pace = read(file)
    assert (ended, tally.cached, tally.read) == (Outcome.DONE, LARGE, 0)
    assert sum(pace.pauses) == 0.0


def test_it_is_seen_what_is_cached(disk: Path) -> None:
    """All of a file that was read; of one that wasn't, a quick disk may hide it now and then, but not every time."""
    file = written(disk / "a", STRETCH * CHUNK)
    file.read_bytes()
    with file.open("rb") as opened:
        assert is_cached(opened.fileno(), 0, STRETCH * CHUNK)
        seen = []
        for _ in range(5):
            evict(file, opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            seen.append(is_cached(opened.fileno(), 0, STRETCH * CHUNK))
    assert not all(seen)


def test_where_nothing_tells_what_is_cached_all_is_read(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system, or a file system, without such reads."""
    file = written(disk / "a")
    file.read_bytes()
    monkeypatch.setattr(pagecache, "is_cached", is_cached)
    monkeypatch.setattr(pagecache, "_NOWAIT", None)
    assert read(file)[1].read == LARGE
    monkeypatch.setattr(pagecache, "_NOWAIT", 1 << 30)
    assert read(file)[1].read == LARGE


def test_the_rate_is_never_exceeded(disk: Path) -> None:
    """Each chunk takes as long as it may, whatever part of that the disk took; a slow one is not made up for."""
    file = written(disk / "a", 4 * CHUNK)
    assert read(file, rate=2 * CHUNK)[2].pauses == [0.5] * 4
    assert read(written(disk / "b", 2 * CHUNK), rate=CHUNK, pace=Pace(slow=0.25))[2].pauses == [0.75, 0.75]
    assert read(written(disk / "c", 2 * CHUNK), rate=CHUNK, pace=Pace(slow=7.0))[2].pauses == [0.0, 0.0]


def test_what_the_kernel_brings_by_itself_is_not_taken_for_cached(disk: Path) -> None:
    """It reads ahead of us; those bytes came from disk for us, and count against the rate."""
    file = written(disk / "a", 3 * STRETCH * CHUNK)
    touch(file, STRETCH * CHUNK, STRETCH * CHUNK)
    _, tally, pace = read(file, rate=CHUNK)
    assert (tally.read, tally.cached) == (2 * STRETCH * CHUNK, STRETCH * CHUNK)
    assert [seconds > 0 for seconds in pace.pauses] == [True] * STRETCH + [False] * STRETCH + [True] * STRETCH


def test_given_up_it_leaves_the_rest_on_disk(disk: Path) -> None:
    """But for what the kernel reads ahead."""
    file = written(disk / "a", 2 * STRETCH * CHUNK)
    ended, tally, _ = read(file, pace=Pace(stop_after=2))
    assert (ended, tally.read, tally.left) == (Outcome.STOPPED, 2 * CHUNK, (2 * STRETCH - 2) * CHUNK)
    held = cached(file)
    assert all(held[: len(held) // STRETCH])
    assert not all(held)


def test_it_can_be_given_up_where_all_is_cached(disk: Path) -> None:
    """Tens of gigabytes take a while even so."""
    file = written(disk / "a", 3 * CHUNK)
    file.read_bytes()
    ended, tally, _ = read(file, pace=Pace(stop_after=1))
    assert (ended, tally.cached) == (Outcome.STOPPED, CHUNK)


def test_an_event_gives_it_up_between_two_chunks(disk: Path) -> None:
    """As the orchestrator does it: at a rate at which it would take hours, it ends once the event is set."""
    file = written(disk / "a", 2 * CHUNK)
    stop, tally, ended = threading.Event(), Tally(), []
    begun = threading.Event()

    def pause(seconds: float) -> bool:
        begun.set()
        return stop.wait(seconds)

    def run() -> None:
        ended.append(read_ahead([file], tally, rate=1000, room=lambda: PLENTY, pause=pause))

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(30)
    stop.set()
    thread.join(30)
    assert ended == [Outcome.STOPPED]
    assert tally.read == CHUNK


def test_files_that_cant_be_read_are_passed_over(disk: Path) -> None:
    """One that is gone, a folder, a pipe that nobody writes to; what comes after them is read."""
    os.mkfifo(disk / "pipe")
    (disk / "folder").mkdir()
    last = written(disk / "last", CHUNK)
    ended, tally, _ = read(disk / "gone", disk / "folder", disk / "pipe", last)
    assert (ended, tally.read) == (Outcome.DONE, CHUNK)
    assert all(cached(last))


def test_a_file_that_shrinks_or_vanishes_meanwhile_ends_there(disk: Path) -> None:
    """Whoever replaces weights while they are read gets no error of ours."""
    shrinks, vanishes = written(disk / "a", 3 * CHUNK), written(disk / "b", 2 * CHUNK)

    class Meddling(Pace):
        def pause(self, seconds: float) -> bool:
            if not self.pauses:
                os.truncate(shrinks, CHUNK)
                vanishes.unlink()
            return super().pause(seconds)

    ended, tally, _ = read(shrinks, vanishes, pace=Meddling())
    assert (ended, tally.read, tally.total) == (Outcome.DONE, CHUNK, 5 * CHUNK)


def test_an_error_of_the_disk_ends_that_file_alone(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the engine's to tell, if it meets it."""
    broken, well = written(disk / "a", CHUNK), written(disk / "b", CHUNK)
    real = os.preadv
    failed: list[int] = []

    def preadv(file: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        if not flags and not failed:
            failed.append(file)
            raise OSError(5, "Input/output error")
        return real(file, buffers, at, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    ended, tally, _ = read(broken, well)
    assert (ended, tally.read) == (Outcome.DONE, CHUNK)
    assert failed


def test_what_doesnt_fit_into_memory_is_not_begun(disk: Path) -> None:
    """All of the weights, not the first file alone."""
    files = [written(disk / "a", CHUNK), written(disk / "b", CHUNK)]
    ended, tally, _ = read(*files, room=lambda: 2 * CHUNK - 1)
    assert (ended, tally.read, tally.total) == (Outcome.NO_ROOM, 0, 2 * CHUNK)
    assert not any(cached(files[0]))
    assert read(*files, room=lambda: 2 * CHUNK)[0] is Outcome.DONE


def test_it_is_given_up_when_memory_becomes_short_meanwhile(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is still to come; looked at now and then."""
    monkeypatch.setattr(pagecache, "LOOK_EVERY", 3)
    file = written(disk / "a", 5 * CHUNK)
    rooms = iter([PLENTY, 2 * CHUNK - 1])
    ended, tally, _ = read(file, room=lambda: next(rooms))
    assert (ended, tally.read, tally.left) == (Outcome.NO_ROOM, 3 * CHUNK, 2 * CHUNK)


def test_others_go_first_at_the_disk(disk: Path) -> None:
    """The thread that reads has the lowest priority that doesn't starve; the rest of the process keeps its own."""
    own = psutil.Process().ionice()
    found = []

    def run() -> None:
        read(written(disk / "a", 1))
        found.append(psutil.Process(threading.get_native_id()).ionice())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert [tuple(each) for each in found] == [(psutil.IOPRIO_CLASS_BE, 7)]
    assert psutil.Process().ionice() == own
