"""A machine where no device memory can be read: one model at a time, and its process's end frees everything."""

from __future__ import annotations


class SlotDevice:
    """One slot without readings. ``reason`` is why memory can't be read, for people."""

    kind = "slot"

    def __init__(self, name: str = "slot", reason: str = "") -> None:
        self.name = name
        self.reason = reason

    async def read(self) -> None:
        """Return None: memory can't be read."""

    async def aclose(self) -> None:
        """Nothing is open."""
