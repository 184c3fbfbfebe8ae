from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import psutil
import pytest

from modelswap.devices.amdgpu import AmdGpuDevice
from modelswap.devices.base import Holder, Reading
from modelswap.devices.choose import open_device
from modelswap.devices.errors import DeviceUnavailable, DeviceUnreadable, NotReleased
from modelswap.devices.release import verified_release
from modelswap.protocol.errors import Code
from modelswap.spec.config import Device as DeviceConfig
from modelswap.testing.fake_amdgpu import GIB, FakeAmdMachine
from modelswap.testing.fake_nvml import FakeNvml

NO_NVIDIA = FakeNvml.NVML_ERROR_LIBRARY_NOT_FOUND


@pytest.fixture
def machine(tmp_path: Path) -> FakeAmdMachine:
    """Return a machine without a GPU yet."""
    return FakeAmdMachine(tmp_path / "root")


async def read(machine: FakeAmdMachine, index: int = 0) -> Reading:
    device = AmdGpuDevice.open(index, machine.root)
    reading = await device.read()
    await device.aclose()
    return reading


def no_nvidia() -> FakeNvml:
    return FakeNvml(fail={"nvmlInit": NO_NVIDIA})


async def test_memory_is_read_off_the_event_loop(machine: FakeAmdMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Total and free bytes are those of the video memory, and one other thread reads all files."""
    card = machine.add_card()
    card.write(mem_info_vram_used=5 * GIB)
    threads = set[int]()
    read_text = Path.read_text

    def noting(path: Path, *args: object, **more: object) -> str:
        threads.add(threading.get_ident())
        return read_text(path, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", noting)
    device = AmdGpuDevice.open(0, machine.root)
    reading = await device.read()
    await device.aclose()
    assert reading == Reading(total=24 * GIB, free=19 * GIB)
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_gpus_come_in_pci_order(machine: FakeAmdMachine) -> None:
    """The index counts PCI addresses, not the kernel's card numbers, and AMD's GPUs only."""
    machine.add_card("0000:0c:00.0", number=0, vram=1 * GIB)
    machine.add_card("0000:03:00.0", number=1, vram=2 * GIB)
    machine.add_card("0001:01:00.0", number=2, vram=3 * GIB)
    machine.add_card("0000:01:00.0", number=3, driver="nvidia", vendor="0x10de")
    assert [(await read(machine, index)).total // GIB for index in range(3)] == [2, 1, 3]


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({}, "AMD GPU 1002:744c"),
        (
            {"usr/share/libdrm/amdgpu.ids": "# ids\n744C,\tC7,\tother\n744C,\tC8,\tAMD Radeon RX 7900 XTX\n"},
            "AMD Radeon RX 7900 XTX",
        ),
        ({"sys/devices/pci0000:00/0000:03:00.0/product_name": "AMD Instinct MI210\n"}, "AMD Instinct MI210"),
    ],
)
async def test_its_name(machine: FakeAmdMachine, files: dict[str, str], name: str) -> None:
    """The board's own name, else libdrm's, else the PCI id."""
    machine.add_card()
    for path, text in files.items():
        machine.write(path, text)
    device = AmdGpuDevice.open(0, machine.root)
    await device.aclose()
    assert device.name == name


@pytest.mark.parametrize(
    ("kfd_bank", "apu", "pool"),
    [
        # KFD says what it gives to programs.
        (16 * GIB, True, "gtt"),
        (512 << 20, True, "vram"),
        # It doesn't say (in a container): an APU's larger pool.
        (None, True, "gtt"),
        (None, False, "vram"),
    ],
)
async def test_what_rocm_allocates_counts(machine: FakeAmdMachine, kfd_bank: int | None, apu: bool, pool: str) -> None:
    """Of an APU the system's memory mapped for it counts where the driver gives programs that."""
    card = machine.add_card(vram=512 << 20, gtt=15 * GIB, apu=apu)
    if kfd_bank is not None:
        machine.add_kfd(card, bank=kfd_bank)
    card.write(mem_info_vram_used=100 << 20, mem_info_gtt_used=2 * GIB)
    expected = {"gtt": Reading(15 * GIB, 13 * GIB), "vram": Reading(512 << 20, 412 << 20)}
    assert await read(machine) == expected[pool]


async def test_a_card_beside_an_apu(machine: FakeAmdMachine) -> None:
    """Each is read its own way, though much more of the system's memory can be mapped than the card has."""
    card = machine.add_card("0000:03:00.0", number=1, vram=8 * GIB, gtt=32 * GIB)
    apu = machine.add_card("0000:0c:00.0", number=0, vram=512 << 20, gtt=32 * GIB, apu=True)
    machine.add_kfd(card, node=1, bank=8 * GIB, heap=2)
    machine.add_kfd(apu, node=2, bank=31 * GIB)
    machine.holds_by_kfd(os.getpid(), card, GIB)
    machine.holds_by_kfd(1, apu, 2 * GIB)
    first, second = await read(machine, 0), await read(machine, 1)
    assert (first.total, [holder.pid for holder in first.holders]) == (8 * GIB, [os.getpid()])
    assert (second.total, [holder.pid for holder in second.holders]) == (31 * GIB, [1])


async def test_no_more_is_free_than_the_system_has(machine: FakeAmdMachine) -> None:
    """An APU's memory is the system's: what other programs took of it is not free."""
    machine.add_card(vram=512 << 20, gtt=15 * GIB, apu=True)
    machine.write("proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 3145728 kB\n")
    assert (await read(machine)).free == 3 * GIB
    machine.write("proc/meminfo", "MemTotal: 16777216 kB\n")
    with pytest.raises(DeviceUnavailable, match="what is available"):
        AmdGpuDevice.open(0, machine.root)


async def test_an_overfull_gpu_has_nothing_free(machine: FakeAmdMachine) -> None:
    """What the driver keeps for itself may make used exceed total for a moment."""
    machine.add_card(vram=10).write(mem_info_vram_used=11)
    assert (await read(machine)).free == 0


async def test_holders_by_kfd(machine: FakeAmdMachine) -> None:
    """Each process with memory on this GPU appears with its name, also if it isn't ours or is in a container."""
    card = machine.add_card()
    machine.add_kfd(card, bank=24 * GIB)
    machine.holds_by_kfd(os.getpid(), card, 3 * GIB)
    machine.holds_by_kfd(2**22 + 7, card, 2 * GIB)
    machine.holds_by_kfd(1, card, 0)
    machine.write("sys/class/kfd/kfd/proc/4/vram_999", f"{GIB}")
    machine.write(f"sys/class/kfd/kfd/proc/5/vram_{card.gpu_id}", "?")
    assert (await read(machine)).holders == (
        Holder(os.getpid(), psutil.Process().name(), 3 * GIB),
        Holder(2**22 + 7, "?", 2 * GIB),
    )


@pytest.mark.parametrize("flags", [[0, 1], [0, 1 << 28]])
async def test_a_partitioned_gpu_is_one(machine: FakeAmdMachine, flags: list[int]) -> None:
    """All partitions of a GPU count together, whichever way the kernel tells them apart."""
    card = machine.add_card(vram=10 * GIB, gtt=100 * GIB)
    for number, flag in enumerate(flags, start=1):
        machine.add_kfd(card, node=number, gpu_id=str(number), bank=5 * GIB, flags=flag)
        machine.holds_by_kfd(os.getpid(), card, number * GIB, gpu_id=str(number))
    reading = await read(machine)
    assert (reading.total, [holder.bytes for holder in reading.holders]) == (10 * GIB, [3 * GIB])


async def test_a_kernel_that_tells_no_domain(machine: FakeAmdMachine) -> None:
    """Older kernels' nodes have none; such a GPU is in the first."""
    card = machine.add_card()
    machine.write("sys/class/kfd/kfd/topology/nodes/1/gpu_id", card.gpu_id)
    machine.write("sys/class/kfd/kfd/topology/nodes/1/properties", "location_id 768\n")
    machine.holds_by_kfd(1, card, GIB)
    assert [holder.pid for holder in (await read(machine)).holders] == [1]


def fdinfo(address: str = "0000:03:00.0", client: int = 1, driver: str = "amdgpu", memory: str = "") -> str:
    keys = memory or "drm-memory-vram:\t2097152 KiB\ndrm-memory-gtt: \t1024 KiB"
    return f"pos:\t0\ndrm-driver:\t{driver}\ndrm-client-id:\t{client}\ndrm-pdev:\t{address}\n{keys}\n"


async def test_holders_by_drm(machine: FakeAmdMachine) -> None:
    """Graphics programs appear by their descriptors; copies of one count once, other GPUs' and other files' not."""
    machine.add_card()
    machine.opens(10, 3, fdinfo())
    machine.opens(10, 4, fdinfo())
    machine.opens(10, 5, fdinfo(client=2, memory="drm-resident-vram:\t1024 MiB"))
    machine.opens(11, 3, fdinfo(address="0000:0c:00.0"))
    machine.opens(12, 3, fdinfo(driver="nouveau"))
    machine.opens(13, 3, fdinfo(), target="/etc/passwd")
    machine.opens(14, 3, fdinfo(memory="drm-memory-vram:\t5"), target="/dev/dri/card0")
    machine.opens(15, 3, fdinfo(memory="drm-memory-vram:\tmuch KiB"))
    machine.opens(16, 3, fdinfo(memory="drm-memory-vram:\t1 XiB"))
    (machine.root / "proc/self").mkdir()
    (machine.root / "proc/17").mkdir()
    assert [(holder.pid, holder.bytes) for holder in (await read(machine)).holders] == [(10, 3 * GIB), (14, 5)]


async def test_what_both_tell_is_not_added(machine: FakeAmdMachine) -> None:
    """A ROCm program's memory is seen by KFD and by DRM, in part: the larger figure is taken."""
    card = machine.add_card()
    machine.add_kfd(card, bank=24 * GIB)
    machine.holds_by_kfd(10, card, 3 * GIB)
    machine.opens(10, 3, fdinfo())
    machine.holds_by_kfd(11, card, GIB)
    machine.opens(11, 3, fdinfo())
    assert [holder.bytes for holder in (await read(machine)).holders] == [3 * GIB, 2 * GIB]


async def test_descriptors_are_not_looked_through_at_every_look(machine: FakeAmdMachine) -> None:
    """Fine polling doesn't read all descriptors each time; who has ended meanwhile is left out all the same."""
    machine.add_card()
    machine.opens(10, 3, fdinfo())
    machine.opens(11, 3, fdinfo())
    device = AmdGpuDevice.open(0, machine.root)
    assert [holder.pid for holder in (await device.read()).holders] == [10, 11]
    machine.opens(12, 3, fdinfo())
    (machine.root / "proc/11").rename(machine.root / "gone")
    assert [holder.pid for holder in (await device.read()).holders] == [10]
    await device.aclose()


@pytest.mark.parametrize(
    "refused", ["sys/class/kfd/kfd/proc", "sys/class/kfd/kfd/topology/nodes/1/gpu_id", "proc/10/fd"]
)
async def test_the_process_list_may_be_refused(
    machine: FakeAmdMachine, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free bytes are still read where who holds the rest must not be."""
    card = machine.add_card()
    card.write(mem_info_vram_used=GIB)
    machine.add_kfd(card, bank=24 * GIB)
    machine.holds_by_kfd(10, card, GIB)
    machine.opens(10, 3, fdinfo())
    forbidden = machine.root / refused
    iterdir, read_text, listdir = Path.iterdir, Path.read_text, os.listdir

    def guard(path: Path) -> None:
        # Not by permissions: tests may run as root.
        if path == forbidden:
            raise PermissionError(13, "Permission denied", str(path))

    def listing(path: Path) -> object:
        guard(path)
        return iterdir(path)

    def names(path: str) -> list[str]:
        guard(Path(path))
        return listdir(path)

    def reading(path: Path, *args: object, **more: object) -> str:
        guard(path)
        return read_text(path, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "iterdir", listing)
    monkeypatch.setattr(os, "listdir", names)
    monkeypatch.setattr(Path, "read_text", reading)
    found = await read(machine)
    assert (found.total, found.free) == (24 * GIB, 23 * GIB)
    assert len(found.holders) == 1  # by the way that isn't refused


async def test_memory_that_must_not_be_read(machine: FakeAmdMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal at the start is an error with its remedy; later, the device is unreadable."""
    card = machine.add_card()
    device = AmdGpuDevice.open(0, machine.root)
    number = type(device._gpu._card).number

    def refused(self: object, name: str) -> int:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(type(device._gpu._card), "number", refused)
    with pytest.raises(DeviceUnavailable, match=f"{card.address}.*Permission denied: this user may not") as caught:
        AmdGpuDevice.open(0, machine.root)
    assert "device.kind" in str(caught.value)
    with pytest.raises(DeviceUnreadable, match="Permission denied"):
        await device.read()
    monkeypatch.setattr(type(device._gpu._card), "number", number)
    assert (await device.read()).free == 24 * GIB
    await device.aclose()


@pytest.mark.parametrize("spoilt", ["", "many", "12 GiB"])
async def test_malformed_files(machine: FakeAmdMachine, spoilt: str) -> None:
    """What is no number is an error, not a figure; what KFD says wrongly is as if it said nothing."""
    card = machine.add_card()
    machine.add_kfd(card, bank=24 * GIB)
    device = AmdGpuDevice.open(0, machine.root)
    card.write(mem_info_vram_used=spoilt)
    with pytest.raises(DeviceUnreadable, match="invalid literal") as caught:
        await device.read()
    assert caught.value.code is Code.DEVICE_STUCK
    card.write(mem_info_vram_used=0)
    for file in ("properties", "mem_banks/0/properties"):
        machine.write(f"sys/class/kfd/kfd/topology/nodes/1/{file}", f"location_id {spoilt}\nheap_type\n\n")
    card.write(gpu_metrics="x")
    assert (await device.read()).free == (await read(machine)).free == 24 * GIB
    await device.aclose()


async def test_a_gpu_that_is_unplugged(machine: FakeAmdMachine) -> None:
    """It is unreadable, by its name and place; when it is back it is read again, whatever its numbers are then."""
    card = machine.add_card(number=0)
    machine.add_kfd(card, bank=24 * GIB)
    device = AmdGpuDevice.open(0, machine.root)
    machine.remove(card)
    with pytest.raises(DeviceUnreadable, match=r"GPU 0 \(AMD GPU 1002:744c, 0000:03:00.0\).*No such file"):
        await device.read()
    for link in (machine.root / "sys/bus/pci/devices").iterdir():
        link.unlink()
    back = machine.add_card(number=1)
    machine.add_kfd(back, bank=24 * GIB)
    machine.holds_by_kfd(1, back, GIB)
    assert [holder.bytes for holder in (await device.read()).holders] == [GIB]
    await device.aclose()


@pytest.mark.parametrize(("gpus", "words"), [(1, "one GPU, index 0 .*0000:03:00.0"), (3, r"GPUs 0 to 2 .*2: AMD GPU")])
async def test_a_gpu_that_is_not_there(machine: FakeAmdMachine, gpus: int, words: str) -> None:
    """A wrong index is an error that says which there are, with `auto` as well."""
    for number in range(gpus):
        machine.add_card(f"0000:0{3 + number}:00.0", number=number)
    for kind in ("amdgpu", "auto"):
        with pytest.raises(DeviceUnavailable, match=words):
            open_device(DeviceConfig(kind=kind, index=7), nvml=no_nvidia(), root=machine.root)


@pytest.mark.parametrize(("driver", "words"), [("radeon", "has the driver radeon"), ("", "has no driver")])
async def test_a_gpu_without_the_driver(machine: FakeAmdMachine, driver: str, words: str) -> None:
    """`kind: amdgpu` says what the GPU has instead and what to do; `auto` takes the slot and remembers why."""
    machine.add_card(driver=driver)
    config = DeviceConfig(kind="amdgpu")
    with pytest.raises(
        DeviceUnavailable, match=f"0000:03:00.0 {words}: load it .*modprobe amdgpu.*device.kind to slot"
    ):
        open_device(config, root=machine.root)
    device = open_device(DeviceConfig(), nvml=no_nvidia(), root=machine.root)
    assert device.kind == "slot"
    assert words in device.reason  # type: ignore[union-attr]


async def test_a_machine_without_any(tmp_path: Path) -> None:
    """Where there is no GPU at all, `amdgpu` says so, and `auto` goes on talking of NVML."""
    with pytest.raises(DeviceUnavailable, match="no AMD GPU with the driver amdgpu: load it"):
        open_device(DeviceConfig(kind="amdgpu"), root=tmp_path)
    device = open_device(DeviceConfig(), nvml=no_nvidia(), root=tmp_path)
    assert "NVML" in device.reason  # type: ignore[union-attr]


async def test_auto_takes_an_amd_gpu_where_no_nvidia_gpu_is(machine: FakeAmdMachine) -> None:
    """NVML comes first; an NVIDIA GPU whose driver fails isn't mistaken for the processor's own graphics."""
    machine.add_card("0000:0c:00.0")
    device = open_device(DeviceConfig(), nvml=no_nvidia(), root=machine.root)
    assert device.kind == "amdgpu"
    await device.aclose()
    device = open_device(DeviceConfig(), nvml=FakeNvml(), root=machine.root)
    assert device.kind == "nvml"
    await device.aclose()
    machine.add_card("0000:01:00.0", number=1, driver="nvidia", vendor="0x10de")
    mismatch = FakeNvml(fail={"nvmlInit": FakeNvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH})
    device = open_device(DeviceConfig(), nvml=mismatch, root=machine.root)
    assert device.kind == "slot"
    assert "restart the machine" in device.reason  # type: ignore[union-attr]


async def test_auto_leaves_an_apu_alone(machine: FakeAmdMachine) -> None:
    """What shares the processor's memory is watched only if the config names it; the slot's reason says how."""
    machine.add_card(apu=True)
    device = open_device(DeviceConfig(), nvml=no_nvidia(), root=machine.root)
    assert device.kind == "slot"
    assert "set device.kind to amdgpu" in device.reason  # type: ignore[union-attr]
    device = open_device(DeviceConfig(kind="amdgpu"), root=machine.root)
    assert device.kind == "amdgpu"
    await device.aclose()


async def test_the_device_files_of_each_gpu(machine: FakeAmdMachine) -> None:
    """Programs use ROCm's file, if the kernel has it, and the GPU's render node; groups are those of the files here."""
    first = machine.add_card("0000:03:00.0", number=1)
    machine.add_card("0000:0c:00.0", number=0)
    device = AmdGpuDevice.open(1, machine.root)
    await device.aclose()
    assert [nodes.paths for nodes in device.nodes] == [("/dev/dri/renderD129",), ("/dev/dri/renderD128",)]
    assert [nodes.groups for nodes in device.nodes] == [(), ()]
    machine.add_kfd(first, bank=24 * GIB)
    group = machine.write("dev/kfd", "").stat().st_gid
    device = AmdGpuDevice.open(1, machine.root)
    await device.aclose()
    assert device.nodes[device.index].paths == ("/dev/kfd", "/dev/dri/renderD128")
    assert device.nodes[device.index].groups == (group,)


async def test_verified_release_sees_files_change(machine: FakeAmdMachine) -> None:
    """Memory that comes back while it is looked for is seen; what doesn't is explained by who holds it."""
    card = machine.add_card()
    machine.add_kfd(card, bank=24 * GIB)
    card.write(mem_info_vram_used=20 * GIB)
    machine.holds_by_kfd(os.getpid(), card, 19 * GIB)
    device = AmdGpuDevice.open(0, machine.root)
    name = psutil.Process().name()
    with pytest.raises(NotReleased, match=f"4.0 GiB free of 24.0 GiB.*PID {os.getpid()}, {name}, 19.0 GiB, not ours"):
        await verified_release(device, 22 * GIB, 0.05, ours=lambda pid: False)
    looked = asyncio.Event()
    watching = asyncio.create_task(
        verified_release(device, 22 * GIB, 60, interval=0.001, on_sample=lambda reading: looked.set())
    )
    await looked.wait()
    assert not watching.done()
    # As the kernel does it: at once for whoever reads.
    later = machine.write("later", str(GIB))
    later.rename(card.folder / "mem_info_vram_used")
    reading = await watching
    await device.aclose()
    assert reading is not None
    assert reading.free == 23 * GIB


async def test_mistakes_of_ours_are_not_hidden(machine: FakeAmdMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected error while opening is raised as it is, and the thread ends."""
    machine.add_card()

    def broken(*_: object) -> str:
        raise RuntimeError("unexpected")

    monkeypatch.setattr("modelswap.devices.amdcards.Card.name", broken)
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="unexpected"):
        AmdGpuDevice.open(0, machine.root)
    assert set(threading.enumerate()) - before == set()
