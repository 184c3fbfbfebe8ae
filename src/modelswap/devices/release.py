"""Waiting until device memory is really free.

The driver frees a process's memory when its last descriptor closes, about when it ends, and says so a little later;
some engines return from a release call earlier still. So free bytes are looked at again and again, until they suffice
in several looks in a row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Final

from modelswap.devices.base import Device, Holder, Reading
from modelswap.devices.errors import NotReleased

GIB: Final = 1 << 30
FINE_LOOKS: Final = 50
"""Looks before they get rarer."""

SLOWEST: Final = 0.25
"""Seconds between looks in the end."""


async def verified_release(
    device: Device,
    target: int | None,
    timeout: float,
    *,
    samples: int = 2,
    interval: float = 0.02,
    on_sample: Callable[[Reading], None] | None = None,
    ours: Callable[[int], bool] | None = None,
) -> Reading | None:
    """Wait until ``target`` bytes are free in ``samples`` looks in a row, and return the last reading.

    With ``target`` None, wait until free memory has stopped growing, and return what there is then, even if that took
    all of ``timeout``. Looks are ``interval`` seconds apart, later rarer. Where memory can't be read, returns None at
    once. ``on_sample`` is called with each reading. ``ours`` says which PIDs are ours, for the message.

    Raises `NotReleased` after ``timeout`` seconds, and at once if the device hasn't ``target`` bytes in all.
    """
    reading: Reading | None = None
    best = -1
    enough = 0
    try:
        async with asyncio.timeout(timeout):
            for pause in pauses(interval):
                reading = await device.read()
                if reading is None:
                    return None
                if on_sample is not None:
                    on_sample(reading)
                if target is not None and target > reading.total:
                    raise NotReleased(
                        f"{device.name} has {_gib(reading.total)} in all: {_gib(target)} can never be free on it; "
                        "lower the model's `memory`",
                        target=target,
                        reading=reading,
                    )
                satisfied = reading.free <= best if target is None else reading.free >= target
                best = max(best, reading.free)
                enough = enough + 1 if satisfied else 0
                # Settled means: not grown since an earlier look, so the first one counts as well.
                if enough >= (samples - 1 if target is None else samples):
                    return reading
                await asyncio.sleep(pause)
    except TimeoutError:
        if target is None and reading is not None:
            return reading
    raise _not_released(device, target, timeout, reading, ours)


def pauses(interval: float) -> Iterator[float]:
    """Yield the seconds between looks, for ever: ``interval`` at first, then rarer, to spare the driver."""
    yield from repeat(interval, FINE_LOOKS)
    while True:
        interval = min(interval * 1.5, max(SLOWEST, interval))
        yield interval


def _not_released(
    device: Device, target: int | None, timeout: float, reading: Reading | None, ours: Callable[[int], bool] | None
) -> NotReleased:
    if reading is None:
        return NotReleased(f"{device.name} did not answer within {timeout:g} s", target=target, reading=None)
    strangers = tuple(holder for holder in reading.holders if ours is None or not ours(holder.pid))
    held = "; ".join(describe(holder, ours) for holder in reading.holders) or "nobody that the driver names"
    message = (
        f"{device.name} has {_gib(reading.free)} free of {_gib(reading.total)} after {timeout:g} s, "
        f"and {_gib(target or 0)} must be; held by {held}"
    )
    if strangers and ours is not None:
        message += ". End what is not ours, or lower the model's `memory`"
    return NotReleased(message, target=target, reading=reading, strangers=strangers)


def describe(holder: Holder, ours: Callable[[int], bool] | None = None) -> str:
    """Return e.g. ``PID 4121, python, 3.2 GiB, not ours``."""
    size = "unknown size" if holder.bytes is None else _gib(holder.bytes)
    whose = "" if ours is None else ", ours" if ours(holder.pid) else ", not ours"
    return f"PID {holder.pid}, {holder.name}, {size}{whose}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
