"""Stands in for what the kernel shows of AMD GPUs: the files in a folder of one's own that `AmdGpuDevice` reads."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30


@dataclass
class FakeCard:
    """One GPU on the PCI bus. Its attributes can be written at any time; ``gpu_id`` is KFD's."""

    folder: Path
    address: str
    gpu_id: str

    def write(self, **attributes: object) -> None:
        """Write attributes of the PCI device, e.g. ``mem_info_vram_used=5``."""
        for name, value in attributes.items():
            (self.folder / name).write_text(f"{value}\n")


class FakeAmdMachine:
    """A machine below ``root``, without any GPU at first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.kfd = root / "sys/class/kfd/kfd"
        (root / "proc").mkdir(parents=True)
        (root / "sys/class/drm").mkdir(parents=True)
        self.write("proc/meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: {60 << 20} kB\n")

    def write(self, path: str, text: str) -> Path:
        """Write a file below the root, and return it."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def add_card(
        self,
        address: str = "0000:03:00.0",
        *,
        number: int = 0,
        vram: int = 24 * GIB,
        gtt: int = 32 * GIB,
        driver: str = "amdgpu",
        vendor: str = "0x1002",
        apu: bool = False,
    ) -> FakeCard:
        """Add ``cardN`` at a PCI address, with an empty memory, an output and a render node."""
        folder = self.root / f"sys/devices/pci0000:00/{address}"
        folder.mkdir(parents=True)
        card = FakeCard(folder, address, gpu_id=str(10000 + number))
        card.write(vendor=vendor, device="0x744c", revision="0xc8")
        card.write(**{"class": "0x030000"})
        if driver:
            loaded = self.root / f"sys/bus/pci/drivers/{driver}"
            loaded.mkdir(parents=True, exist_ok=True)
            (folder / "driver").symlink_to(loaded)
        if driver == "amdgpu":
            card.write(mem_info_vram_total=vram, mem_info_vram_used=0, mem_info_gtt_total=gtt, mem_info_gtt_used=0)
            (folder / "gpu_metrics").write_bytes(bytes([120, 0, 2 if apu else 1, 3]) + bytes(116))
        node = folder / f"drm/renderD{128 + number}"
        node.mkdir(parents=True)
        drm = self.root / "sys/class/drm"
        for name, target in ((f"card{number}", folder / f"drm/card{number}"), (f"renderD{128 + number}", node)):
            target.mkdir(exist_ok=True)
            (target / "device").symlink_to(folder)
            (drm / name).symlink_to(target)
        (drm / f"card{number}-DP-1").mkdir()
        on_bus = self.root / "sys/bus/pci/devices"
        on_bus.mkdir(parents=True, exist_ok=True)
        (on_bus / address).symlink_to(folder)
        return card

    def add_kfd(
        self, card: FakeCard, *, bank: int, node: int = 1, gpu_id: str = "", heap: int = 1, flags: int = 0
    ) -> None:
        """Have KFD know the card, with a memory bank of that many bytes; ``flags`` are or-ed to its ``location_id``."""
        domain, bus, rest = card.address.split(":")
        slot, function = (int(part, 16) for part in rest.split("."))
        location = (int(bus, 16) << 8 | slot << 3 | function) | flags
        nodes = "sys/class/kfd/kfd/topology/nodes"
        self.write(f"{nodes}/0/gpu_id", "0\n")
        self.write(f"{nodes}/0/properties", "cpu_cores_count 16\nlocation_id 0\ndomain 0\n")
        self.write(f"{nodes}/{node}/gpu_id", f"{gpu_id or card.gpu_id}\n")
        self.write(f"{nodes}/{node}/properties", f"simd_count 96\nlocation_id {location}\ndomain {int(domain, 16)}\n")
        self.write(f"{nodes}/{node}/mem_banks/0/properties", f"heap_type {heap}\nsize_in_bytes {bank}\nflags 0\n")
        (self.kfd / "proc").mkdir(exist_ok=True)

    def holds_by_kfd(self, pid: int, card: FakeCard, size: int, *, gpu_id: str = "") -> None:
        """Have KFD say that a process holds ``size`` bytes."""
        (self.root / f"proc/{pid}").mkdir(exist_ok=True)
        self.write(f"sys/class/kfd/kfd/proc/{pid}/vram_{gpu_id or card.gpu_id}", f"{size}\n")

    def opens(self, pid: int, descriptor: int, fdinfo: str, target: str = "/dev/dri/renderD128") -> None:
        """Have a process hold a descriptor of ``target``, with what its ``fdinfo`` says."""
        self.write(f"proc/{pid}/fdinfo/{descriptor}", fdinfo)
        folder = self.root / f"proc/{pid}/fd"
        folder.mkdir(exist_ok=True)
        (folder / str(descriptor)).symlink_to(target)

    def remove(self, card: FakeCard) -> None:
        """Take the card off the bus."""
        shutil.rmtree(card.folder)
