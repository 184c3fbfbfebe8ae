"""From the config's ``device`` section to a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelswap.devices import amdcards
from modelswap.devices.amdgpu import ROOT, AmdGpuDevice
from modelswap.devices.errors import DeviceUnavailable
from modelswap.devices.nvml import NvmlDevice
from modelswap.devices.simulated import SimulatedDevice
from modelswap.devices.slot import SlotDevice
from modelswap.spec import config as spec

AnyDevice = NvmlDevice | AmdGpuDevice | SimulatedDevice | SlotDevice


def open_device(config: spec.Device, *, nvml: Any = None, root: Path = ROOT) -> AnyDevice:
    """Return the configured device; close it with ``aclose()``.

    Blocks while the driver initialises (up to seconds without persistence mode): call it before serving. ``nvml``
    stands in for the module ``pynvml``, ``root`` for the root of the file system. Raises `DeviceUnavailable`, with
    ``auto`` only if a GPU other than the first is asked for.
    """
    match config.kind:
        case "simulated":
            assert config.ledger is not None  # noqa: S101  (the config's own rule)
            return SimulatedDevice(config.ledger)
        case "slot":
            return SlotDevice()
        case "nvml":
            return NvmlDevice.open(config.index, nvml)
        case "amdgpu":
            return AmdGpuDevice.open(config.index, root)
        case "auto":
            try:
                return _auto(config.index, nvml, root)
            except DeviceUnavailable as error:
                if config.index:
                    raise
                return SlotDevice(reason=str(error))


def _auto(index: int, nvml: Any, root: Path) -> NvmlDevice | AmdGpuDevice:
    try:
        return NvmlDevice.open(index, nvml)
    except DeviceUnavailable:
        # An NVIDIA GPU that can't be read is the one that models run on, not the processor's graphics beside it.
        if amdcards.has_nvidia(root) or not (amdcards.find_cards(root) or amdcards.others(root)):
            raise
    cards = amdcards.find_cards(root)
    if index < len(cards) and cards[index].is_apu():
        # Its memory is the system's, which comes and goes with every program: where engines run on the processor, a
        # swap would wait for what has nothing to do with it.
        raise DeviceUnavailable(
            f"AMD GPU {index} ({cards[index].name(root)}) shares the processor's memory; "
            "if models run on it, set device.kind to amdgpu"
        )
    return AmdGpuDevice.open(index, root)
