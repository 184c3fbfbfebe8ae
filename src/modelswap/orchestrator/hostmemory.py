"""How much host memory may be spent on being quick: sleeping engines and engines on standby."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import psutil

GIB: Final = 1 << 30
RESERVE_SHARE: Final = 0.1
LEAST_RESERVE: Final = 2 * GIB
"""What is left alone: a tenth of all, and at least this much, so that the kernel's OOM killer has no reason to act."""

_CGROUP_2: Final = ("memory.max", "memory.current", "memory.stat", "inactive_file")
_CGROUP_1: Final = (
    "memory/memory.limit_in_bytes",
    "memory/memory.usage_in_bytes",
    "memory/memory.stat",
    "total_inactive_file",
)


def available(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of host memory that could be had now, within our own container's limit if it has one.

    Cached files that nobody has read twice lately can be had: the kernel drops them first, and no tool counts them
    as used (``docker stats``, kubelet), though a limit's own count does.
    """
    free = int(psutil.virtual_memory().available)
    for limit_name, used_name, details, droppable in (_CGROUP_2, _CGROUP_1):
        limit, used = _number(root / limit_name), _number(root / used_name)
        if limit is not None and used is not None:
            free = min(free, max(0, limit - max(0, used - _detail(root / details, droppable))))
    return free


def spare(budget: int | None, spent: int, free: int, total: int) -> int:
    """Return the bytes that may still be spent; negative if too much is.

    ``budget`` is the config's (None: whatever is safe), ``spent`` what sleepers and standbys take now, ``free`` what
    the host has `available`, ``total`` all it has.
    """
    reserve = max(LEAST_RESERVE, int(total * RESERVE_SHARE))
    safe = free - min(reserve, total // 4)
    return safe if budget is None else min(safe, budget - spent)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _detail(path: Path, wanted: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    found = next((value for name, _, value in (line.partition(" ") for line in lines) if name == wanted), "")
    return int(found) if found.isdecimal() else 0
