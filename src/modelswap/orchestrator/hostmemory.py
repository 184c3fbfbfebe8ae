"""How much host memory may be spent on being quick: sleeping engines and engines on standby."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import psutil

GIB: Final = 1 << 30
RESERVE_SHARE: Final = 0.1
LEAST_RESERVE: Final = 2 * GIB
"""What is left alone: a tenth of all, and at least this much, so that the kernel's OOM killer has no reason to act."""


class _Names(NamedTuple):
    """Where a version of control groups has its files, and what it calls the pages that the kernel gives up first."""

    controller: str
    folder: str
    limit: str
    used: str
    reclaimable: tuple[str, ...]


_VERSIONS: Final = (
    _Names("", ".", "memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable")),
    _Names(
        "memory",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)
_ROOT: Final = Path("/sys/fs/cgroup")
_OWN: Final = Path("/proc/self/cgroup")


def available(root: Path = _ROOT, own: Path = _OWN, *, contained: bool = True) -> int:
    """Return the bytes of host memory that could be had now; ``contained``: within our own container's limit, if any.

    What a container has used counts without its page cache, as the machine's does: reading weights fills that, and
    the kernel gives it up before it kills anybody.
    """
    free = int(psutil.virtual_memory().available)
    limits = _limits(root, own) if contained else ()
    return min([free, *(max(0, limit - used) for limit, used in limits)])


def total(root: Path = _ROOT, own: Path = _OWN, *, contained: bool = True) -> int:
    """Return the bytes of host memory that there are in all; ``contained``: as `available` has it."""
    limits = _limits(root, own) if contained else ()
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in limits)])


def spare(budget: int | None, spent: int, free: int, total: int) -> int:
    """Return the bytes that may still be spent; negative if too much is.

    ``budget`` is the config's (None: whatever is safe), ``spent`` what sleepers and standbys take now, ``free`` what
    the host has `available`, ``total`` all it has.
    """
    reserve = max(LEAST_RESERVE, int(total * RESERVE_SHARE))
    safe = free - min(reserve, total // 4)
    return safe if budget is None else min(safe, budget - spent)


def _limits(root: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of our own control group and of those above it, where they have a limit."""
    for names in _VERSIONS:
        top = root / names.folder
        for group in (top, *_inside(top, own, names.controller)):
            limit, used = _number(group / names.limit), _number(group / names.used)
            if limit is not None and used is not None:
                yield limit, max(0, used - _reclaimable(group / "memory.stat", names.reclaimable))


def _inside(top: Path, own: Path, controller: str) -> Iterator[Path]:
    """Yield the folders below ``top`` that lead to our own group; none in a container, which sees only its own."""
    for line in _text(own).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(","):
            folder = top
            for part in Path(path).parts[1:]:
                folder = folder / part
                yield folder


def _reclaimable(path: Path, names: tuple[str, ...]) -> int:
    lines = (line.split() for line in _text(path).splitlines())
    return sum(int(line[1]) for line in lines if len(line) == 2 and line[0] in names and line[1].isdecimal())


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
