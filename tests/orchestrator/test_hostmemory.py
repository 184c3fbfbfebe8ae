"""How much host memory may be spent."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from modelswap.orchestrator.hostmemory import GIB, available, spare


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
        {"memory.max": "1000000", "memory.current": "900000", "memory.stat": "anon 400000\ninactive_file 300000"},
        {
            "memory/memory.limit_in_bytes": "1000000",
            "memory/memory.usage_in_bytes": "900000",
            "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 300000",
        },
    ],
)
def test_files_that_the_kernel_would_drop_are_not_used_up(tmp_path: Path, files: dict[str, str]) -> None:
    """A limit counts the page cache, too: reading weights takes nothing away that couldn't be had back at once."""
    assert available(_cgroup(tmp_path, files)) == 400_000


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
