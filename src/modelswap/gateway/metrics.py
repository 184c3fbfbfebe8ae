"""Metrics that all workers of a gateway keep together, each in a memory-mapped file of its own.

Requests are counted in the process and written down at each tick, other things at once. Whichever worker is asked sums
over all files. A worker that dies leaves its file behind, and the next one that starts goes on counting in it, so that
sums never fall. A file is in use as long as its lock is held, which ends with the process, however it ends; gauges
count only while it is.

A file is a header and then records, appended and never moved: key length, key, kind, values. All numbers are
64-bit integers (sums of seconds in microseconds).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import structlog

_MAGIC: Final = b"mswpgw01"
_FILE_BYTES: Final = 8 * 1024 * 1024
_HEADER: Final = struct.Struct("8sQ")
_RECORD: Final = struct.Struct("QQ")
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
"""Upper bounds of the histograms' buckets, in seconds."""

REQUESTS: Final = "modelswap_gateway_requests_total"
FIRST_BYTE: Final = "modelswap_gateway_time_to_first_byte_seconds"
DURATION: Final = "modelswap_gateway_request_duration_seconds"
IN_FLIGHT: Final = "modelswap_gateway_in_flight"
WAITING: Final = "modelswap_gateway_waiting"
QUEUE_WAIT: Final = "modelswap_gateway_queue_wait_seconds"
RETRIES: Final = "modelswap_gateway_stale_connections_total"
FAULTS: Final = "modelswap_gateway_faults_total"
CONNECTS: Final = "modelswap_gateway_upstream_connects_total"
CONNECTIONS: Final = "modelswap_gateway_client_connections"
CONNECTED: Final = "modelswap_gateway_orchestrator_connected"
LOOP_LAG: Final = "modelswap_gateway_loop_lag_seconds"

_HELP: Final = {
    REQUESTS: ("counter", "Requests answered; status 499 is a client that left before its response began."),
    FIRST_BYTE: ("histogram", "From a request's head to the first byte of its engine's response, waiting included."),
    DURATION: ("histogram", "From a request's head to the last byte of its response."),
    IN_FLIGHT: ("gauge", "Requests running at engines."),
    WAITING: ("gauge", "Requests that wait for their model or for a slot."),
    QUEUE_WAIT: ("histogram", "How long admitted requests had waited, of those that had to."),
    RETRIES: ("counter", "Requests sent again because a reused connection turned out to be closed."),
    FAULTS: ("counter", "Fresh connections to engines that failed before a response's first byte."),
    CONNECTS: ("counter", "Connections made to engines."),
    CONNECTIONS: ("gauge", "Open connections of clients."),
    CONNECTED: ("gauge", "Workers that are connected to the orchestrator."),
    LOOP_LAG: ("histogram", "How late the event loop was, at each tick."),
}

Labels = tuple[tuple[str, str], ...]

_log = structlog.get_logger(__name__)


class _Key(msgspec.Struct, frozen=True, array_like=True):
    name: str
    labels: tuple[tuple[str, str], ...]


class Number:
    """One counter or gauge."""

    __slots__ = ("_at", "_view")

    def __init__(self, view: memoryview, at: int) -> None:
        self._view = view
        self._at = at

    def add(self, n: int = 1) -> None:
        """Count."""
        self._view[self._at] += n

    def set(self, value: int) -> None:
        """Give a gauge its value."""
        self._view[self._at] = value


class Histogram:
    """One histogram of seconds."""

    __slots__ = ("_at", "_view")

    def __init__(self, view: memoryview, at: int) -> None:
        self._view = view
        self._at = at

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        view = self._view
        at = self._at
        view[at] += int(seconds * 1e6)
        view[at + 1 + bisect_left(BUCKETS, seconds)] += 1

    def add(self, seconds: float, buckets: list[int]) -> None:
        """Count many durations, given their sum and how many were in each bucket."""
        view = self._view
        view[self._at] += int(seconds * 1e6)
        for at, n in enumerate(buckets, self._at + 1):
            view[at] += n


