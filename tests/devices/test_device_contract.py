from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from modelswap.devices.amdgpu import AmdGpuDevice
from modelswap.devices.base import Device, Reading
from modelswap.devices.choose import AnyDevice, open_device
from modelswap.devices.nvml import NvmlDevice
from modelswap.devices.release import verified_release
from modelswap.devices.simulated import SimulatedDevice
from modelswap.devices.slot import SlotDevice
from modelswap.spec.config import Device as DeviceConfig
from modelswap.testing.fake_amdgpu import FakeAmdMachine
from modelswap.testing.fake_nvml import FakeNvml
from modelswap.testing.ledger import Ledger


@pytest.fixture(params=["nvml", "amdgpu", "simulated", "slot"])
async def device(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AnyDevice]:
    """Return an open device of each kind."""
    ledger = Ledger.create(tmp_path / "gpu.json", 100)
    machine = FakeAmdMachine(tmp_path / "root")
    machine.add_card()
    opened = open_device(
        DeviceConfig(kind=request.param, ledger=ledger.path if request.param == "simulated" else None),
        nvml=FakeNvml(),
        root=machine.root,
    )
    yield opened
    await opened.aclose()


def test_it_says_what_it_is(device: AnyDevice) -> None:
    """A device has a name for people and its kind, and fulfils the Protocol."""
    fulfils: Device = device
    assert fulfils.name
    assert fulfils.kind in ("nvml", "amdgpu", "simulated", "slot")
    assert isinstance(device, NvmlDevice | AmdGpuDevice | SimulatedDevice | SlotDevice)


async def test_readings_make_sense(device: AnyDevice) -> None:
    """A reading's free bytes are within its total; without readings there is None, every time."""
    for _ in range(3):
        reading = await device.read()
        if device.kind == "slot":
            assert reading is None
        else:
            assert isinstance(reading, Reading)
            assert 0 <= reading.free <= reading.total


async def test_verified_release_works_on_it(device: AnyDevice) -> None:
    """An idle device is verified free, whatever is asked for."""
    for target in (None, 1):
        reading = await verified_release(device, target, 60)
        assert (reading is None) == (device.kind == "slot")


async def test_closing_twice_is_harmless_for_others(device: AnyDevice, tmp_path: Path) -> None:
    """Another device of the same kind goes on after this one is closed."""
    config = DeviceConfig(
        kind=device.kind,  # type: ignore[arg-type]
        ledger=tmp_path / "gpu.json" if device.kind == "simulated" else None,
    )
    other = open_device(config, nvml=FakeNvml(), root=tmp_path / "root")
    await other.aclose()
    await device.read()
