"""What of a `Stepped` world can make a difference to its future, with names and numbers made canonical.

Left out are times (an explored world's clock stands still), counters that only grow, what was recorded, and what was
last said of reading ahead, which follows from the rest. Numbers of epochs, instances, tickets and requests become ranks
among those that are still about.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final

from modelswap.core import leases as core_leases
from modelswap.core.held import Lease
from modelswap.core.world import Instance, World
from modelswap.protocol.messages import (
    Admitted,
    Close,
    Contended,
    Drained,
    Epoch,
    Fault,
    Forget,
    Hello,
    Message,
    Open,
    Refuse,
    Usage,
    Want,
)
from modelswap.simulator.gateway import Gateway
from modelswap.simulator.links import Link
from modelswap.simulator.stepped import Stepped
from modelswap.simulator.system import System

_NONE: Final = Epoch(0, 0)


def fingerprint(world: Stepped) -> int:
    """Return a number that is the same for worlds with the same future (and, practically, only for those)."""
    return hash(_Canon(world.system).of(world))


class _Canon:
    """The ranks of one world."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.epochs: dict[Epoch, int] = {}
        self.instances: dict[str, int] = {}
        self.tickets: dict[tuple[str, int], int] = {}
        self.requests: dict[int, int] = {}
        self._seen_epochs: set[Epoch] = {_NONE}
        self._seen_tickets: set[tuple[str, int]] = set()
        instances = set(system.machine.engines)
        if system.scheduler is not None:
            scheduler = system.scheduler.world
            instances.update(scheduler.instances)
            for instance in scheduler.instances.values():
                self._seen_epochs.update(epoch for _, epoch in instance.leases)
                if instance.epoch is not None:
                    self._seen_epochs.add(instance.epoch)
            self._seen_epochs.update(epoch for _, epoch in scheduler.fences)
            self._seen_tickets.update(ticket.key for ticket in scheduler.waiting)
        instances.update(task.subject for task in system.tasks.values())
        for name, gateway in system.gateways.items():
            self._seen_epochs.update(lease.epoch for lease in gateway.admission.leases)
            self._seen_tickets.update((name, ticket) for ticket in gateway.waiting)
        for link in system.arriving:
            for _, said in link.up:
                self._see(link.gateway, said)
            for _, heard in link.down:
                self._see(link.gateway, heard)
        self.epochs.update((epoch, rank) for rank, epoch in enumerate(sorted(self._seen_epochs)))
        ordered = sorted(instances, key=lambda id_: [int(p) if p.isdigit() else -1 for p in id_.split(".")[1:]])
        self.instances.update((id_, rank) for rank, id_ in enumerate(ordered))
        counts: dict[str, int] = {}
        for gateway_name, ticket in sorted(self._seen_tickets):
            counts[gateway_name] = counts.get(gateway_name, 0) + 1
            self.tickets[gateway_name, ticket] = counts[gateway_name]
        counts.clear()
        for request in system.requests.values():
            if request.outcome is None:
                counts[request.gateway] = counts.get(request.gateway, 0) + 1
                self.requests[request.id] = counts[request.gateway]

    def of(self, world: Stepped) -> Hashable:
        """Return all of it."""
        system, budget = self.system, world.budget
        scheduler = system.scheduler
        return (
            (budget.asks, budget.leaves, budget.first_bytes, budget.drops, budget.engine_deaths, budget.failures),
            (budget.stops, budget.gateway_deaths, budget.restarts, budget.commands, budget.stalls, world.stalled),
            (budget.appearances, budget.spoilings, budget.sleeper_drops, budget.pins),
            None if scheduler is None else self._scheduler(scheduler.world),
            tuple(self._gateway(gateway) for gateway in system.gateways.values()),
            tuple(self._link(link) for link in system.arriving),
            tuple(sorted((t.kind, self.instances[t.subject], t.model, t.kill) for t in system.tasks.values())),
            tuple(
                (
                    self.instances[e.instance],
                    e.address[1],
                    e.ready,
                    e.alive,
                    (e.disturbed, e.by_hand, e.holding, e.falling),
                    tuple(sorted((r.gateway, self.requests[r.id]) for r in e.running.values())),
                )
                for e in system.machine.engines.values()
            ),
            tuple(system.machine.free),
            bool(system.machine.unreleased),
            tuple(sorted((self.instances[i], s.state) for i, s in system.journal.items() if i in self.instances)),
            tuple(sorted(system.known)),
            (tuple(sorted(system.machine.prepared)), tuple(sorted(system.told_prepared))),
        )

    # ── the scheduler ────────────────────────────────────────────────────────────────────────────────────

    def _scheduler(self, world: World) -> Hashable:
        return (
            tuple(self._instance(instance) for instance in world.instances.values()),
            tuple(
                (
                    device.dirty,
                    (bool(device.stuck), self._id(device.stuck_by or None)),
                    bool(device.blocked),
                    swap
                    and (
                        swap.target,
                        swap.phase,
                        swap.aborted,
                        swap.idle,
                        self._ids(swap.victims),
                        self._id(swap.instance),
                    ),
                )
                for device in world.devices.values()
                for swap in (device.swap,)
            ),
            tuple((m.backoff is not None, m.failures, m.early_deaths, m.mishaps) for m in world.models.values()),
            tuple((m.preparation.state, m.unprepared_starts) for m in world.models.values()),
            tuple((m.way, m.pin, m.failed_wakes) for m in world.models.values()),
            self._ids(list(world.appeared)),
            tuple(world.gateways),
            tuple(
                (
                    model,
                    tuple(
                        (
                            gateway,
                            tuple(
                                (self._ticket(ticket.key), self._id(ticket.floor_of))
                                for ticket in world.waiting.of_gateway(gateway)
                                if ticket.model == model
                            ),
                        )
                        for gateway in world.waiting.line(model).gateways()
                    ),
                )
                for model in list(world.waiting.models())
            ),
            (world.begun, world.shutting_down, tuple(sorted(world.expected)), tuple(sorted(world.doubtful))),
            tuple(sorted((gateway, self.epochs[epoch]) for gateway, epoch in world.fences)),
            (
                tuple(r.preload for r in world.ensures.values()),
                tuple(sorted(str(r.model) for r in world.unloads.values())),
            ),
        )

    def _instance(self, instance: Instance) -> Hashable:
        return (
            self.instances[instance.id],
            instance.model,
            instance.state,
            self._epoch(instance.epoch),
            instance.port,
            instance.slots,
            instance.floor,
            instance.gone,
            instance.probing,
            (instance.contended, instance.adopted, instance.falling, instance.asleep),
            tuple(sorted(instance.strays)),
            tuple(self._held(lease) for lease in instance.leases.values()),
        )

    def _held(self, lease: core_leases.Lease) -> Hashable:
        return (
            lease.gateway,
            self.epochs[lease.epoch],
            lease.granted,
            lease.revision,
            lease.upper,
            lease.in_flight,
            lease.served > 0,
            lease.closing,
            lease.ended,
            lease.stale,
            lease.faults,
            lease.faults_seen,
            tuple(lease.told),
        )

    # ── gateways and what is on its way ──────────────────────────────────────────────────────────────────

    def _gateway(self, gateway: Gateway) -> Hashable:
        admission = gateway.admission
        return (
            gateway.name,
            gateway.stopped,
            gateway.wants_link,
            admission.catalog is not None,
            tuple(sorted(self._lease(lease) for lease in admission.leases)),
            (admission._reconnecting, tuple(sorted(admission._contended))),
            tuple(
                (str(m), tuple(self._ticket((gateway.name, t)) for t in line)) for m, line in admission._lines.items()
            ),
            tuple(
                (self._ticket((gateway.name, ticket)), self.requests[r.id], r.model, r.requeued)
                for ticket, r in gateway.waiting.items()
            ),
            tuple(
                sorted(
                    (self.requests[r.id], r.model, r.streaming, r.requeued, self.epochs[lease.epoch])
                    for r, lease in gateway.running.values()
                )
            ),
            tuple((None if r is None else self.requests.get(r.id, 0), well) for r, well in gateway.backlog),
        )

    def _lease(self, lease: Lease) -> tuple[Any, ...]:
        return (
            lease.model,
            self.epochs[lease.epoch],
            lease.slots,
            lease.revision,
            lease.state,
            lease.in_flight,
            lease.served > 0,
            lease.faults,
            lease.address[1],
        )

    def _link(self, link: Link) -> Hashable:
        return (
            link.gateway,
            self.system.links.get(link.gateway) is link,
            self.system.gateways[link.gateway].link is link,
            link.lost_at is not None,
            tuple(self._said(link.gateway, message) for _, message in link.up),
            tuple(self._said(link.gateway, message) for _, message in link.down),
        )

    def _said(self, gateway: str, message: Message) -> Hashable:
        match message:
            case Want():
                return ("want", self.tickets[gateway, message.ticket], message.model)
            case Forget() | Refuse():
                return (type(message).__name__, self.tickets[gateway, message.ticket])
            case Admitted():
                return ("admitted", self.tickets[gateway, message.ticket], message.model, self.epochs[message.epoch])
            case Usage():
                epoch = self.epochs[message.epoch]
                return ("usage", message.model, epoch, message.revision, message.in_flight, message.served > 0)
            case Open():
                epoch = self.epochs[message.epoch]
                return ("open", message.model, epoch, message.port, message.slots, message.revision, message.faults)
            case Close():
                return ("close", message.model, self.epochs[message.epoch], message.abort)
            case Drained():
                return ("drained", message.model, self.epochs[message.epoch])
            case Fault():
                return ("fault", message.model, self.epochs[message.epoch], message.n)
            case Contended():
                return ("contended", message.model, message.contended)
            case Hello():
                leases = tuple(
                    (held.model, self.epochs[held.epoch], held.slots, held.in_flight, held.closing)
                    for held in message.leases
                )
                return ("hello", leases, tuple(self._said(gateway, want) for want in message.tickets))
            case _:
                return type(message).__name__

    # ── ranks ────────────────────────────────────────────────────────────────────────────────────────────

    def _see(self, gateway: str, message: Message) -> None:
        match message:
            case Want() | Forget() | Refuse():
                self._seen_tickets.add((gateway, message.ticket))
            case Admitted():
                self._seen_tickets.add((gateway, message.ticket))
                self._seen_epochs.add(message.epoch)
            case Usage() | Open() | Close() | Drained() | Fault():
                self._seen_epochs.add(message.epoch)
            case Hello():
                for ticket in message.tickets:
                    self._see(gateway, ticket)
                self._seen_epochs.update(held.epoch for held in message.leases)
            case _:
                pass

    def _epoch(self, epoch: Epoch | None) -> int:
        return self.epochs[epoch] if epoch is not None else -1

    def _id(self, instance: str | None) -> int:
        return self.instances.get(instance, -1) if instance is not None else -1

    def _ids(self, instances: list[str]) -> tuple[int, ...]:
        return tuple(self._id(instance) for instance in instances)

    def _ticket(self, key: tuple[str, int]) -> int:
        return self.tickets.get(key, 0)