class Series:
    """What is counted for one model on one path, since it was last written down."""

    __slots__ = (
        "_durations",
        "_first_bytes",
        "_labels",
        "_metrics",
        "_noted",
        "_statuses",
        "_sum_of_durations",
        "_sum_of_first_bytes",
    )

    def __init__(self, metrics: Metrics, model: str, path: str) -> None:
        self._metrics = metrics
        self._labels: Labels = (("model", model), ("path", path))
        self._noted = False
        self._statuses: dict[int, int] = {}
        self._first_bytes = [0] * (len(BUCKETS) + 1)
        self._durations = [0] * (len(BUCKETS) + 1)
        self._sum_of_first_bytes = 0.0
        self._sum_of_durations = 0.0

    def relayed(self, status: int, first_byte: float, duration: float) -> None:
        """Count a response of an engine: the seconds from its request to its first byte, and to its end."""
        self._sum_of_first_bytes += first_byte
        self._first_bytes[bisect_left(BUCKETS, first_byte)] += 1
        self._sum_of_durations += duration
        self._durations[bisect_left(BUCKETS, duration)] += 1
        if self._noted and status in self._statuses:
            self._statuses[status] += 1
        else:
            self.count(status)

    def ended(self, status: int, duration: float) -> None:
        """Count a request that no engine's response was there for."""
        self._sum_of_durations += duration
        self._durations[bisect_left(BUCKETS, duration)] += 1
        self.count(status)

    def count(self, status: int) -> None:
        """Count a request that was answered with ``status``."""
        try:
            self._statuses[status] += 1
        except KeyError:
            self._statuses[status] = 1
        if not self._noted:
            self._noted = True
            self._metrics.changed.append(self)

    def prepare(self, status: int) -> None:
        """Make everything at zero, and the counter of this status."""
        self._statuses.setdefault(status, 0)
        self.write_down()

    def write_down(self) -> None:
        """Add what was counted to the worker's file."""
        self._noted = False
        metrics = self._metrics
        for status, n in self._statuses.items():
            metrics.number(REQUESTS, (*self._labels, ("status", str(status)))).add(n)
            self._statuses[status] = 0
        metrics.histogram(FIRST_BYTE, self._labels).add(self._sum_of_first_bytes, self._first_bytes)
        metrics.histogram(DURATION, self._labels).add(self._sum_of_durations, self._durations)
        self._sum_of_first_bytes = self._sum_of_durations = 0.0
        for i in range(len(BUCKETS) + 1):
            self._first_bytes[i] = self._durations[i] = 0


