"""The host memory that processes take."""

from __future__ import annotations

from collections.abc import Iterable

import psutil


def proportional(pids: Iterable[int]) -> int:
    """Return the bytes that processes take, shared pages divided among their users; those that have gone take none.

    Blocks for some milliseconds per process.
    """
    return sum(map(_proportional, pids))


def private(pids: Iterable[int]) -> int:
    """Return the bytes that each of these processes alone uses, in all; those that have gone use none."""
    return sum(map(_private, pids))


def _private(pid: int) -> int:
    try:
        return int(getattr(psutil.Process(pid).memory_full_info(), "uss", 0))
    except (psutil.Error, OSError):
        return 0


def _proportional(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        try:
            return int(process.memory_full_info().pss)
        except (psutil.AccessDenied, AttributeError):  # not ours to look at so closely, or a system without that number
            return int(process.memory_info().rss)
    except (psutil.Error, OSError):
        return 0
