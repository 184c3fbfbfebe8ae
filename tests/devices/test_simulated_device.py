from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelswap.devices.base import Holder
from modelswap.devices.errors import DeviceUnavailable, DeviceUnreadable
from modelswap.devices.simulated import SimulatedDevice
from modelswap.testing.ledger import Ledger


async def test_it_reads_what_the_ledger_says(tmp_path: Path) -> None:
    """Holders come one per process, foreign ones included; an overfull device has nothing free."""
    ledger = Ledger.create(tmp_path / "gpu.json", 100)
    device = SimulatedDevice(ledger.path)
    ledger.allocate(20, instance="a")
    ledger.allocate(30, instance="b")
    ledger.add_foreign(10)
    reading = await device.read()
    assert (reading.total, reading.free) == (100, 40)
    assert reading.holders == (Holder(os.getpid(), "engine", 50), Holder(4121, "python", 10))
    ledger.add_foreign(500, pid=4122)
    assert (await device.read()).free == 0


async def test_a_ledger_that_is_missing_or_broken(tmp_path: Path) -> None:
    """Missing at the start: the error says how to make one. Gone later: the device is unreadable."""
    path = tmp_path / "gpu.json"
    with pytest.raises(DeviceUnavailable, match=r"Ledger\.create"):
        SimulatedDevice(path)
    Ledger.create(path, 100)
    device = SimulatedDevice(path)
    for spoil in (lambda: path.write_text("{"), path.unlink):
        spoil()
        with pytest.raises(DeviceUnreadable):
            await device.read()
