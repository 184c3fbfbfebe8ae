"""Which process a PID names: number and creation time together are an identity, the number alone is not."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_HAS_PROC: Final = Path("/proc/self/stat").is_file()


def born(pid: int) -> float | None:
    """Return when process ``pid`` was created; None if it has ended (a zombie has: it holds no memory).

    The value is only good for comparing with another one from here: on Linux it counts clock ticks since boot,
    elsewhere seconds.
    """
    if not _HAS_PROC:
        return _born_by_psutil(pid)
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may itself hold spaces and parentheses.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in b"ZX" else float(fields[19])


def _born_by_psutil(pid: int) -> float | None:
    # Imported late: a simulated engine must start fast.
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
