"""What of an earlier orchestrator's instances goes on, and what is killed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from modelswap.core.states import InstanceState
from modelswap.orchestrator.facts import Configured
from modelswap.orchestrator.journal import Entry
from modelswap.runtimes.base import Running

_OPENED: Final = frozenset({InstanceState.READY, InstanceState.DRAINING})
_TAKEN_UP: Final = frozenset({InstanceState.STARTING, *_OPENED})


class Adoption(msgspec.Struct, frozen=True):
    """A living instance to go on with. ``ready``: it had been opened; otherwise its start is taken up."""

    running: Running
    slots: int
    ready: bool


class Stray(msgspec.Struct, frozen=True):
    """A living instance to kill, and why."""

    running: Running
    reason: str


@dataclass(frozen=True, slots=True)
class Findings:
    """The outcome: every living instance is in exactly one of the two."""

    adopted: tuple[Adoption, ...]
    strays: tuple[Stray, ...]


def sort_out(living: Iterable[Running], journal: Mapping[str, Entry], configured: Configured) -> Findings:
    """Match what runs with the journal and the config.

    Of several for one exclusive device (or for one model) the one that had been opened stays; among equals the younger.
    """
    strays: list[Stray] = []
    places: dict[str, list[Adoption]] = {}
    for running in living:
        entry = journal.get(running.instance)
        if reason := _no_place(running, entry, configured):
            strays.append(Stray(running, reason))
            continue
        assert entry is not None  # noqa: S101 - for the type checker: `_no_place` refuses what isn't journalled
        model = configured.config.models[running.model]
        ready = entry.state in _OPENED
        slots = model.concurrency or entry.slots or configured.engines[running.model].slots(model)
        place = "the device" if model.device == "gpu" else f"model {running.model}"
        places.setdefault(place, []).append(Adoption(running, slots, ready))
    adopted: list[Adoption] = []
    for place, candidates in places.items():
        candidates.sort(key=lambda found: (found.ready, found.running.born), reverse=True)
        adopted.append(candidates[0])
        kept = candidates[0].running.instance
        strays += [Stray(found.running, f"{kept} has {place}") for found in candidates[1:]]
    return Findings(tuple(adopted), tuple(strays))


def _no_place(running: Running, entry: Entry | None, configured: Configured) -> str | None:
    """Return why an instance can't go on; None if it may."""
    if entry is None:
        return "it isn't in the journal"
    if running.model not in configured.config.models:
        return "its model isn't in the config any more"
    if configured.definitions[running.model] != running.definition:
        return "its model's definition has changed"
    if entry.state not in _TAKEN_UP:
        return f"it was {entry.state}"
    if entry.pid and (entry.pid, entry.born) != (running.pid, running.born):
        return "its process isn't the one in the journal"
    return None
