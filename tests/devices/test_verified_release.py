from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from modelswap.devices.base import Holder, Reading
from modelswap.devices.errors import NotReleased
from modelswap.devices.release import FINE_LOOKS, SLOWEST, describe, pauses, verified_release
from modelswap.devices.simulated import SimulatedDevice
from modelswap.devices.slot import SlotDevice
from modelswap.protocol.errors import Code
from modelswap.testing.engine import Options
from modelswap.testing.ledger import Ledger
from modelswap.testing.processes import EngineProcess

GIB = 1 << 30
OURS = 100
OTHER = Holder(4121, "python", int(3.2 * GIB))


class _Script:
    """A device whose free bytes are those of a script, the last one for ever."""

    name = "GPU 0"
    kind = "script"

    def __init__(self, free: list[int], holders: tuple[Holder, ...] = ()) -> None:
        self._free = free
        self._holders = holders
        self.reads = 0

    async def read(self) -> Reading:
        free = self._free[min(self.reads, len(self._free) - 1)]
        self.reads += 1
        return Reading(total=16 * GIB, free=free, holders=self._holders)


class _Silent:
    """A device whose driver hangs."""

    name = "GPU 0"
    kind = "silent"

    async def read(self) -> Reading:
        await asyncio.Event().wait()
        raise AssertionError("it never answers")


def _ours(pid: int) -> bool:
    return pid == OURS


@pytest.mark.parametrize(
    ("free", "target", "samples", "reads"),
    [
        ([9], 5, 1, 1),
        ([9], 5, 2, 2),
        ([0, 1, 5, 5, 9], 5, 2, 4),
        # Free for a moment only is not free.
        ([9, 0, 9, 9], 5, 2, 4),
        ([0, 9, 9, 0, 9, 9, 9], 5, 3, 7),
        # Without a target: until it grows no more.
        ([0, 3, 7, 9, 9], None, 2, 5),
        ([9], None, 2, 2),
        ([1, 2, 2, 3, 3, 3], None, 3, 6),
        ([9, 8], None, 2, 2),
    ],
)
async def test_free_means_free_in_looks_in_a_row(free: list[int], target: int | None, samples: int, reads: int) -> None:
    """It looks until enough is free, or free memory settles, in as many consecutive looks as asked for."""
    device, seen = _Script(free), list[int]()
    reading = await verified_release(
        device, target, 60, samples=samples, interval=0.0001, on_sample=lambda reading: seen.append(reading.free)
    )
    assert reading is not None
    assert (device.reads, seen, reading.free) == (reads, free[:reads] if len(free) > 1 else free * reads, seen[-1])


async def test_without_readings_it_returns_at_once() -> None:
    """A slot has nothing to wait for."""
    assert await verified_release(SlotDevice(), 5, 0) is None


async def test_the_error_names_who_holds_what(tmp_path: Path) -> None:
    """After its time it says how much is missing, and which holders are not ours."""
    holders = (Holder(OURS, "vllm", 2 * GIB), OTHER, Holder(4122, "?", None))
    device = _Script([4 * GIB], holders)
    with pytest.raises(NotReleased) as caught:
        await verified_release(device, 12 * GIB, 0.05, ours=_ours)
    error = caught.value
    assert error.code is Code.MEMORY_NOT_RELEASED
    assert (error.target, error.reading and error.reading.free) == (12 * GIB, 4 * GIB)
    assert error.strangers == holders[1:]
    assert str(error) == (
        "GPU 0 has 4.0 GiB free of 16.0 GiB after 0.05 s, and 12.0 GiB must be; held by PID 100, vllm, 2.0 GiB, ours; "
        "PID 4121, python, 3.2 GiB, not ours; PID 4122, ?, unknown size, not ours. End what is not ours, or lower the "
        "model's `memory`"
    )
    assert describe(OTHER) == "PID 4121, python, 3.2 GiB"
    with pytest.raises(NotReleased, match=r"held by nobody that the driver names$"):
        await verified_release(_Script([0]), GIB, 0.01)


async def test_what_can_never_be_is_said_at_once() -> None:
    """A target above the device's total is not waited for."""
    device = _Script([16 * GIB])
    with pytest.raises(NotReleased, match="can never be free"):
        await verified_release(device, 17 * GIB, 3600)
    assert device.reads == 1


async def test_a_driver_that_hangs_does_not_hang_us() -> None:
    """No answer in time is an error, with and without a target."""
    for target in (None, 1):
        with pytest.raises(NotReleased, match="did not answer"):
            await verified_release(_Silent(), target, 0.02)


async def test_memory_that_never_settles_is_returned_as_it_is() -> None:
    """Without a target there is nothing to fail: the last reading is the answer."""
    device = _Script(list(range(100_000)))
    reading = await verified_release(device, None, 0.05, interval=0.001)
    assert reading is not None
    assert reading.free == device.reads - 1


def test_looks_get_rarer_in_a_long_wait() -> None:
    """It looks finely at first and spares the driver later, but never stops."""
    first = list(islice(pauses(0.02), FINE_LOOKS + 20))
    assert first[:FINE_LOOKS] == [0.02] * FINE_LOOKS
    assert first == sorted(first)
    assert first[-1] == SLOWEST
    assert next(islice(pauses(2.0), FINE_LOOKS, None)) == 2.0


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Return a device of 100 bytes."""
    return Ledger.create(tmp_path / "gpu.json", 100)


async def test_a_killed_engines_memory_is_verified_free(ledger: Ledger) -> None:
    """With real processes: after the kill the memory is seen free, and not before."""
    device = SimulatedDevice(ledger.path)
    options = Options(gpu_ledger=str(ledger.path), gpu_bytes=60)
    async with EngineProcess(options) as engine:
        await engine.logged("startup complete")
        with pytest.raises(NotReleased, match=f"PID {engine.pid}, sim-engine, 0.0 GiB, ours"):
            await verified_release(device, 90, 0.05, ours=lambda pid: pid == engine.pid)
        watching = asyncio.create_task(verified_release(device, 90, 60))
        engine.signal(9)
        reading = await watching
    assert reading is not None
    assert reading.free == 100


async def test_late_memory_is_waited_for(ledger: Ledger) -> None:
    """Memory that comes back after a delay is waited for, with every sample reported."""
    device = SimulatedDevice(ledger.path)
    ledger.allocate(60, instance="a", release_delay=0.1)
    ledger.release(instance="a")
    seen: list[int] = []
    note: Callable[[Reading], None] = lambda reading: seen.append(reading.free)  # noqa: E731
    await verified_release(device, 100, 60, on_sample=note)
    assert seen[0] == 40
    assert seen[-2:] == [100, 100]
