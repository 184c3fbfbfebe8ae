"""From the config's ``device`` section to a device."""

from __future__ import annotations

from typing import Any

from modelswap.devices.errors import DeviceUnavailable
from modelswap.devices.nvml import NvmlDevice
from modelswap.devices.simulated import SimulatedDevice
from modelswap.devices.slot import SlotDevice
from modelswap.spec import config as spec

AnyDevice = NvmlDevice | SimulatedDevice | SlotDevice


def open_device(config: spec.Device, *, nvml: Any = None) -> AnyDevice:
    """Return the configured device; close it with ``aclose()``.

    Blocks while the driver initialises (up to seconds without persistence mode): call it before serving. ``nvml``
    stands in for the module ``pynvml``. Raises `DeviceUnavailable`, with ``auto`` only if a GPU other than the first is
    asked for.
    """
    match config.kind:
        case "simulated":
            assert config.ledger is not None  # noqa: S101  (the config's own rule)
            return SimulatedDevice(config.ledger)
        case "slot":
            return SlotDevice()
        case "nvml":
            return NvmlDevice.open(config.index, nvml)
        case "auto":
            try:
                return NvmlDevice.open(config.index, nvml)
            except DeviceUnavailable as error:
                if config.index:
                    raise
                return SlotDevice(reason=str(error))
