"""Which AMD GPUs this machine has, and what the kernel's driver ``amdgpu`` says of them in sysfs.

Facts (the kernel's documentation, "Misc AMDGPU driver information"; ROCm's documentation, "Running ROCm Docker
containers"): a GPU is ``/sys/class/drm/cardN`` with ``device`` pointing to its PCI device, whose ``vendor`` is
``0x1002`` and whose ``driver`` points to ``amdgpu``. The numbers of cards change between boots, PCI addresses don't.
``product_name`` is there only for boards with a FRU EEPROM; libdrm's ``amdgpu.ids`` has the marketing names of most
others. Programs open the GPU's render node, and with ROCm ``/dev/kfd``, which all GPUs share; both belong to the group
``render`` (or ``video``), whose id differs from one distribution to another. Within containers sysfs is the host's.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Final

import msgspec

AMD: Final = "0x1002"
_NVIDIA: Final = "0x10de"
_DISPLAY: Final = "0x03"
"""How the PCI class of graphics adapters and of GPUs without outputs begins."""
_DRIVER: Final = "amdgpu"
_CARD: Final = re.compile(r"card[0-9]+")
_ADDRESS: Final = re.compile(r"([0-9a-f]{4,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")
_OF_APUS: Final = (2, 3)
"""``format_revision`` of ``gpu_metrics`` (the kernel's ``kgd_pp_interface.h``): 1 for cards, 2 and 3 for APUs."""


class Nodes(msgspec.Struct, frozen=True):
    """The device files by which programs use one GPU, and the ids of the groups that may open them.

    ``groups`` is empty where the files can't be seen, as in a container that was given none.
    """

    paths: tuple[str, ...]
    groups: tuple[int, ...] = ()


class Card(msgspec.Struct, frozen=True):
    """One AMD GPU. ``folder`` is its PCI device's folder in sysfs, ``address`` e.g. ``0000:03:00.0``."""

    folder: Path
    address: str
    driver: str

    @property
    def place(self) -> tuple[int, int, int, int]:
        """PCI domain, bus, device and function."""
        found = _ADDRESS.fullmatch(self.address)
        assert found is not None  # noqa: S101 - else it would not have been found
        domain, bus, slot, function = (int(part, 16) for part in found.groups())
        return domain, bus, slot, function

    def number(self, name: str) -> int:
        """Return what the attribute ``name`` says; raises `OSError`, and `ValueError` if that is no number."""
        return int((self.folder / name).read_text())

    def name(self, root: Path) -> str:
        """Return what people call it, as far as that can be told."""
        name = _text(self.folder / "product_name") or _marketing_name(self, root)
        device = _text(self.folder / "device").removeprefix("0x") or "?"
        return name or f"AMD GPU 1002:{device}"

    def is_apu(self) -> bool:
        """Return whether it is known to share the processor's memory."""
        try:
            with (self.folder / "gpu_metrics").open("rb") as file:
                header = file.read(4)
        except OSError:  # older than Renoir, or asleep for good
            return False
        # struct metrics_table_header: the structure's size (16 bit), format revision, content revision.
        return len(header) == 4 and header[2] in _OF_APUS


def find_cards(root: Path) -> list[Card]:
    """Return the GPUs with the driver ``amdgpu``, in the order of their PCI addresses."""
    return [card for card in _all_cards(root) if card.driver == _DRIVER]


def others(root: Path) -> list[Card]:
    """Return AMD's GPUs that have another driver, or none."""
    return [card for card in _all_cards(root) if card.driver != _DRIVER]


def has_nvidia(root: Path) -> bool:
    """Return whether an NVIDIA GPU is on the PCI bus, whether it has a driver or not."""
    with contextlib.suppress(OSError):
        for device in (root / "sys/bus/pci/devices").iterdir():
            if _text(device / "vendor") == _NVIDIA and _text(device / "class").startswith(_DISPLAY):
                return True
    return False


def nodes_of(card: Card, root: Path) -> Nodes:
    """Return by which device files programs use ``card``: ROCm's, where the kernel has it, and its render node."""
    paths = ["/dev/kfd"] if (root / "sys/class/kfd/kfd").exists() else []
    with contextlib.suppress(OSError):
        paths += sorted(f"/dev/dri/{each.name}" for each in (card.folder / "drm").glob("renderD*"))
    groups = set[int]()
    for path in paths:
        with contextlib.suppress(OSError):
            groups.add((root / path.lstrip("/")).stat().st_gid)
    return Nodes(tuple(paths), tuple(sorted(groups)))


def _all_cards(root: Path) -> list[Card]:
    found: dict[str, Card] = {}
    with contextlib.suppress(OSError):
        for entry in (root / "sys/class/drm").iterdir():
            # Beside cardN there are their outputs (card0-DP-1) and render nodes.
            if not _CARD.fullmatch(entry.name) or _text(entry / "device/vendor") != AMD:
                continue
            folder = (entry / "device").resolve()
            if _ADDRESS.fullmatch(folder.name):
                driver = (folder / "driver").resolve().name if (folder / "driver").exists() else ""
                found[folder.name] = Card(folder, folder.name, driver)
    return sorted(found.values(), key=lambda card: card.place)


def _marketing_name(card: Card, root: Path) -> str:
    """Look into libdrm's table, e.g. ``744C, C8, AMD Radeon RX 7900 XTX``: device id and revision without ``0x``."""
    wanted = [_text(card.folder / each).removeprefix("0x").upper() for each in ("device", "revision")]
    for line in _text(root / "usr/share/libdrm/amdgpu.ids").splitlines():
        device, _, rest = line.partition(",")
        revision, _, name = rest.partition(",")
        if [device.strip().upper(), revision.strip().upper()] == wanted:
            return name.strip()
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
