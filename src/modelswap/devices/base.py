"""The Protocol that every kind of device fulfils."""

from __future__ import annotations

from typing import Protocol

import msgspec


class Holder(msgspec.Struct, frozen=True):
    """A process that holds device memory. ``bytes`` is None where the driver doesn't tell."""

    pid: int
    name: str
    bytes: int | None = None


class Reading(msgspec.Struct, frozen=True):
    """One look at a device's memory, in bytes. Free bytes are the truth; ``holders`` explain it."""

    total: int
    free: int
    holders: tuple[Holder, ...] = ()


class Device(Protocol):
    """A GPU, or the single slot of a machine where no memory can be read."""

    name: str
    kind: str

    async def read(self) -> Reading | None:
        """Return a reading without blocking the event loop; None where memory can't be read."""
        ...
