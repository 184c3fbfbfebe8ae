"""Ties a service to the process that supervises it, so that it ends when its supervisor is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from typing import Final

PARENT: Final = "MODELSWAP_PARENT"
"""The environment variable in which a supervisor tells its children its PID."""

_PR_SET_PDEATHSIG: Final = 1
_LOOK_EVERY: Final = 0.5


def tie_to_parent() -> None:
    """Have ourselves sent SIGTERM when the supervisor named in the environment dies; without one, do nothing.

    Linux does this by itself. Elsewhere a thread looks every half second whether we still have the same parent.
    """
    told = os.environ.pop(PARENT, "")
    if not told.isdecimal():
        return
    parent = int(told)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), name="parent-watch", daemon=True).start()
    if os.getppid() != parent:  # it died before we could ask to be told
        raise SystemExit(128 + signal.SIGTERM)


def _watch(parent: int) -> None:
    pause = threading.Event()
    while os.getppid() == parent:
        pause.wait(_LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
