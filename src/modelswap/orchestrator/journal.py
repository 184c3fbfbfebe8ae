"""What must outlive the orchestrator: what it was about to start, what runs, which gateways it knew."""

from __future__ import annotations

import time
from typing import Final

import msgspec

from modelswap.core.states import InstanceState
from modelswap.engines.base import Address
from modelswap.orchestrator.store import Statement, Store
from modelswap.runtimes.base import Running

_READ: Final = (
    "select instance, model, definition, host, port, slots, state, pid, born, container, asleep from instances"
)
_PUT: Final = (
    "insert or replace into instances "
    "(instance, model, definition, host, port, slots, state, pid, born, container, updated, asleep) "
    "values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An instance as the journal knows it; ``pid`` or ``container`` is known once it has been started.

    ``asleep`` is the level that it sleeps at, or is being put to sleep or woken from (its state tells); 0: it is awake.
    """

    instance: str
    model: str
    definition: str
    address: Address
    slots: int = 0
    state: InstanceState = InstanceState.STARTING
    pid: int = 0
    born: float = 0.0
    container: str = ""
    asleep: int = 0


class Journal:
    """Instances and gateways, in memory and in the store. `intend` and `lay_down` wait until the store has it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._entries: dict[str, Entry] = {}
        self._gateways: set[str] = set()
        self._unheard: set[str] = set()

    async def begin(self) -> int:
        """Read what an earlier orchestrator left, and return this one's generation, greater than all before."""
        rows = await self._store.read("select value from meta where key = 'generation'")
        before = int(rows[0][0]) if rows and str(rows[0][0]).isdigit() else 0
        generation = max(before + 1, time.time_ns() // 1_000_000)
        for row in await self._store.read(_READ):
            instance, model, definition, host, port, slots, state, pid, born, container, asleep = row
            if state in list(InstanceState):
                self._entries[instance] = Entry(
                    instance=instance,
                    model=model,
                    definition=definition,
                    address=Address(host, port),
                    slots=slots,
                    state=InstanceState(state),
                    pid=pid,
                    born=born,
                    container=container,
                    asleep=asleep,
                )
        self._gateways = {row[0] for row in await self._store.read("select gateway from gateways")}
        self._unheard = set(self._gateways)
        await self._store.write(("insert or replace into meta values ('generation', ?)", (str(generation),)))
        return generation

    @property
    def entries(self) -> dict[str, Entry]:
        """Every instance that may run, by its id."""
        return dict(self._entries)

    @property
    def gateways(self) -> frozenset[str]:
        """The gateways that were connected."""
        return frozenset(self._gateways)

    async def intend(self, instance: str, model: str, definition: str, address: Address) -> None:
        """Note that an instance is about to be started; returns when that would survive our death."""
        entry = Entry(instance=instance, model=model, definition=definition, address=address)
        self._entries[instance] = entry
        await self._store.write(_row(entry))

    def found(self, running: Running) -> None:
        """Note an instance that somebody else has started and that we take up."""
        entry = Entry(
            instance=running.instance,
            model=running.model,
            definition=running.definition,
            address=running.address,
            pid=running.pid,
            born=running.born,
            container=running.container,
        )
        self._entries[entry.instance] = entry
        self._store.send(_row(entry))

    def started(self, running: Running) -> None:
        """Note an instance's process or container, and where it is reached."""
        self._change(
            running.instance,
            address=running.address,
            pid=running.pid,
            born=running.born,
            container=running.container,
        )

    def opened(self, instance: str, slots: int) -> None:
        """Note how many requests a healthy instance runs at once."""
        self._change(instance, slots=slots)

    async def lay_down(self, instance: str, level: int) -> None:
        """Note that an instance is about to be put to sleep; returns when that would survive our death."""
        entry = self._entries.get(instance)
        if entry is not None:
            self._entries[instance] = msgspec.structs.replace(entry, asleep=level)
            await self._store.write(_row(self._entries[instance]))

    def woke(self, instance: str) -> None:
        """Note that an instance is wide awake again."""
        self._change(instance, asleep=0)

    def moved(self, instance: str, state: InstanceState) -> None:
        """Note an instance's new state; it is forgotten when it is absent."""
        if state is InstanceState.ABSENT:
            self.forget(instance)
        else:
            self._change(instance, state=state)

    def forget(self, instance: str) -> None:
        """Forget an instance: nothing of it runs any more."""
        if self._entries.pop(instance, None) is not None:
            self._store.send(("delete from instances where instance = ?", (instance,)))

    def gateway_came(self, gateway: str) -> None:
        """Note a gateway that may hold leases from now on."""
        self._unheard.discard(gateway)
        if gateway not in self._gateways:
            self._gateways.add(gateway)
            self._store.send(_gateway_row(gateway))

    def gateway_went(self, gateway: str) -> None:
        """Forget a gateway that has gone."""
        if gateway in self._gateways:
            self._gateways.discard(gateway)
            self._store.send(("delete from gateways where gateway = ?", (gateway,)))

    def forget_unheard(self) -> None:
        """Forget the earlier orchestrator's gateways that have not come to us: after a term they hold no lease."""
        for gateway in list(self._unheard):
            self.gateway_went(gateway)
        self._unheard.clear()

    def write_anew(self) -> None:
        """Put everything into a store that has lost it, except the generation, which time renews."""
        self._store.send(
            *(_row(entry) for entry in self._entries.values()),
            *(_gateway_row(gateway) for gateway in self._gateways),
        )

    def _change(self, instance: str, **fields: object) -> None:
        entry = self._entries.get(instance)
        if entry is None:
            return
        changed = msgspec.structs.replace(entry, **fields)
        if changed != entry:
            self._entries[instance] = changed
            self._store.send(_row(changed))


def _row(entry: Entry) -> Statement:
    address = entry.address
    identity = (entry.instance, entry.model, entry.definition, address.host, address.port)
    return _PUT, (
        *identity,
        entry.slots,
        str(entry.state),
        entry.pid,
        entry.born,
        entry.container,
        time.time(),
        entry.asleep,
    )


def _gateway_row(gateway: str) -> Statement:
    return "insert or replace into gateways values (?, ?)", (gateway, time.time())
