"""What a test process may hold of a device: on a GPU the driver knows, on the CPU a simulated device's ledger.

Runs in the engines' Python. The ledger is modelswap's own, so a rehearsal on the CPU needs `msgspec` there.
"""

from __future__ import annotations

import os
from typing import Any


class Account:
    """One process's memory on ``device`` (``cuda`` or ``cpu``, which needs the path of a ``ledger``)."""

    def __init__(self, device: str, ledger: str | None, name: str) -> None:
        self._name = name
        self._ledger: Any = None
        if device == "cpu":
            from modelswap.testing.ledger import Ledger

            self._ledger = Ledger(str(ledger))

    def hold(self, size: int, *, residue: bool = False) -> None:
        """Hold ``size`` bytes from now on; ``residue``: as a sleeper. Raises `MemoryError` if there are not so many."""
        if self._ledger is not None:
            self._ledger.allocate(size, instance=f"{self._name}-{os.getpid()}", name=self._name, residue=residue)

    def room(self) -> tuple[int, int]:
        """Return the free and all bytes of the device."""
        if self._ledger is not None:
            read = self._ledger.read()
            return read.free, read.capacity
        import torch

        free, total = torch.cuda.mem_get_info()
        return free, total
