"""What a simulated engine says on stdout, in the manner of real ones."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import Final

from modelswap.testing.ledger import GIB, OutOfDeviceMemory

KEPT: Final = 200
"""Lines that `Log.lines` remembers."""


class Log:
    """Writes lines to stdout (if ``to_stdout``) and remembers the last ones in ``lines``."""

    def __init__(self, *, to_stdout: bool) -> None:
        self.lines: deque[str] = deque(maxlen=KEPT)
        self._to_stdout = to_stdout

    def info(self, message: str) -> None:
        """Log a line."""
        self._write("INFO", message)

    def error(self, message: str) -> None:
        """Log a line that says what went wrong."""
        self._write("ERROR", message)

    def raw(self, line: str) -> None:
        """Log a line without date and level, as tracebacks and uvicorn do."""
        self.lines.append(line)
        if self._to_stdout:
            try:
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
            except OSError:
                # Whoever read it has gone; an engine serves on.
                self._to_stdout = False

    def _write(self, level: str, message: str) -> None:
        self.raw(f"{level} {time.strftime('%m-%d %H:%M:%S')} [sim.py:1] {message}")


def log_out_of_memory(log: Log, error: OutOfDeviceMemory) -> None:
    """Say what vLLM says when the device is too full to start."""
    log.error("EngineCore failed to start.")
    log.raw("Traceback (most recent call last):")
    log.raw(
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {error.asked / GIB:.2f} GiB. GPU 0 has a total "
        f"capacity of {error.capacity / GIB:.2f} GiB of which {error.free / GIB:.2f} GiB is free. "
        f"Process {os.getpid()} could not allocate."
    )
    log.raw("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}")


def log_failed(log: Log, model: str) -> None:
    """Say what vLLM says when there is no such model."""
    log.raw("Traceback (most recent call last):")
    log.raw(f"OSError: {model} is not a local folder and is not a valid model identifier")
