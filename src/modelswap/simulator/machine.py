"""The truth about engines: which one listens where, what runs on it, who holds device memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from modelswap.simulator.traffic import Request, claim

Address = tuple[str, int]
HOST = "127.0.0.1"


@dataclass(slots=True, eq=False)
class Engine:
    """One start of an engine; it listens from its start on, but answers only when ``ready``.

    ``holding`` tells whether it holds device memory: from its start on, but not while it sleeps.
    """

    instance: str
    model: str
    definition: str
    device: str
    demand: int
    address: Address
    slots: int
    ready: bool = False
    alive: bool = True
    holding: bool = True
    falling: bool = False
    """It is being put to sleep."""
    by_hand: bool = False
    """Somebody else has started it."""
    disturbed: bool = False
    """A gateway may use it without the orchestrator knowing, so it may have more to do than it has slots."""
    running: dict[int, Request] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Machine:
    """Engines, addresses, device memory, and what has been prepared.

    A new engine gets the address that was left last. An engine's memory comes back only some time after its end:
    until `release`, it counts as ``unreleased``.
    """

    capacity: dict[str, int]
    engines: dict[str, Engine] = field(default_factory=dict)
    unreleased: dict[str, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    prepared: set[str] = field(default_factory=set)
    """Models whose image, weights and container are there."""
    _ports: int = 0

    def start(self, instance: str, model: str, definition: str, device: str | None, demand: int, slots: int) -> Engine:
        """Start an engine; its memory must be free."""
        place = device or f"beside:{instance}"
        port = self.free.pop() if self.free else self._new_port()
        engine = Engine(instance, model, definition, place, demand, (HOST, port), slots)
        if device is not None:
            self._claim_room(instance, device, demand)
        claim(instance not in self.engines, f"{instance} was started twice")
        self.engines[instance] = engine
        return engine

    def start_by_hand(
        self, instance: str, model: str, definition: str, device: str | None, demand: int, slots: int
    ) -> Engine:
        """Have somebody else start an engine, whoever holds the memory.

        Its address is a new one: which one it gets isn't ours to choose, so nobody can be kept from it.
        """
        place = device or f"beside:{instance}"
        engine = Engine(instance, model, definition, place, demand, (HOST, self._new_port()), slots, by_hand=True)
        self.engines[instance] = engine
        return engine

    def sleep(self, instance: str) -> None:
        """Have an engine give its memory up, all but its process; that may take a while, too."""
        engine = self.engines[instance]
        engine.falling = engine.ready = engine.holding = False
        self._leave(engine)

    def wake(self, instance: str) -> None:
        """Have a sleeping engine take its memory again, which must be free; it isn't ready yet."""
        engine = self.engines[instance]
        if engine.device in self.capacity:
            self._claim_room(instance, engine.device, engine.demand)
        engine.holding = True

    def _claim_room(self, instance: str, device: str, demand: int) -> None:
        held = sum(other.demand for other in self.engines.values() if other.device == device and other.holding)
        held += self.unreleased.get(device, 0)
        claim(
            held + demand <= self.capacity[device],
            f"{instance} comes in on {device}, where {held} of {self.capacity[device]} are held",
        )

    def _leave(self, engine: Engine) -> None:
        if engine.device in self.capacity:
            self.unreleased[engine.device] = self.unreleased.get(engine.device, 0) + engine.demand

    def _new_port(self) -> int:
        self._ports += 1
        return self._ports

    def die(self, instance: str) -> list[Request]:
        """End an engine's process; returns what ran on it. Its record stays until `bury`."""
        engine = self.engines[instance]
        engine.alive = engine.ready = False
        cut = list(engine.running.values())
        engine.running.clear()
        return cut

    def bury(self, instance: str) -> list[Request]:
        """Forget an engine, killing it if need be; its address is free from now on. Returns what ran on it."""
        engine = self.engines.get(instance)
        if engine is None:
            return []
        cut = self.die(instance)
        del self.engines[instance]
        self.free.append(engine.address[1])
        if engine.holding:
            self._leave(engine)
        return cut

    def release(self, device: str) -> None:
        """Give back the memory of all engines that have ended."""
        self.unreleased.pop(device, None)

    def at(self, address: Address) -> Engine | None:
        """Return the engine that listens at an address."""
        return next((e for e in self.engines.values() if e.alive and e.address == address), None)

    def find(self, accepts: Callable[[Engine], bool]) -> list[Engine]:
        """Return the engines that are as asked."""
        return [engine for engine in self.engines.values() if accepts(engine)]
