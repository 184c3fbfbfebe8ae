"""What the scheduler is told about the world: models, devices, settings. Times in seconds, memory in bytes."""

from __future__ import annotations

from typing import Literal

import msgspec

from modelswap.protocol.messages import CatalogModel


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A configured model as the scheduler sees it.

    ``definition`` changes when a running instance of it would have to be started anew. ``device`` is None for models
    that run beside the others. ``demand`` is what an instance takes of its device's capacity; an exclusive device has
    capacity 1 and every model on it demands 1. ``listing`` is what gateways and clients are told. ``swap_seconds``
    is what bringing it in took before, if that is known. ``prepare``: it must be made ready before its first swap.

    After ``ttl`` seconds with nothing to do it is put out: as ``idle`` says it sleeps if it may (`events.Ways`), is
    stopped, or is kept. While a ``pinned`` one is resident it isn't left for others, nor for being idle. ``preload``:
    it comes in at start if its device has nothing; the first such model of each device does.
    """

    name: str
    definition: str
    device: str | None
    slots: int
    listing: CatalogModel
    demand: int = 1
    swap_seconds: float | None = None
    priority: int = 0
    prepare: bool = False
    ttl: float | None = None
    idle: Literal["sleep", "stop", "keep"] = "sleep"
    pinned: bool = False
    preload: bool = False


class DeviceFacts(msgspec.Struct, frozen=True):
    """A device and its capacity, in the unit of `ModelFacts.demand`."""

    name: str
    capacity: int = 1


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduling rules' parameters; meanings in `modelswap.spec.config.Scheduling`.

    ``min_residency`` None means ``residency_factor`` times the measured swap time of the resident model.
    A model that dies within ``crash_window`` of coming in, ``crashes_forgiven`` times in a row and then once more,
    backs off as if its start had failed. A start that failed by no fault of the model's is repeated
    ``mishaps_forgiven`` times, one that found something missing which had been prepared ``unprepared_forgiven`` times.
    A model whose wakes failed more than ``wakes_forgiven`` times in a row is stopped from then on, until `events.Ways`.
    """

    max_wait: float = 160.0
    min_residency: float | None = None
    residency_factor: float = 3.0
    linger: float = 2.0
    drain_timeout: float = 300.0
    abort_on_drain_timeout: bool = False
    queue_requests: int = 1000
    queue_bytes: int = 1 << 30
    queue_timeout: float = 590.0
    priority_boost: float = 30.0
    term: float = 10.0
    backoff_first: float = 2.0
    backoff_longest: float = 300.0
    crash_window: float = 10.0
    crashes_forgiven: int = 3
    mishaps_forgiven: int = 2
    unprepared_forgiven: int = 2
    wakes_forgiven: int = 2
    progress_interval: float = 2.0
