"""The host memory that containers take."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import aiodocker

from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.client import Trouble


async def of_container(docker: aiodocker.Docker, container: str) -> int:
    """Return the bytes that a container takes beside files that it has read; 0 if Docker doesn't tell."""
    with contextlib.suppress(*Trouble):
        params = {"stream": "false", "one-shot": "true"}
        return counted(await api.call(docker, "GET", f"containers/{container}/stats", params=params))
    return 0


def counted(stats: Mapping[str, Any]) -> int:
    """Return the bytes in ``stats``, as ``GET /containers/ID/stats`` says them: what can't be dropped and read again.

    That is anonymous memory, and what lies in ``/dev/shm`` (cgroups v2; v1 tells of the latter among the mapped files).
    """
    memory = stats.get("memory_stats") or {}
    detail = memory.get("stats") or {}
    if "anon" in detail:
        return int(detail["anon"]) + int(detail.get("shmem") or 0)
    return int(detail.get("total_rss") or detail.get("rss") or memory.get("usage") or 0)
