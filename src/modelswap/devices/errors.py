"""What can go wrong with devices."""

from __future__ import annotations

from modelswap.devices.base import Holder, Reading
from modelswap.protocol.errors import Code, ModelswapError


class DeviceUnavailable(ModelswapError):
    """The configured device can't be used at all: no driver, no such GPU, no ledger. The message says what to do."""

    code = Code.DEVICE_STUCK


class DeviceUnreadable(ModelswapError):
    """The device answered before and does not any more (lost from the bus, its driver unloaded)."""

    code = Code.DEVICE_STUCK


class NotReleased(ModelswapError):
    """Device memory is not as free as it has to be; raised when the time for that is over.

    ``target`` is in bytes. ``reading`` is the last one, None if the device did not answer at all. ``strangers`` are the
    holders that are not ours.
    """

    code = Code.MEMORY_NOT_RELEASED

    def __init__(
        self, message: str, *, target: int | None, reading: Reading | None, strangers: tuple[Holder, ...] = ()
    ):
        super().__init__(message)
        self.target = target
        self.reading = reading
        self.strangers = strangers
