"""The device that is measured: a GPU as NVML sees it, or, to rehearse on the CPU, a simulated one's ledger."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final, Protocol

from modelswap.devices.errors import DeviceUnavailable
from modelswap.devices.nvml import NvmlDevice
from modelswap.testing.ledger import Ledger

LOOK_EVERY: Final = 0.001
"""Seconds between looks at free memory: the driver's answer takes some of it."""


class Device(Protocol):
    """What the parts of the benchmark need to know of it. ``total`` in bytes."""

    name: str
    driver: str
    total: int
    config: dict[str, Any]
    """The ``device`` section of modelswap's config."""
    options: list[str]
    """The options of everything that runs in the engines' Python."""
    env: dict[str, str]

    def free(self) -> int:
        """Return the free bytes."""
        ...


class Gpu:
    """GPU number ``index``; raises `modelswap.devices.errors.DeviceUnavailable`, which says what to do."""

    def __init__(self, index: int) -> None:
        import pynvml

        self._nvml = pynvml
        uuid = NvmlDevice.open(index).uuid  # it says why a driver doesn't answer
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        self.name = str(pynvml.nvmlDeviceGetName(self._handle))
        self.driver = str(pynvml.nvmlSystemGetDriverVersion())
        try:
            self.total = int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).total)
        except pynvml.NVMLError as error:
            raise DeviceUnavailable(f"{self.name} has no memory of its own to measure ({error})") from error
        self.config: dict[str, Any] = {"kind": "nvml", "index": index}
        self.options = ["--device", "cuda"]
        # NVML and CUDA count differently; with one GPU there is nothing to mistake.
        self.env = {"CUDA_VISIBLE_DEVICES": uuid} if pynvml.nvmlDeviceGetCount() > 1 else {}

    def free(self) -> int:
        """Return the free bytes."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).free)


class Rehearsal:
    """Twice ``size`` bytes of pretended device memory, kept in a ledger in ``folder``."""

    def __init__(self, folder: Path, size: int) -> None:
        self.name = "CPU, a rehearsal"
        self.driver = "none"
        self.total = 2 * size
        self.ledger = Ledger.create(folder / "gpu.json", self.total)
        self.config: dict[str, Any] = {"kind": "simulated", "ledger": str(self.ledger.path)}
        self.options = ["--device", "cpu", "--ledger", str(self.ledger.path)]
        self.env: dict[str, str] = {}

    def free(self) -> int:
        """Return the free bytes."""
        return self.ledger.read().free


def until_free(device: Device, wanted: int, since: float, limit: float) -> float | None:
    """Return the seconds from ``since`` (`time.perf_counter`) until ``wanted`` bytes are free; None past ``limit``."""
    while True:
        free, now = device.free(), time.perf_counter()
        if free >= wanted:
            return max(now - since, 0.0)
        if now - since > limit:
            return None
        time.sleep(LOOK_EVERY)
