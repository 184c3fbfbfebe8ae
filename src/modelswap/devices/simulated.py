"""The simulated device that `modelswap.testing.engine` processes share."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from modelswap.devices.base import Holder, Reading
from modelswap.devices.errors import DeviceUnavailable, DeviceUnreadable
from modelswap.testing.ledger import Account, Ledger


class SimulatedDevice:
    """Reads a ledger file. Raises `DeviceUnavailable` if there is none at ``path``."""

    kind = "simulated"

    def __init__(self, path: Path) -> None:
        self.name = f"simulated ({path.name})"
        self._ledger = Ledger(path)
        if not path.is_file():
            raise DeviceUnavailable(
                f"there is no ledger at {path}; make one with modelswap.testing.ledger.Ledger.create(path, capacity)"
            )

    async def read(self) -> Reading:
        """Return what the ledger says; raises `DeviceUnreadable` if it has gone."""
        try:
            # In a thread, because another process may hold the ledger's lock.
            account = await asyncio.to_thread(self._ledger.read)
        except (OSError, msgspec.DecodeError) as error:
            raise DeviceUnreadable(f"the ledger {self._ledger.path} can't be read: {error}") from error
        return Reading(total=account.capacity, free=max(account.free, 0), holders=_holders(account))

    async def aclose(self) -> None:
        """Nothing is open."""


def _holders(account: Account) -> tuple[Holder, ...]:
    held: dict[int, Holder] = {}
    for allocation in account.allocations:
        before = held.get(allocation.pid)
        size = allocation.bytes + ((before.bytes or 0) if before else 0)
        held[allocation.pid] = Holder(allocation.pid, allocation.name, size)
    return tuple(held.values())
