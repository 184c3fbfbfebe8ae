"""AMD GPUs, read from what the kernel's driver ``amdgpu`` shows in sysfs; no library of AMD's is needed.

Facts (the kernel's documentation, "Misc AMDGPU driver information", "GPU Memory Usage Information"; Linux 6.x,
``amdgpu_ttm.c``, ``amdgpu_amdkfd.c``, ``amdgpu_amdkfd_gpuvm.c``): ``mem_info_vram_total`` and ``_used`` are the bytes
of video memory and what of it is taken, by whomever; ``mem_info_gtt_total`` and ``_used`` the same of the system's
memory that the GPU can map (GTT).

**Which of both counts.** On a card with memory of its own: video memory. On an APU the firmware sets a part of the
system's memory aside as video memory, often 0.5 GiB, and the driver gives programs that use ROCm GTT instead wherever
that is the larger one (``apu_prefer_gtt``; older kernels never do). KFD says what it gives: a memory bank larger than
the video memory is GTT. Where KFD isn't there or must not be read (a container without the render node), an APU's
larger pool is taken. GTT that isn't taken yet is the system's, so no more of it is free than the system has available.
Vulkan programs on such an APU fill the part set aside first, which isn't counted then.

GPUs are counted in the order of their PCI addresses, those of other vendors left out. Who holds the memory, and why the
list may be empty: `modelswap.devices.amdholders`. In a container, host PIDs name nothing, and such a holder has the
name ``?``.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from modelswap.devices.amdcards import Card, find_cards, nodes_of, others
from modelswap.devices.amdholders import Holders, Kfd, Pool, look_up
from modelswap.devices.base import Reading
from modelswap.devices.errors import DeviceUnavailable, DeviceUnreadable

ROOT: Final = Path("/")
_SLOT: Final = "or set device.kind to slot"


class AmdGpuDevice:
    """One GPU. Made with `open`; all files are read in one worker thread, because a driver that hangs blocks.

    ``nodes`` are the device files of all AMD GPUs in their order, ``index`` is which of them this one is.
    """

    kind = "amdgpu"

    def __init__(self, gpu: _Gpu, thread: ThreadPoolExecutor) -> None:
        self._gpu = gpu
        self._thread = thread
        self.name = gpu.name
        self.index = gpu.index
        self.nodes = gpu.nodes

    @classmethod
    def open(cls, index: int, root: Path = ROOT) -> AmdGpuDevice:
        """Return GPU ``index`` (in PCI order), blocking while files are read; raises `DeviceUnavailable`.

        ``root`` is the folder that has ``sys``, ``proc``, ``dev`` and ``usr``.
        """
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="amdgpu")
        try:
            return cls(thread.submit(_Gpu, index, root).result(), thread)
        except BaseException:
            thread.shutdown()
            raise

    async def read(self) -> Reading:
        """Return total and free memory and who holds it; raises `DeviceUnreadable` if the driver doesn't say."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._gpu.read)

    async def aclose(self) -> None:
        """Return at once, even if a file can't be read to its end."""
        self._thread.shutdown(wait=False)


class _Gpu:
    """The blocking half; used from one thread."""

    def __init__(self, index: int, root: Path) -> None:
        cards = find_cards(root)
        if index >= len(cards):
            raise DeviceUnavailable(_none_there(index, cards, root))
        self.index = index
        self.nodes = tuple(nodes_of(card, root) for card in cards)
        self._card = cards[index]
        self._root = root
        self._holders = Holders(self._card, root)
        self._kfd: Kfd | None = None
        self._is_apu: bool | None = None
        self.name = self._card.name(root)
        try:
            self._memory()
        except (OSError, ValueError) as error:
            remedy = "this user may not read it" if isinstance(error, PermissionError) else "see `dmesg | grep amdgpu`"
            raise DeviceUnavailable(f"{self._told()} can't be read: {_why(error)}: {remedy}, {_SLOT}") from error

    def read(self) -> Reading:
        try:
            total, free, kfd, pool = self._memory()
        except (OSError, ValueError) as error:
            # When it is back, its KFD node may be another.
            self._kfd = None
            raise DeviceUnreadable(f"{self._told()} can't be read: {_why(error)}") from error
        return Reading(total=total, free=free, holders=self._holders.find(kfd, pool))

    def _memory(self) -> tuple[int, int, Kfd, Pool]:
        if self._kfd is None:
            self._kfd = look_up(self._card, self._root)
        kfd = self._kfd
        pool = self._pool(kfd)
        total, used = self._card.number(f"mem_info_{pool}_total"), self._card.number(f"mem_info_{pool}_used")
        if pool == "gtt":
            total = min(total, kfd.bank or total)
        free = total - used
        if pool == "gtt":
            free = min(free, _available(self._root))
        return total, max(free, 0), kfd, pool

    def _pool(self, kfd: Kfd) -> Pool:
        vram = self._card.number("mem_info_vram_total")
        if kfd.bank is not None:
            return "gtt" if kfd.bank > vram else "vram"
        if self._is_apu is None:
            # Asked once: to answer, the driver asks the GPU's firmware.
            self._is_apu = self._card.is_apu()
        return "gtt" if self._is_apu and self._card.number("mem_info_gtt_total") > vram else "vram"

    def _told(self) -> str:
        return f"GPU {self.index} ({self.name}, {self._card.address})"


def _available(root: Path) -> int:
    """Return the bytes of system memory that a program can get; raises `OSError`, `ValueError`."""
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, size = line.partition(":")
        if name == "MemAvailable":
            return int(size.split()[0]) << 10
    raise ValueError("/proc/meminfo doesn't say what is available")


def _none_there(index: int, cards: list[Card], root: Path) -> str:
    if cards:
        have = "one GPU, index 0" if len(cards) == 1 else f"GPUs 0 to {len(cards) - 1}"
        listed = ", ".join(f"{number}: {card.name(root)} at {card.address}" for number, card in enumerate(cards))
        return f"there is no AMD GPU {index}: amdgpu has {have} ({listed}); correct device.index"
    other = [
        f"{card.address} has {f'the driver {card.driver}' if card.driver else 'no driver'}" for card in others(root)
    ]
    told = f", and {', '.join(other)}" if other else ""
    remedy = f"load it (`sudo modprobe amdgpu`; `lspci -k` shows what a GPU has), {_SLOT}"
    return f"there is no AMD GPU with the driver amdgpu{told}: {remedy}"


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)
