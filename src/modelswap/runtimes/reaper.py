"""Orphans: take them in, so that no zombie is left when whoever started an engine has gone (Linux)."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Collection
from typing import Final

from modelswap.runtimes.procfs import pids, stat

_PR_SET_CHILD_SUBREAPER: Final = 36


def become_subreaper() -> bool:
    """Have the kernel give us the orphans among our descendants; returns whether it does (Linux only).

    Who calls this must call `reap_orphans` from time to time (on SIGCHLD, say).
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def reap_orphans(ours: Collection[int]) -> list[int]:
    """Collect our zombie children that are not in ``ours``; returns their PIDs.

    ``ours`` are the PIDs of all children that the caller started itself: asyncio or subprocess collects those, and
    would never hear of their exit codes if we did.
    """
    if sys.platform != "linux":
        return []
    reaped = []
    us = os.getpid()
    for pid in set(pids()).difference(ours):
        found = stat(pid)
        if found is None or found.parent != us or found.state != "Z":
            continue
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                reaped.append(pid)
        except ChildProcessError:  # another thread was faster
            continue
    return reaped
