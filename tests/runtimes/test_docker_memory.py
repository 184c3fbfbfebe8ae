from __future__ import annotations

from modelswap.runtimes.docker.memory import counted


def test_memory_is_read_from_either_kind_of_cgroups() -> None:
    """Files that were read don't count where the kernel tells them apart; what lies in /dev/shm does."""
    assert counted({"memory_stats": {"usage": 9, "stats": {"anon": 5, "file": 4}}}) == 5
    assert counted({"memory_stats": {"usage": 12, "stats": {"anon": 5, "shmem": 2, "file": 6}}}) == 7
    assert counted({"memory_stats": {"usage": 9, "stats": {"rss": 3, "total_rss": 4}}}) == 4
    assert counted({"memory_stats": {"usage": 9}}) == 9
    assert counted({}) == 0