class Metrics:
    """One worker's counts, and the sum over all workers that share ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._fd, self._map, self._shared = _claim(folder)
        self._view = memoryview(self._map).cast("q")
        self._used: int = _HEADER.unpack_from(self._map)[1]
        self._places: dict[_Key, int] = {}
        self._series: dict[tuple[str, str], Series] = {}
        self.changed: list[Series] = []
        """The series in which something has been counted since `write_down`."""
        for key, at, length in _records(self._map):
            self._places[key] = at
            if _HELP.get(key.name, ("", ""))[0] == "gauge":
                for place in range(at, at + length):
                    self._view[place] = 0

    def close(self) -> None:
        """Give the file up to the next worker."""
        self.write_down()
        self._view.release()
        self._map.close()
        os.close(self._fd)

    def number(self, name: str, labels: Labels = ()) -> Number:
        """Return the counter or gauge of that name, made at zero if new."""
        return Number(self._view, self.place(name, labels))

    def histogram(self, name: str, labels: Labels = ()) -> Histogram:
        """Return the histogram of that name, made at zero if new."""
        return Histogram(self._view, self.place(name, labels))

    def place(self, name: str, labels: Labels) -> int:
        """Return where the values of that name are in memory, as an index."""
        return self._place(_Key(name, labels), len(BUCKETS) + 2 if _HELP[name][0] == "histogram" else 1)

    def series(self, model: str, path: str) -> Series:
        """Return what is counted for ``model`` (empty if none was found) on ``path``, both from bounded sets."""
        series = self._series.get((model, path))
        if series is None:
            series = self._series[model, path] = Series(self, model, path)
        return series

    def prepare(self, models: Iterable[str], paths: Sequence[str]) -> None:
        """Make the series of every model at zero, so that rates can be computed from their first request on."""
        for model in models:
            self.number(IN_FLIGHT, (("model", model),))
            self.number(WAITING, (("model", model),))
            self.number(FAULTS, (("model", model),))
            self.number(RETRIES, (("model", model),))
            self.number(CONNECTS, (("model", model),))
            self.histogram(QUEUE_WAIT, (("model", model),))
            for path in paths:
                self.series(model, path).prepare(200)

    def write_down(self) -> None:
        """Write to memory that outlives this process what was counted since the last time."""
        changed, self.changed = self.changed, []
        for series in changed:
            series.write_down()

    def read(self) -> dict[str, dict[Labels, list[int]]]:
        """Return the sums over all workers by name and labels."""
        self.write_down()
        sums: dict[str, dict[Labels, list[int]]] = {}
        for path in sorted(self._folder.glob("worker-*.metrics")):
            _add(sums, _read_file(path))
        if not self._shared:
            _add(sums, _values(self._map, alive=True))
        return sums

    def render(self, models: Collection[str]) -> bytes:
        """Return the sums in Prometheus' text format, of these ``models`` only (and of what has no model)."""
        sums = self.read()
        out: list[str] = []
        for name, (kind, text) in _HELP.items():
            out.append(f"# HELP {name} {text}\n# TYPE {name} {kind}\n")
            for labels, values in sorted(sums.get(name, {}).items()):
                if dict(labels).get("model", "") not in ("", *models):
                    continue
                if kind == "histogram":
                    out.extend(_histogram_lines(name, labels, values))
                else:
                    out.append(f"{name}{_braces(labels)} {values[0]}\n")
        return "".join(out).encode()

    def _place(self, key: _Key, length: int) -> int:
        at = self._places.get(key)
        if at is not None:
            return at
        raw = msgspec.json.encode(key)
        raw = raw.ljust(-(-len(raw) // 8) * 8)
        start = self._used
        at = (start + _RECORD.size + len(raw)) // 8
        if (at + length) * 8 > _FILE_BYTES:
            # Labels come from bounded sets, so only an absurd configuration gets here; it loses detail.
            raise MemoryError("the gateway's metrics file is full")
        _RECORD.pack_into(self._map, start, len(raw), length)
        self._map[start + _RECORD.size : start + _RECORD.size + len(raw)] = raw
        self._map[at * 8 : (at + length) * 8] = bytes(length * 8)  # a writer killed just here may have left bytes
        self._used = (at + length) * 8
        _HEADER.pack_into(self._map, 0, _MAGIC, self._used)  # last, so that readers see whole records
        self._places[key] = at
        return at


def _add(sums: dict[str, dict[Labels, list[int]]], counted: Iterable[tuple[_Key, list[int]]]) -> None:
    for key, values in counted:
        sums_of_name = sums.setdefault(key.name, {})
        known = sums_of_name.get(key.labels)
        if known is None:
            sums_of_name[key.labels] = values
        else:
            for i, value in enumerate(values[: len(known)]):
                known[i] += value


def _claim(folder: Path) -> tuple[int, mmap.mmap, bool]:
    """Return a file that is ours from now on, with its memory; False: the disk is full, and only we see the memory."""
    n = 0
    while True:
        path = folder / f"worker-{n}.metrics"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            n += 1
            continue
        shared = _reserve(fd)
        if not shared:
            _log.warning("metrics_not_shared", path=str(path), remedy="the disk is full; free some space and restart")
        mapped = mmap.mmap(fd if shared else -1, _FILE_BYTES)
        magic, used = _HEADER.unpack_from(mapped)
        if magic != _MAGIC or not _HEADER.size <= used <= _FILE_BYTES:
            mapped[:] = bytes(_FILE_BYTES)
            _HEADER.pack_into(mapped, 0, _MAGIC, _HEADER.size)
        return fd, mapped, shared


def _reserve(fd: int) -> bool:
    """Make a file as long as it must be, all of it on the disk; False if that is full.

    Writing to mapped memory for which the disk has no room kills the process (SIGBUS).
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, _FILE_BYTES)
        os.ftruncate(fd, _FILE_BYTES)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        os.ftruncate(fd, 0)  # so that nobody reads it
        return False
    return True


def _records(mapped: mmap.mmap) -> Iterator[tuple[_Key, int, int]]:
    _, used = _HEADER.unpack_from(mapped)
    pos = _HEADER.size
    while pos + _RECORD.size <= used:
        key_bytes, length = _RECORD.unpack_from(mapped, pos)
        pos += _RECORD.size
        key = msgspec.json.decode(mapped[pos : pos + key_bytes], type=_Key)
        pos += key_bytes
        yield key, pos // 8, length
        pos += length * 8


def _read_file(path: Path) -> Iterator[tuple[_Key, list[int]]]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size < _FILE_BYTES:
            return  # its worker has made it a moment ago
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            alive = False
        except BlockingIOError:
            alive = True
        with mmap.mmap(fd, _FILE_BYTES, prot=mmap.PROT_READ) as mapped:
            if _HEADER.unpack_from(mapped)[0] == _MAGIC:
                yield from _values(mapped, alive=alive)
    finally:
        os.close(fd)


def _values(mapped: mmap.mmap, *, alive: bool) -> Iterator[tuple[_Key, list[int]]]:
    for key, at, length in _records(mapped):
        if alive or _HELP.get(key.name, ("", ""))[0] != "gauge":
            yield key, list(struct.unpack_from(f"{length}q", mapped, at * 8))


def _histogram_lines(name: str, labels: Labels, values: list[int]) -> Iterator[str]:
    total = 0
    for bound, n in zip((*BUCKETS, None), values[1:], strict=True):
        total += n
        le = "+Inf" if bound is None else repr(bound)
        yield f"{name}_bucket{_braces((*labels, ('le', le)))} {total}\n"
    yield f"{name}_sum{_braces(labels)} {values[0] / 1e6:.6f}\n"
    yield f"{name}_count{_braces(labels)} {total}\n"


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{_escape(value)}"' for key, value in labels) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
