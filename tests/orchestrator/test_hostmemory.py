"""How much host memory may be spent."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from modelswap.orchestrator import hostmemory
from modelswap.orchestrator.hostmemory import GIB, available, spare, total
from tests.orchestrator.fakes import Bench, config


def _cgroup(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    "files",
    [
        {"memory.max": "1000000", "memory.current": "400000"},
        {"memory/memory.limit_in_bytes": "1000000", "memory/memory.usage_in_bytes": "400000"},
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, files: dict[str, str]) -> None:
    """In a container with a memory limit, what is left of it is all there is."""
    assert available(_cgroup(tmp_path, files)) == 600_000


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory.max": "1000000",
            "memory.current": "990000",
            "memory.stat": "anon 90000\ninactive_file 500000\nactive_file 300000\nslab_reclaimable 100000",
        },
        {
            "memory/memory.limit_in_bytes": "1000000",
            "memory/memory.usage_in_bytes": "990000",
            "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 500000\ntotal_active_file 400000",
        },
    ],
)
def test_a_containers_page_cache_is_as_good_as_free(tmp_path: Path, files: dict[str, str]) -> None:
    """Weights that were read fill the container's limit, and the kernel gives that up first."""
    assert available(_cgroup(tmp_path, files)) == 910_000


def test_a_containers_limit_is_all_there_is(tmp_path: Path) -> None:
    """The reserve is a part of what the container may have, not of a machine that is many times as large."""
    root = _cgroup(tmp_path, {"memory.max": str(8 * GIB), "memory.current": "0"})
    assert total(root) == min(8 * GIB, psutil.virtual_memory().total)
    assert total(root, contained=False) == psutil.virtual_memory().total and available(root, contained=False) > 0
    assert total(tmp_path / "nowhere") == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("folder", "limit", "used", "line"),
    [
        ("system.slice", "memory.max", "memory.current", "0::/system.slice/modelswap.service"),
        ("memory/user", "memory.limit_in_bytes", "memory.usage_in_bytes", "4:cpu,memory:/user/me"),
    ],
)
def test_a_services_limit_counts(tmp_path: Path, folder: str, limit: str, used: str, line: str) -> None:
    """Of all groups that we are in, also where the whole machine's are seen (systemd's ``MemoryMax=``)."""
    own = tmp_path / "own"
    own.write_text(f"9:name=systemd:/\n{line}\n")
    root = _cgroup(tmp_path, {f"{folder}/{limit}": "1000000", f"{folder}/{used}": "400000"})
    assert available(root, own) == 600_000


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    """No limit, or none that can be read, leaves what the machine has."""
    total = psutil.virtual_memory().total
    assert 0 < available(_cgroup(tmp_path, {"memory.max": "max", "memory.current": "5"})) <= total
    assert 0 < available(tmp_path / "nowhere") <= total


def test_more_used_than_allowed_is_nothing_left(tmp_path: Path) -> None:
    """A limit that was lowered below what is used leaves nothing, not less."""
    assert available(_cgroup(tmp_path, {"memory.max": "10", "memory.current": "20"})) == 0


def test_a_reserve_is_left_alone() -> None:
    """By default a tenth of all memory stays free; on small machines never more than a quarter."""
    assert spare(None, spent=0, free=100 * GIB, total=128 * GIB) == pytest.approx(87.2 * GIB, abs=GIB // 10)
    assert spare(None, spent=0, free=4 * GIB, total=4 * GIB) == 3 * GIB
    assert spare(None, spent=50 * GIB, free=1 * GIB, total=64 * GIB) < 0


def test_a_budget_counts_what_is_spent() -> None:
    """A configured budget is for all that is spent, and never more than what is safe."""
    assert spare(8 * GIB, spent=6 * GIB, free=100 * GIB, total=128 * GIB) == 2 * GIB
    assert spare(8 * GIB, spent=9 * GIB, free=100 * GIB, total=128 * GIB) == -GIB
    assert spare(500 * GIB, spent=0, free=20 * GIB, total=128 * GIB) < 20 * GIB


async def test_our_own_limit_is_not_that_of_other_containers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts for engines that are processes of ours; what Docker hosts beside us has the machine."""
    asked: list[bool] = []

    def told(*, contained: bool) -> int:
        asked.append(contained)
        return GIB

    monkeypatch.setattr(hostmemory, "available", told)
    async with bench.running() as service:
        service.outside.memory.available()
        bench.config = config(a={"engine": "custom", "image": "server:1"})
        await service.reload()
        service.outside.memory.available()
    assert (asked[0], asked[-1]) == (True, False)
