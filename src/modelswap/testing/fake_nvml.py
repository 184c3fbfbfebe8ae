"""Stands in for the module ``pynvml`` where there is no GPU."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import ClassVar

import msgspec


class NVMLError(Exception):
    """As pynvml's: ``value`` is the driver's error code."""

    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


class NVMLLibraryMismatchError(Exception):
    """As pynvml's: the driver has no such function."""


class FakeMemory(msgspec.Struct, frozen=True):
    """As pynvml's memory info, in bytes."""

    total: int
    free: int
    used: int


class FakeProcess(msgspec.Struct, frozen=True):
    """As pynvml's process info; memory None is its ``N/A``."""

    pid: int
    usedGpuMemory: int | None = None  # noqa: N815  (pynvml's name)


@dataclass
class FakeNvml:
    """One driver. Its fields may be changed at any time.

    ``fail`` maps a function's name to the error code it raises; ``mismatched`` functions are unknown to the driver.
    ``threads`` collects the threads it was called from, ``initialised`` counts inits without a shutdown.
    """

    total: int = 80 << 30
    free: int = 79 << 30
    gpus: int = 1
    compute: list[FakeProcess] = field(default_factory=list)
    graphics: list[FakeProcess] = field(default_factory=list)
    fail: dict[str, int] = field(default_factory=dict)
    mismatched: set[str] = field(default_factory=set)
    threads: set[int] = field(default_factory=set)
    initialised: int = 0

    NVMLError: ClassVar[type[Exception]] = NVMLError
    NVMLLibraryMismatchError: ClassVar[type[Exception]] = NVMLLibraryMismatchError
    NVML_ERROR_UNINITIALIZED: ClassVar[int] = 1
    NVML_ERROR_NOT_SUPPORTED: ClassVar[int] = 3
    NVML_ERROR_NO_PERMISSION: ClassVar[int] = 4
    NVML_ERROR_INSUFFICIENT_SIZE: ClassVar[int] = 7
    NVML_ERROR_DRIVER_NOT_LOADED: ClassVar[int] = 9
    NVML_ERROR_LIBRARY_NOT_FOUND: ClassVar[int] = 12
    NVML_ERROR_FUNCTION_NOT_FOUND: ClassVar[int] = 13
    NVML_ERROR_GPU_IS_LOST: ClassVar[int] = 15
    NVML_ERROR_LIB_RM_VERSION_MISMATCH: ClassVar[int] = 18

    def nvmlInit(self) -> None:
        """Load the driver."""
        self._called("nvmlInit", needs_init=False)
        self.initialised += 1

    def nvmlShutdown(self) -> None:
        """Let go of it."""
        self._called("nvmlShutdown")
        self.initialised -= 1

    def nvmlDeviceGetCount(self) -> int:
        """Return how many GPUs there are."""
        self._called("nvmlDeviceGetCount")
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        """Return a GPU's handle."""
        self._called("nvmlDeviceGetHandleByIndex")
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        """Return a GPU's name, as bytes like older bindings."""
        self._called("nvmlDeviceGetName")
        return f"Fake GPU {handle}".encode()

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        """Return a GPU's UUID."""
        self._called("nvmlDeviceGetUUID")
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> FakeMemory:
        """Return total and free memory."""
        self._called("nvmlDeviceGetMemoryInfo")
        return FakeMemory(self.total, self.free, self.total - self.free)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[FakeProcess]:
        """Return who holds a compute context."""
        self._called("nvmlDeviceGetComputeRunningProcesses")
        return list(self.compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[FakeProcess]:
        """Return who holds a graphics context."""
        self._called("nvmlDeviceGetGraphicsRunningProcesses")
        return list(self.graphics)

    def _called(self, name: str, *, needs_init: bool = True) -> None:
        self.threads.add(threading.get_ident())
        if name in self.fail:
            raise NVMLError(self.fail[name])
        if name in self.mismatched:
            raise NVMLLibraryMismatchError(name)
        if needs_init and self.initialised <= 0:
            raise NVMLError(self.NVML_ERROR_UNINITIALIZED)
