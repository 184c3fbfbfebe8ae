"""Swaps that have been, and how long each model takes to come in."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Final

import msgspec

from modelswap.core.swap import Phase, SwapOutcome, SwapRecord
from modelswap.orchestrator.store import Store

_SHOWN: Final = 50
_KEPT: Final = 10_000


class History:
    """The last swaps, newest first, and mean times by model and mechanism, in memory and in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._swaps: deque[tuple[float, SwapRecord]] = deque(maxlen=_SHOWN)
        self._timings: dict[tuple[str, str], tuple[int, float, float]] = {}

    async def begin(self) -> None:
        """Read what earlier orchestrators measured."""
        rows = await self._store.read("select at, record from swaps order by id desc limit ?", (_SHOWN,))
        for at, record in rows:
            try:
                self._swaps.append((at, msgspec.json.decode(record, type=SwapRecord)))
            except msgspec.DecodeError:  # written by another version
                continue
        for model, mechanism, count, mean, last in await self._store.read("select * from timings"):
            self._timings[model, mechanism] = (count, mean, last)

    def add(self, record: SwapRecord) -> None:
        """Keep a swap."""
        at = time.time()
        self._swaps.appendleft((at, record))
        self._store.send(
            ("insert into swaps (at, record) values (?, ?)", (at, msgspec.json.encode(record).decode())),
            ("delete from swaps where id <= (select max(id) from swaps) - ?", (_KEPT,)),
        )
        if record.outcome is SwapOutcome.OK and record.target is not None:
            count, mean, _ = self._timings.get((record.target, record.mechanism), (0, 0.0, 0.0))
            count += 1
            # Draining is other requests' time, and says nothing about this model.
            taken = record.seconds - record.phases.get(Phase.DRAIN, 0.0)
            mean += (taken - mean) / count
            self._timings[record.target, record.mechanism] = (count, mean, taken)
            row = (record.target, record.mechanism, count, mean, taken)
            self._store.send(("insert or replace into timings values (?, ?, ?, ?, ?)", row))

    def swaps(self) -> list[dict[str, Any]]:
        """Return the last swaps as plain data, newest first; ``at`` in Unix seconds."""
        return [{"at": at, **msgspec.to_builtins(record)} for at, record in self._swaps]

    def swap_seconds(self, model: str) -> float | None:
        """Return what bringing a model in took last, in seconds; None if it never was."""
        return min((last for (name, _), (_, _, last) in self._timings.items() if name == model), default=None)

    def timings(self) -> list[dict[str, Any]]:
        """Return the measured times of bringing models in, in seconds."""
        return [
            {"model": model, "mechanism": mechanism, "count": count, "mean_seconds": mean, "last_seconds": last}
            for (model, mechanism), (count, mean, last) in sorted(self._timings.items())
        ]
