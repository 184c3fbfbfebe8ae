"""The orchestrator's Prometheus metrics; every series exists from the start, at zero."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from modelswap.core.snapshot import Snapshot
from modelswap.core.states import InstanceState
from modelswap.core.swap import Phase, SwapOutcome, SwapRecord
from modelswap.devices.base import Reading

SWAP_BUCKETS: Final = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 30, 60, 120, 180, 300, 600)
WAIT_BUCKETS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
PREPARE_BUCKETS: Final = (0.05, 0.25, 1, 5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)
LAG_BUCKETS: Final = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)
CANARY: Final = "canary"
"""The phase in which a model that came in proves that it answers."""
QUEUE: Final = "queue"
NONE: Final = "none"
"""The label of no model: nothing was put out, or nothing was brought in."""
_PAIRS_UP_TO: Final = 12

_SWAP_LABELS: Final = ("from", "to", "mechanism", "outcome")
_MECHANISMS: Final = ("cold", "standby", "wake1", "wake2", "stop", "sleep1", "sleep2")
_PREPARED: Final = ("ok", "failed")
_SOURCES: Final = ("disk", "cache")
_FOREIGN: Final = ("adopted", "stopped")
_OUTCOMES: Final = ("granted", "refused", "forgotten")


class Metrics:
    """All of it, in a registry of its own. Labels hold only configured models."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._models: set[str] = set()
        self._counted: dict[str, int] = {}
        self._swaps = self._counter(
            "orchestrator_model_swaps_total", "Swaps, by what was put out and brought in", *_SWAP_LABELS
        )
        self._swap_seconds = Histogram(
            "orchestrator_swap_duration_seconds",
            "From the decision to swap until the model was open (successful swaps that brought a model in)",
            buckets=SWAP_BUCKETS,
            registry=self.registry,
        )
        self._phase_seconds = Histogram(
            "orchestrator_swap_phase_seconds",
            "Time spent in each phase of a swap",
            ["phase"],
            buckets=SWAP_BUCKETS,
            registry=self.registry,
        )
        self._current = self._gauge(
            "orchestrator_current_model", "1 for the model that has the device and is open, 0 for the others", "model"
        )
        self._depth = self._gauge("orchestrator_queue_depth", "Waiting requests", "model")
        self._queued_bytes = self._gauge("orchestrator_queue_bytes", "Bytes of waiting request bodies", "model")
        self._oldest = self._gauge("orchestrator_queue_oldest_seconds", "Age of the oldest waiting request", "model")
        self._in_flight = self._gauge("orchestrator_requests_in_flight", "Running requests, as reported", "model")
        self._waits = Histogram(
            "orchestrator_queue_wait_seconds",
            "How long granted requests had waited",
            ["model"],
            buckets=WAIT_BUCKETS,
            registry=self.registry,
        )
        self._tickets = self._counter(
            "orchestrator_queue_ended_total", "Waiting requests that ended", "model", "outcome"
        )
        self._state = self._gauge("orchestrator_instance_state", "1 for the state the instance is in", "model", "state")
        self._failures = self._counter("orchestrator_instance_failures_total", "Failed starts and wakes", "model")
        self._memory = self._gauge("orchestrator_device_memory_bytes", "Device memory, as last read", "device", "kind")
        self._device_problem = self._gauge("orchestrator_device_blocked", "1 while it takes no swaps", "device")
        self._gateways = self._gauge("orchestrator_gateways_connected", "Connected gateways")
        self._adoptions = self._counter("orchestrator_adoptions_total", "Instances found at start", "outcome")
        self._problems = self._counter("orchestrator_failures_total", "Failures of our own", "part")
        self._lag = Histogram(
            "orchestrator_scheduler_lag_seconds",
            "How long events waited for the scheduler",
            buckets=LAG_BUCKETS,
            registry=self.registry,
        )
        self._prepare_seconds = Histogram(
            "modelswap_prepare_seconds",
            "Making a model ready ahead of time: image, weights, container",
            ["model", "outcome"],
            buckets=PREPARE_BUCKETS,
            registry=self.registry,
        )
        self._mechanism_seconds = Histogram(
            "modelswap_mechanism_seconds",
            "Each way in (cold, standby, wake1, wake2) and out (stop, sleep1, sleep2) of a model",
            ["model", "mechanism"],
            buckets=SWAP_BUCKETS,
            registry=self.registry,
        )
        self._read_ahead_bytes = self._counter(
            "modelswap_read_ahead_bytes_total", "Weights read into the page cache ahead of a swap", "model", "source"
        )
        self._read_ahead_seconds = self._counter(
            "modelswap_read_ahead_seconds_total", "Time spent on reading weights ahead of a swap", "model"
        )
        self._host_memory = self._gauge("modelswap_host_memory_bytes", "Of sleepers and standbys", "kind")
        self._asleep = self._gauge("modelswap_sleepers", "Models that are asleep")
        self._foreign_starts = self._counter(
            "modelswap_foreign_starts_total", "Engines that somebody else has started", "model", "outcome"
        )
        for phase in (QUEUE, *Phase, CANARY):
            self._phase_seconds.labels(phase)
        for outcome in ("adopted", "resumed", "killed"):
            self._adoptions.labels(outcome)
        for part in ("scheduler", "task", "journal"):
            self._problems.labels(part)

    def configure(self, models: Iterable[str], devices: Iterable[str]) -> None:
        """Make the series of every configured model; those of models that are gone keep only their counts."""
        names = set(models)
        for gone in self._models - names:
            for gauge in (self._current, self._depth, self._queued_bytes, self._oldest, self._in_flight):
                gauge.remove(gone)
            for state in InstanceState:
                self._state.remove(gone, state)
        for name in names - self._models:
            for state in InstanceState:
                self._state.labels(name, state).set(1 if state is InstanceState.ABSENT else 0)
        self._models = names
        for name in names:
            for gauge in (self._current, self._depth, self._queued_bytes, self._oldest, self._in_flight):
                gauge.labels(name)
            for outcome in _OUTCOMES:
                self._tickets.labels(name, outcome)
            self._waits.labels(name)
            self._failures.labels(name)
            for ended in _PREPARED:
                self._prepare_seconds.labels(name, ended)
            for source in _SOURCES:
                self._read_ahead_bytes.labels(name, source)
            self._read_ahead_seconds.labels(name)
            for became in _FOREIGN:
                self._foreign_starts.labels(name, became)
            for mechanism in _MECHANISMS:
                self._mechanism_seconds.labels(name, mechanism)
            self._swaps.labels(NONE, name, "cold", SwapOutcome.OK)
            self._swaps.labels(NONE, name, "cold", SwapOutcome.FAILED)
            self._swaps.labels(name, NONE, "stop", SwapOutcome.OK)
        if len(names) <= _PAIRS_UP_TO:  # else the first swap of each pair makes its series
            for source, target in itertools.permutations(names, 2):
                self._swaps.labels(source, target, "cold", SwapOutcome.OK)
                self._swaps.labels(source, target, "cold", SwapOutcome.FAILED)
        for device in devices:
            self._device_problem.labels(device)

    def swap_ended(self, record: SwapRecord) -> None:
        """Count a swap."""
        source, target = record.source or NONE, record.target or NONE
        self._swaps.labels(source, target, record.mechanism, record.outcome).inc()
        if record.outcome is SwapOutcome.OK and record.target is not None:
            self._swap_seconds.observe(record.seconds)
        self._phase_seconds.labels(QUEUE).observe(record.queue)
        for phase, seconds in record.phases.items():
            self._phase_seconds.labels(phase).observe(seconds)

    def ticket_ended(self, model: str, outcome: str, waited: float) -> None:
        """Count a request that waits no more."""
        if model in self._models:
            self._tickets.labels(model, outcome).inc()
            if outcome == "granted":
                self._waits.labels(model).observe(waited)

    def transitioned(self, model: str, before: InstanceState, after: InstanceState) -> None:
        """Note an instance's new state."""
        if after is InstanceState.FAILED and model in self._models:
            self._failures.labels(model).inc()
        if model in self._models:
            self._state.labels(model, before).set(0)
            self._state.labels(model, after).set(1)

    def adoption(self, outcome: str) -> None:
        """Count an instance found at start: ``adopted``, ``resumed`` or ``killed``."""
        self._adoptions.labels(outcome).inc()

    def prepared(self, model: str, *, well: bool, seconds: float) -> None:
        """Note that a model has been made ready, or could not be."""
        if model in self._models:
            self._prepare_seconds.labels(model, "ok" if well else "failed").observe(seconds)

    def read_ahead(self, model: str, read: int, cached: int, seconds: float) -> None:
        """Note the bytes of a model's weights that were ``read``, those that were ``cached`` already, and the time."""
        if model in self._models:
            self._read_ahead_bytes.labels(model, "disk").inc(read)
            self._read_ahead_bytes.labels(model, "cache").inc(cached)
            self._read_ahead_seconds.labels(model).inc(seconds)

    def took(self, model: str, mechanism: str, seconds: float) -> None:
        """Note how long it took to bring a model in, or to put it out, in one of the ways."""
        if model in self._models:
            self._mechanism_seconds.labels(model, mechanism).observe(seconds)

    def host_memory(self, spent: int, spare: int) -> None:
        """Note the bytes of host memory that sleepers and standbys take, and may still take."""
        self._host_memory.labels("spent").set(spent)
        self._host_memory.labels("spare").set(spare)

    def foreign_start(self, model: str, outcome: str) -> None:
        """Count an engine that somebody else has started: ``adopted`` or ``stopped``."""
        if model in self._models:
            self._foreign_starts.labels(model, outcome).inc()

    def failed(self, part: str, total: int) -> None:
        """Note how many times a part of ours (``scheduler``, ``task``, ``journal``) has failed by now."""
        self._problems.labels(part).inc(total - self._counted.get(part, 0))
        self._counted[part] = total

    def lag(self, seconds: float) -> None:
        """Note how long an event waited for its turn."""
        self._lag.observe(seconds)

    def render(self, snapshot: Snapshot, reading: Reading | None, device: str, gateways: int) -> bytes:
        """Return everything in Prometheus' text format."""
        self._asleep.set(sum(model.state is InstanceState.ASLEEP for model in snapshot.models))
        for model in snapshot.models:
            if model.name in self._models:
                # What runs beside the others is not what the device has been swapped to.
                self._current.labels(model.name).set(1 if model.resident and model.device is not None else 0)
                self._depth.labels(model.name).set(model.waiting)
                self._queued_bytes.labels(model.name).set(model.waiting_bytes)
                self._oldest.labels(model.name).set(model.oldest_wait)
                self._in_flight.labels(model.name).set(model.in_flight)
        for view in snapshot.devices:
            self._device_problem.labels(view.name).set(1 if view.problem else 0)
        if reading is not None:
            self._memory.labels(device, "free").set(reading.free)
            self._memory.labels(device, "total").set(reading.total)
        self._gateways.set(gateways)
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)
