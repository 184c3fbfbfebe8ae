"""What of an earlier orchestrator's instances goes on, and what is killed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    """A living instance to go on with. ``ready``: it had been opened; otherwise its start is taken up.

    ``foreign``: somebody else has started it, and no orchestrator has known of it yet. ``asleep``: the level that it
    sleeps at, 0 if it is awake.
    """

    running: Running
    slots: int
    ready: bool
    foreign: bool = False
    asleep: int = 0


class Stray(msgspec.Struct, frozen=True):
    """A living instance to end, and why. ``foreign``: somebody else has started it."""

    running: Running
    reason: str
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Findings:
    """The outcome: every living instance is in exactly one of the two."""

    adopted: tuple[Adoption, ...]
    strays: tuple[Stray, ...]


def sort_out(
    living: Iterable[Running],
    journal: Mapping[str, Entry],
    configured: Configured,
    foreign: Callable[[Running], bool] = lambda _: False,
) -> Findings:
    """Match what runs with the journal and the config.

    Of several for one exclusive device (or for one model) the one that had been opened stays; among equals the younger,
    which the last swap brought in. What others have started (``foreign``) stays only where nothing of ours is; of
    several, the one that runs longest.
    """
    strays: list[Stray] = []
    places: dict[str, list[Adoption]] = {}
    for running in living:
        entry = journal.get(running.instance)
        strange = foreign(running)
        if reason := _no_place(running, entry, configured, foreign=strange):
            strays.append(Stray(running, reason, strange))
            continue
        model = configured.config.models[running.model]
        asleep = entry.asleep if entry is not None else 0
        ready = entry is not None and (entry.state in _OPENED or asleep > 0)
        known = entry.slots if entry is not None else 0
        slots = model.concurrency or known or configured.engines[running.model].slots(model)
        beside = model.device != "gpu" or asleep > 0
        place = f"model {running.model}" if beside else "the device"
        found = Adoption(running, slots, ready, foreign=entry is None, asleep=asleep)
        places.setdefault(place, []).append(found)
    adopted: list[Adoption] = []
    for place, candidates in places.items():
        candidates.sort(key=_rank, reverse=True)
        adopted.append(candidates[0])
        kept = candidates[0].running.instance
        strays += [Stray(one.running, f"{kept} has {place}", foreign(one.running)) for one in candidates[1:]]
    return Findings(tuple(adopted), tuple(strays))


def _rank(found: Adoption) -> tuple[bool, bool, float]:
    born = found.running.born
    return not found.foreign, found.ready, -born if found.foreign else born


def _no_place(running: Running, entry: Entry | None, configured: Configured, *, foreign: bool) -> str | None:
    """Return why an instance can't go on; None if it may."""
    if entry is None and not foreign:
        return "it isn't in the journal"
    if running.model not in configured.config.models:
        return "its model isn't in the config any more"
    if configured.definitions[running.model] != running.definition:
        return "its model's definition has changed"
    if entry is None:
        return None
    if entry.asleep:
        if entry.state is not InstanceState.ASLEEP:
            return "it was falling asleep or waking"
    elif entry.state not in _TAKEN_UP:
        return f"it was {entry.state}"
    if entry.container and (entry.container, entry.born) != (running.container, running.born):
        return "its container isn't the one in the journal, or was started again"
    if entry.pid and (entry.pid, entry.born) != (running.pid, running.born):
        return "its process isn't the one in the journal"
    return None
