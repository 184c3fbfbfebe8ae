"""Counts that workers keep together."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelswap.gateway import metrics
from modelswap.gateway.metrics import Metrics

LABELS = (("model", "mistral"),)


@contextlib.contextmanager
def worker(folder: Path) -> Iterator[Metrics]:
    """One worker's metrics, for a while."""
    made = Metrics(folder)
    try:
        yield made
    finally:
        made.close()


def values(made: Metrics, name: str) -> list[int]:
    """Return the sums of one metric for the test's model."""
    return made.read()[name][LABELS]


def test_workers_are_summed(tmp_path: Path) -> None:
    """Any worker tells the sum over all of them."""
    with worker(tmp_path) as one, worker(tmp_path) as two:
        one.number(metrics.FAULTS, LABELS).add(2)
        two.number(metrics.FAULTS, LABELS).add(3)
        one.number(metrics.IN_FLIGHT, LABELS).set(4)
        two.number(metrics.IN_FLIGHT, LABELS).set(5)
        for made in (one, two):
            assert values(made, metrics.FAULTS) == [5]
            assert values(made, metrics.IN_FLIGHT) == [9]


def test_counters_outlive_their_worker(tmp_path: Path) -> None:
    """A worker's counts stay when it ends, its gauges don't, and the next one counts on in its file."""
    with worker(tmp_path) as one:
        with worker(tmp_path) as two:
            two.number(metrics.FAULTS, LABELS).add(3)
            two.number(metrics.IN_FLIGHT, LABELS).set(5)
            two.series("mistral", "/v1/completions").relayed(200, 0.02, 0.3)
        assert values(one, metrics.FAULTS) == [3]
        assert LABELS not in one.read().get(metrics.IN_FLIGHT, {})
        with worker(tmp_path) as three:
            three.number(metrics.FAULTS, LABELS).add(4)
            assert values(one, metrics.FAULTS) == [7]
            assert values(one, metrics.IN_FLIGHT) == [0]
            assert len(list(tmp_path.iterdir())) == 2
        assert b'_requests_total{model="mistral",path="/v1/completions",status="200"} 1' in one.render(["mistral"])


def test_histogram_is_cumulative(tmp_path: Path) -> None:
    """Buckets count everything up to their bound, and the last one everything."""
    with worker(tmp_path) as one:
        series = one.series("mistral", "/v1/completions")
        for seconds in (0.0005, 0.001, 0.02, 700.0):
            series.relayed(200, seconds, seconds)
        text = one.render(["mistral"]).decode()
    braces = 'model="mistral",path="/v1/completions"'
    name = f"{metrics.DURATION}_bucket{{{braces}"
    assert f'{name},le="0.001"}} 2\n' in text
    assert f'{name},le="0.025"}} 3\n' in text
    assert f'{name},le="600.0"}} 3\n' in text
    assert f'{name},le="+Inf"}} 4\n' in text
    assert f"{metrics.DURATION}_count{{{braces}}} 4\n" in text
    assert f"{metrics.DURATION}_sum{{{braces}}} 700.021500\n" in text


def test_everything_is_there_at_zero(tmp_path: Path) -> None:
    """Series of configured models exist before their first request, and their labels are escaped."""
    with worker(tmp_path) as one:
        one.prepare(['a"b'], ["/v1/completions"])
        text = one.render(['a"b']).decode()
    assert r'modelswap_gateway_requests_total{model="a\"b",path="/v1/completions",status="200"} 0' in text
    assert r'modelswap_gateway_in_flight{model="a\"b"} 0' in text


def test_models_no_longer_configured_are_not_told(tmp_path: Path) -> None:
    """Counts of a model that the configuration has lost are kept, but not shown."""
    with worker(tmp_path) as one:
        one.prepare(["old", "new"], ["/v1/completions"])
        assert b'model="old"' not in one.render(["new"])
        assert b'model="old"' in one.render(["new", "old"])


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 100_000])
def test_spoilt_file_is_started_anew(tmp_path: Path, content: bytes) -> None:
    """A file that isn't ours to read is overwritten."""
    (tmp_path / "worker-0.metrics").write_bytes(content)
    with worker(tmp_path) as one:
        one.number(metrics.FAULTS, LABELS).add()
        assert values(one, metrics.FAULTS) == [1]


def test_leftovers_of_a_killed_writer_are_not_counted(tmp_path: Path) -> None:
    """A record that was being written when its worker was killed leaves nothing in the numbers of the next."""
    with worker(tmp_path) as one:
        one.number(metrics.FAULTS, LABELS)
        used = one._used
        one._map[used : used + 4096] = b"\x7f" * 4096
        one.number(metrics.RETRIES, LABELS).add()
        assert values(one, metrics.RETRIES) == [1]


def test_a_full_disk_keeps_counts_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory mapped from a disk without room would kill the worker; so its counts are its own until it ends."""

    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with worker(tmp_path) as one:
        one.number(metrics.FAULTS, LABELS).add(2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", refuse, raising=False)
            with worker(tmp_path) as two:
                two.number(metrics.FAULTS, LABELS).add(3)
                two.number(metrics.IN_FLIGHT, LABELS).set(5)
                assert values(two, metrics.FAULTS) == [5]
                assert values(two, metrics.IN_FLIGHT) == [5]
                assert values(one, metrics.FAULTS) == [2]
        with worker(tmp_path) as three:
            three.number(metrics.FAULTS, LABELS).add(4)
            assert values(one, metrics.FAULTS) == [6]
