"""Which processes hold an AMD GPU's memory: what ROCm's half of the driver (KFD) says, and what DRM says.

Facts (Linux 6.x, ``drivers/gpu/drm/amd/amdkfd``: ``kfd_topology.c``, ``kfd_process.c``, ``kfd_chardev.c``; the kernel's
documentation, "DRM client usage stats"):

- ``/sys/class/kfd/kfd/topology/nodes/N`` is a processor (``gpu_id`` 0) or a GPU. Of a GPU, ``properties`` has
  ``domain`` and ``location_id``, its PCI address: bus in bits 8-15, device in 3-7, function in 0-2. A GPU that is
  partitioned has several nodes; their number is in bits 28-31, in some versions in bits 0-2, so the function doesn't
  count here. ``mem_banks`` has the memory that the driver gives programs that ask for video memory (``heap_type`` 1
  or 2). In a container whose device cgroup doesn't allow the GPU's render node, reading any of these is refused.
- ``/sys/class/kfd/kfd/proc/PID/vram_GPUID`` is what a process has asked to be allocated there as video memory, in
  bytes, wherever the driver put it. The PIDs are those of the outermost PID namespace. Everybody may read it.
- ``/proc/PID/fdinfo/FD`` of an open render node has ``drm-driver``, ``drm-pdev`` (the PCI address),
  ``drm-client-id`` (the same for descriptors that are copies of each other), ``drm-memory-vram`` and ``-gtt`` (newer:
  ``drm-resident-…``), in bytes unless KiB or MiB follows. Only the process's own user, and root, may read it. Graphics
  and Vulkan programs appear only here; ROCm's appear in both, so the two are not added.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec

from modelswap.devices.amdcards import Card
from modelswap.devices.base import Holder
from modelswap.devices.processes import process_name

Pool = Literal["vram", "gtt"]
"""Memory of the GPU's own, or the processor's that is mapped for it."""

SCAN_SECONDS: Final = 5.0
"""All descriptors of all processes are looked through no more often: that takes up to a tenth of a second."""

_FRAME_BUFFERS: Final = (1, 2)
_UNITS: Final = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20}


class Kfd(msgspec.Struct, frozen=True):
    """What KFD says of one GPU: its nodes' ids, and how many bytes it gives to programs (None: it doesn't say)."""

    ids: tuple[str, ...] = ()
    bank: int | None = None


def look_up(card: Card, root: Path) -> Kfd:
    """Return what KFD says of ``card``; nothing where it isn't there or must not be read."""
    ids, bank = [], 0
    with contextlib.suppress(OSError):
        for node in sorted((root / "sys/class/kfd/kfd/topology/nodes").iterdir()):
            with contextlib.suppress(OSError, ValueError):
                gpu_id = (node / "gpu_id").read_text().strip()
                if gpu_id != "0" and _is_at(_properties(node / "properties"), card):
                    ids.append(gpu_id)
                    bank += sum(_banks(node))
    return Kfd(tuple(ids), bank or None)


class Holders:
    """Who holds memory of ``card``. `find` blocks."""

    def __init__(self, card: Card, root: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._card = card
        self._root = root
        self._clock = clock
        self._scanned: dict[int, int] = {}
        self._scan_again = float("-inf")

    def find(self, kfd: Kfd, pool: Pool) -> tuple[Holder, ...]:
        """Return the processes that hold memory, by PID; raises nothing, and leaves out what can't be read."""
        if self._clock() >= self._scan_again:
            self._scanned = dict(self._drm_clients(pool))
            self._scan_again = self._clock() + SCAN_SECONDS
        held = {pid: size for pid, size in self._scanned.items() if (self._root / f"proc/{pid}").exists()}
        for pid, size in self._kfd_processes(kfd):
            held[pid] = max(size, held.get(pid, 0))
        return tuple(Holder(pid, process_name(pid), size) for pid, size in sorted(held.items()) if size > 0)

    def _kfd_processes(self, kfd: Kfd) -> Iterator[tuple[int, int]]:
        for process in _numbered(self._root / "sys/class/kfd/kfd/proc"):
            size = 0
            for gpu_id in kfd.ids:
                with contextlib.suppress(OSError, ValueError):  # it has ended meanwhile
                    size += int((process / f"vram_{gpu_id}").read_text())
            yield int(process.name), size

    def _drm_clients(self, pool: Pool) -> Iterator[tuple[int, int]]:
        for process in _numbered(self._root / "proc"):
            clients: dict[str, int] = {}
            for descriptor in _render_nodes(process):
                with contextlib.suppress(OSError, ValueError):
                    said = _keys((process / "fdinfo" / descriptor).read_text())
                    if said.get("drm-driver") == "amdgpu" and said.get("drm-pdev") == self._card.address:
                        clients[said.get("drm-client-id", descriptor)] = _size(said, pool)
            if clients:
                yield int(process.name), sum(clients.values())


def _render_nodes(process: Path) -> list[str]:
    """Return the numbers of the descriptors by which a process has graphics devices open, as far as we may know."""
    folder, found = str(process / "fd"), []
    with contextlib.suppress(OSError):  # another user's, or ended meanwhile
        # Without path objects, that is twice as fast, and there are many thousands.
        for descriptor in os.listdir(folder):  # noqa: PTH208
            with contextlib.suppress(OSError):
                if os.readlink(f"{folder}/{descriptor}").startswith("/dev/dri/"):  # noqa: PTH115
                    found.append(descriptor)
    return found


def _is_at(properties: dict[str, int], card: Card) -> bool:
    domain, bus, slot, _ = card.place
    location = properties.get("location_id", -1)
    # Older kernels don't tell the domain.
    return (properties.get("domain", 0), (location & 0xFFFF) >> 3) == (domain, bus << 5 | slot)


def _banks(node: Path) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for bank in (node / "mem_banks").iterdir():
            with contextlib.suppress(OSError, ValueError):
                said = _properties(bank / "properties")
                if said.get("heap_type") in _FRAME_BUFFERS:
                    yield said.get("size_in_bytes", 0)


def _properties(path: Path) -> dict[str, int]:
    """Read lines of ``name number``; raises `OSError`, and `ValueError` if they are something else."""
    pairs = (line.rsplit(maxsplit=1) for line in path.read_text().splitlines() if line.strip())
    return {name: int(number) for name, number in pairs}


def _keys(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _size(said: dict[str, str], pool: Pool) -> int:
    number, _, unit = (said.get(f"drm-memory-{pool}") or said.get(f"drm-resident-{pool}") or "0").partition(" ")
    if (factor := _UNITS.get(unit.strip())) is None:
        raise ValueError(f"unknown unit {unit}")
    return int(number) * factor


def _numbered(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from (entry for entry in folder.iterdir() if entry.name.isdecimal())
