"""The scheduler's state as plain data, for ``GET /status``, metrics and the dashboard. Ages in seconds."""

from __future__ import annotations

import msgspec

from modelswap.core.states import InstanceState, Preparedness
from modelswap.core.swap import Phase


class InstanceView(msgspec.Struct, frozen=True, kw_only=True):
    """One instance; ``asleep`` is the level at which it sleeps, 0 if it doesn't."""

    instance: str
    model: str
    device: str | None
    state: InstanceState
    resident: bool
    epoch: str | None
    host: str
    port: int
    slots: int
    in_flight: int
    state_age: float
    stage: str = ""
    fraction: float | None = None
    asleep: int = 0


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """One configured model; ``swap_seconds`` is the moving average of bringing it in, once measured.

    ``prepare_stage`` and ``prepare_fraction`` (0..1, where it can be known) tell how far its ``preparation`` is.
    ``sleep_level`` is the level at which it will be put to sleep, 0 if it will be stopped.
    """

    name: str
    device: str | None
    state: InstanceState
    resident: bool
    waiting: int
    waiting_bytes: int
    oldest_wait: float
    in_flight: int
    swap_seconds: float | None
    backoff_seconds: float = 0.0
    problem: str = ""
    preparation: Preparedness = Preparedness.DONE
    prepare_stage: str = ""
    prepare_fraction: float | None = None
    sleep_level: int = 0
    pinned: bool = False


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """One device; ``problem`` says why it takes no swaps now, ``asleep`` which models sleep there."""

    name: str
    capacity: int
    used: int
    unverified: int
    resident: str | None
    problem: str = ""
    asleep: tuple[str, ...] = ()


class SwapView(msgspec.Struct, frozen=True, kw_only=True):
    """A swap under way."""

    device: str
    source: str | None
    target: str | None
    phase: Phase
    seconds: float
    phases: dict[str, float]


class GatewayView(msgspec.Struct, frozen=True, kw_only=True):
    """A connected gateway."""

    gateway: str
    silent_for: float
    waiting: int
    leases: int


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    begun: bool
    generation: int
    models: tuple[ModelView, ...]
    instances: tuple[InstanceView, ...]
    devices: tuple[DeviceView, ...]
    swaps: tuple[SwapView, ...]
    gateways: tuple[GatewayView, ...]
