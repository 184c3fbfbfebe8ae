from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil
import pytest

from modelswap.devices.base import Holder
from modelswap.devices.choose import open_device
from modelswap.devices.errors import DeviceUnavailable, DeviceUnreadable
from modelswap.devices.nvml import NvmlDevice
from modelswap.protocol.errors import Code
from modelswap.spec.config import Device as DeviceConfig
from modelswap.testing.fake_nvml import FakeNvml, FakeProcess
from modelswap.testing.waiting import until

GIB = 1 << 30


async def test_memory_and_holders_are_read_off_the_event_loop() -> None:
    """Each holder appears once, with its name; a PID from elsewhere has none; all calls come from one other thread."""
    driver = FakeNvml(free=10 * GIB, compute=[FakeProcess(os.getpid(), 3 * GIB), FakeProcess(2**22 + 7, None)])
    driver.graphics = [FakeProcess(os.getpid(), 3 * GIB)]
    device = NvmlDevice.open(0, driver)
    reading = await device.read()
    await device.aclose()
    assert (device.name, device.uuid, reading.total, reading.free) == ("Fake GPU 0", "GPU-0", 80 * GIB, 10 * GIB)
    assert reading.holders == (
        Holder(os.getpid(), psutil.Process().name(), 3 * GIB),
        Holder(2**22 + 7, "?", None),
    )
    assert len(driver.threads) == 1
    assert threading.get_ident() not in driver.threads


async def test_closing_lets_go_of_the_driver() -> None:
    """Every init is matched by a shutdown, also after a failed open."""
    driver = FakeNvml()
    device = NvmlDevice.open(0, driver)
    assert driver.initialised == 1
    await device.aclose()
    await until(lambda: driver.initialised == 0)
    with pytest.raises(DeviceUnavailable):
        NvmlDevice.open(5, driver)
    assert driver.initialised == 0


async def test_a_gpu_that_shares_the_systems_memory() -> None:
    """Where NVML has no memory info (Jetson, GB10), the system's available memory is read."""
    driver = FakeNvml(fail={"nvmlDeviceGetMemoryInfo": FakeNvml.NVML_ERROR_NOT_SUPPORTED})
    device = NvmlDevice.open(0, driver)
    reading = await device.read()
    await device.aclose()
    assert reading.total == psutil.virtual_memory().total
    assert 0 < reading.free <= reading.total


@pytest.mark.parametrize("function", ["nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"])
async def test_process_lists_may_be_refused(function: str) -> None:
    """Free bytes are still read where the driver won't say who holds the rest, or is too old to."""
    for trouble in ({"fail": {function: FakeNvml.NVML_ERROR_NOT_SUPPORTED}}, {"mismatched": {function}}):
        driver = FakeNvml(free=5, **trouble)
        device = NvmlDevice.open(0, driver)
        assert (await device.read()).free == 5
        await device.aclose()


async def test_a_reloaded_driver_is_picked_up_again() -> None:
    """A driver that forgot us is initialised again; a lost GPU is an error that names it."""
    driver = FakeNvml(free=5)
    device = NvmlDevice.open(0, driver)
    driver.initialised = 0
    assert (await device.read()).free == 5
    for function in ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses"):
        driver.fail = {function: FakeNvml.NVML_ERROR_GPU_IS_LOST}
        with pytest.raises(DeviceUnreadable, match="Fake GPU 0") as caught:
            await device.read()
        assert caught.value.code is Code.DEVICE_STUCK
    driver.fail = {}
    assert (await device.read()).free == 5
    await device.aclose()
    await until(lambda: driver.initialised <= 0)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FakeNvml.NVML_ERROR_LIBRARY_NOT_FOUND, "not installed"),
        (FakeNvml.NVML_ERROR_DRIVER_NOT_LOADED, "not loaded"),
        (FakeNvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "restart the machine"),
        (FakeNvml.NVML_ERROR_NO_PERMISSION, "permissions"),
        (FakeNvml.NVML_ERROR_GPU_IS_LOST, "nvidia-smi"),
    ],
)
async def test_a_missing_driver_is_an_error_with_its_remedy(error: int, words: str, tmp_path: Path) -> None:
    """`kind: nvml` says what to do; `auto` takes the slot and remembers why."""
    driver = FakeNvml(fail={"nvmlInit": error})
    with pytest.raises(DeviceUnavailable, match=words) as caught:
        open_device(DeviceConfig(kind="nvml"), nvml=driver)
    assert "device.kind" in str(caught.value)
    device = open_device(DeviceConfig(), nvml=driver, root=tmp_path)
    assert device.kind == "slot"
    assert words in device.reason  # type: ignore[union-attr]


@pytest.mark.parametrize(("gpus", "words"), [(0, "no GPU"), (1, "one GPU, index 0"), (4, "GPUs 0 to 3")])
async def test_a_gpu_that_is_not_there(gpus: int, words: str, tmp_path: Path) -> None:
    """A wrong index is an error that says which there are, with `auto` as well."""
    for kind in ("nvml", "auto"):
        with pytest.raises(DeviceUnavailable, match=words):
            open_device(DeviceConfig(kind=kind, index=7), nvml=FakeNvml(gpus=gpus), root=tmp_path)


async def test_auto_takes_nvml_where_it_answers() -> None:
    """The driver's own device comes first."""
    driver = FakeNvml(gpus=2)
    device = open_device(DeviceConfig(index=1), nvml=driver)
    assert (device.kind, device.name) == ("nvml", "Fake GPU 1")
    await device.aclose()


async def test_mistakes_of_ours_are_not_hidden() -> None:
    """An unexpected error while opening is raised as it is, and the thread ends."""

    class Broken(FakeNvml):
        def nvmlDeviceGetName(self, handle: int) -> bytes:
            raise RuntimeError("unexpected")

    before = set(threading.enumerate())
    driver = Broken()
    with pytest.raises(RuntimeError, match="unexpected"):
        NvmlDevice.open(0, driver)
    assert (driver.initialised, set(threading.enumerate()) - before) == (0, set())
