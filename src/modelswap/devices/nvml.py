"""NVIDIA GPUs, read through NVML.

Facts (nvidia-ml-py 13.615): ``nvmlDeviceGetMemoryInfo`` says Not Supported on GPUs that share the system's memory
(Jetson, GB10); there, the system's available memory is what a process can get. Process lists carry PIDs of the
outermost PID namespace, each process's memory may be None (WSL2, MIG without rights), and the list may be refused
altogether: free bytes are the truth, holders explain them. A container's process appears under its host PID, whose
``NSpid`` line in ``/proc/PID/status`` gives its number inside; seen from inside a container, host PIDs name nothing,
and such a holder has the name ``?``. NVML counts GPUs in PCI bus order, unlike CUDA, so engines want `uuid` in
``CUDA_VISIBLE_DEVICES`` rather than the index.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

from modelswap.devices.base import Holder, Reading
from modelswap.devices.errors import DeviceUnavailable, DeviceUnreadable
from modelswap.devices.processes import process_name


class NvmlDevice:
    """One GPU of ``count``. Made with `open`; what calls the driver is in one thread, since it may block."""

    kind = "nvml"

    def __init__(self, gpu: _Gpu, thread: ThreadPoolExecutor) -> None:
        self._gpu = gpu
        self._thread = thread
        self.name = gpu.name
        self.uuid = gpu.uuid
        self.count = gpu.count

    @classmethod
    def open(cls, index: int, library: Any = None) -> NvmlDevice:
        """Return GPU ``index`` (in PCI bus order), blocking while the driver initialises.

        ``library`` stands in for the module ``pynvml``. Raises `DeviceUnavailable`.
        """
        library = importlib.import_module("pynvml") if library is None else library
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nvml")
        try:
            return cls(thread.submit(_Gpu, library, index).result(), thread)
        except BaseException:
            thread.shutdown()
            raise

    async def read(self) -> Reading:
        """Return total and free memory and who holds it; raises `DeviceUnreadable` if the driver fails."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._gpu.read)

    async def aclose(self) -> None:
        """Let go of the driver; returns at once even if a call into it hangs."""
        self._thread.submit(self._gpu.close)
        self._thread.shutdown(wait=False)


class _Gpu:
    """The blocking half; used from one thread."""

    def __init__(self, library: Any, index: int) -> None:
        self._nvml = library
        self._index = index
        self._open = False
        try:
            self._begin()
        except library.NVMLError as error:
            self.close()
            raise DeviceUnavailable(_why(library, error)) from error
        except BaseException:
            self.close()
            raise

    def read(self) -> Reading:
        try:
            return self._read()
        except self._nvml.NVMLError:
            # A driver that was reloaded, or a GPU that was reset, answers again after a new beginning.
            self.close()
        try:
            self._begin()
            return self._read()
        except self._nvml.NVMLError as error:
            raise DeviceUnreadable(f"GPU {self._index} ({self.name}) can't be read: {error}") from error

    def close(self) -> None:
        if self._open:
            self._open = False
            try:
                self._nvml.nvmlShutdown()
            except self._nvml.NVMLError:
                # It was not initialised any more, which is what was wanted.
                return

    def _begin(self) -> None:
        nvml = self._nvml
        nvml.nvmlInit()
        self._open = True
        self.count = count = int(nvml.nvmlDeviceGetCount())
        if self._index >= count:
            have = "no GPU" if not count else "one GPU, index 0" if count == 1 else f"GPUs 0 to {count - 1}"
            raise DeviceUnavailable(f"there is no GPU {self._index}: NVML sees {have}; correct device.index")
        self._handle = nvml.nvmlDeviceGetHandleByIndex(self._index)
        self.name = _text(nvml.nvmlDeviceGetName(self._handle))
        self.uuid = _text(nvml.nvmlDeviceGetUUID(self._handle))

    def _read(self) -> Reading:
        holders = tuple(Holder(pid, process_name(pid), size) for pid, size in sorted(self._processes().items()))
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError as error:
            if error.value != self._nvml.NVML_ERROR_NOT_SUPPORTED:
                raise
            system = psutil.virtual_memory()
            return Reading(total=system.total, free=system.available, holders=holders)
        return Reading(total=int(memory.total), free=int(memory.free), holders=holders)

    def _processes(self) -> dict[int, int | None]:
        nvml = self._nvml
        held: dict[int, int | None] = {}
        for lister in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            for process in _listed(nvml, lister, self._handle):
                # A process with both kinds of context is listed twice, with the same total.
                held[int(process.pid)] = process.usedGpuMemory or held.get(int(process.pid))
        return held


def _listed(nvml: Any, lister: Any, handle: Any) -> Iterable[Any]:
    unanswered = (
        nvml.NVML_ERROR_NOT_SUPPORTED,
        nvml.NVML_ERROR_NO_PERMISSION,
        nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        # More processes came between its two calls than it had room for.
        nvml.NVML_ERROR_INSUFFICIENT_SIZE,
    )
    try:
        return list(lister(handle))
    except nvml.NVMLLibraryMismatchError:
        # The driver is older than the bindings.
        return []
    except nvml.NVMLError as error:
        if error.value not in unanswered:
            raise
        return []


def _text(value: str | bytes) -> str:
    # Older bindings answer with bytes.
    return value.decode() if isinstance(value, bytes) else value


def _why(nvml: Any, error: Any) -> str:
    match error.value:
        case nvml.NVML_ERROR_LIBRARY_NOT_FOUND:
            remedy = "the NVIDIA driver is not installed (libnvidia-ml.so.1 not found); on WSL2 install it in Windows"
        case nvml.NVML_ERROR_DRIVER_NOT_LOADED:
            remedy = "the NVIDIA driver is installed but not loaded; try `nvidia-smi`, or restart the machine"
        case nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            remedy = "the NVIDIA driver was updated while in use; restart the machine"
        case nvml.NVML_ERROR_NO_PERMISSION:
            remedy = "this user may not use the GPU; see the permissions of /dev/nvidia*"
        case _:
            remedy = "see what `nvidia-smi` says"
    return f"NVML: {error}: {remedy}, or set device.kind to slot"
