"""What processes are called."""

from __future__ import annotations

from typing import Final

import psutil

UNKNOWN_NAME: Final = "?"


def process_name(pid: int) -> str:
    """Return the name of a process, ``?`` if there is none of that number here (any more)."""
    try:
        return psutil.Process(pid).name() or UNKNOWN_NAME
    except psutil.Error:
        return UNKNOWN_NAME
