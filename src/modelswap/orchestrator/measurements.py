"""What was measured of each model's ways in and out, in memory and in the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from modelswap.core.estimates import Average
from modelswap.orchestrator.store import Store, peek

COLD: Final = "cold"
STANDBY: Final = "standby"
STOP: Final = "stop"
_ONCE: Final = (COLD, STANDBY, STOP)

TOKENS: Final = 16
"""How many tokens of a greedy answer are compared."""
LEAST_AGREEMENT: Final = 4
"""Fewer tokens in common prove nothing, unless the whole answers are equal."""
FAILURES: Final = 3
"""A level that failed so many times in a row isn't used any more."""
_QUERY: Final = "select record from measurements"


def sleeping(level: int) -> str:
    """Return the name of the mechanism that puts to sleep at ``level``."""
    return f"sleep{level}"


def waking(level: int) -> str:
    """Return the name of the mechanism that wakes from ``level``."""
    return f"wake{level}"


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One way in or out of one model, while it is defined as it is. Seconds and bytes.

    ``first`` is the first time of an instance (its host memory is pinned then), ``steady`` the moving average of the
    later ones. Of ways that every instance goes only once (cold, standby, stop), ``first`` is the first time there was
    (caches are filled then), and ``steady`` the same until there is a second. ``residue`` is the device
    memory that is left while it sleeps, ``host`` the host memory that it takes. ``ok`` False: not used any more, for
    ``reason``. ``answer`` is the greedy answer of the first cold start, ``reference`` what a second one had in common
    with it.
    """

    model: str
    mechanism: str
    definition: str
    version: str = ""
    first: float | None = None
    steady: float | None = None
    last: float | None = None
    count: int = 0
    residue: int | None = None
    host: int | None = None
    ok: bool | None = None
    failures: int = 0
    reason: str = ""
    answer: tuple[str, ...] | None = None
    reference: tuple[str, ...] = ()
    at: float = 0.0


class Measurements:
    """All of them. Those of another definition or engine version count as not there.

    ``on_change`` is told the model whose measurements have changed, ``on_took`` the model, mechanism and seconds of
    each time that a way was gone.
    """

    def __init__(self, store: Store, on_change: Callable[[str], None] = lambda _: None) -> None:
        self._store = store
        self._known: dict[tuple[str, str], Measured] = {}
        self.on_change = on_change
        self.on_took: Callable[[str, str, float], None] = lambda *_: None

    async def begin(self) -> None:
        """Read what earlier orchestrators measured."""
        for found in _decoded(await self._store.read(_QUERY)):
            self._known[found.model, found.mechanism] = found

    def of(self, model: str, definition: str, mechanism: str) -> Measured:
        """Return what is known; an empty one if that is nothing."""
        found = self._known.get((model, mechanism))
        if found is None or found.definition != definition:
            return Measured(model=model, mechanism=mechanism, definition=definition)
        return found

    def seconds(self, model: str, definition: str, mechanism: str) -> float | None:
        """Return the moving average; None until measured."""
        return self.of(model, definition, mechanism).steady

    def took(self, model: str, definition: str, mechanism: str, seconds: float, *, first: bool = False) -> None:
        """Take in how long it took; ``first``: the first time of an instance that goes this way again and again."""
        self.on_took(model, mechanism, seconds)
        before = self.of(model, definition, mechanism)
        once = mechanism in _ONCE
        average = Average(None if once and before.count == 1 else before.steady)
        if not first:
            average.add(seconds)
        if mechanism == STANDBY and before.failures and before.ok is not False:
            before = msgspec.structs.replace(before, failures=0, reason="")
        self._put(
            before,
            first=seconds if first or (once and before.count == 0) else before.first,
            steady=average.value,
            last=seconds,
            count=before.count + 1,
        )

    def slept(self, model: str, definition: str, level: int, *, residue: int | None, host: int | None) -> None:
        """Note what a sleeper leaves on the device, and takes of the host."""
        self._put(self.of(model, definition, sleeping(level)), residue=residue, host=host)

    def proved(self, model: str, definition: str, level: int) -> None:
        """Note that an instance slept, woke and answered as it should."""
        self._put(self.of(model, definition, sleeping(level)), ok=True, failures=0, reason="")

    def failed(self, model: str, definition: str, level: int, reason: str) -> None:
        """Note that a sleep or a wake went wrong; after `FAILURES` in a row the level is off."""
        self.spoilt(model, definition, sleeping(level), reason)

    def spoilt(self, model: str, definition: str, mechanism: str, reason: str) -> bool:
        """Note that a way went wrong; returns whether it is still used, which it isn't after `FAILURES` in a row."""
        before = self.of(model, definition, mechanism)
        failures = before.failures + 1
        ok = False if failures >= FAILURES else before.ok
        self._put(before, ok=ok, failures=failures, reason=reason)
        return ok is not False

    def settle(self, model: str, definition: str, level: int) -> None:
        """Switch a level off that failed and has not been proved since: it was tried on purpose, and did not do."""
        before = self.of(model, definition, sleeping(level))
        if before.failures:
            self._put(before, ok=False)

    def noted(self, model: str, definition: str, level: int, reason: str) -> None:
        """Note why a level has not been tried."""
        before = self.of(model, definition, sleeping(level))
        if before.ok is None and before.reason != reason:
            self._put(before, reason=reason)

    def wrong(self, model: str, definition: str, level: int, reason: str) -> None:
        """Note that an instance's answers were wrong after it had woken: the level is off."""
        self._put(self.of(model, definition, sleeping(level)), ok=False, reason=reason)

    def answered(self, model: str, definition: str, answer: tuple[str, ...] | None) -> None:
        """Take in a cold start's greedy answer (None: the engine has none); two that agree make the reference."""
        before = self.of(model, definition, COLD)
        if before.reference or answer is None:
            return
        if before.answer is None:
            self._put(before, answer=answer)
            return
        common = _common(before.answer, answer)
        enough = len(common) >= LEAST_AGREEMENT or (common == answer == before.answer and common)
        if enough:
            self._put(before, answer=answer, reference=common, failures=0, reason="")
        else:
            reason = "two cold starts answered differently, so that a woken engine's answers can't be judged"
            self._put(before, answer=answer, failures=before.failures + 1, reason=reason)

    def wants_answer(self, model: str, definition: str) -> bool:
        """Return whether a cold start's greedy answer is still of use."""
        known = self.of(model, definition, COLD)
        return not known.reference and known.failures < FAILURES

    def reference(self, model: str, definition: str) -> tuple[str, ...]:
        """Return what every instance of a model answers; empty until two cold starts have agreed."""
        return self.of(model, definition, COLD).reference

    def versioned(self, model: str, definition: str, version: str) -> None:
        """Note the engine's version; measurements of another one are forgotten."""
        before = self.of(model, definition, COLD)
        if before.version == version or not version:
            return
        if before.version:
            self.forget(model)
        self._put(self.of(model, definition, COLD), version=version)

    def forget(self, model: str) -> None:
        """Forget everything about a model: it is measured anew."""
        for key in [key for key in self._known if key[0] == model]:
            del self._known[key]
        self._store.send(("delete from measurements where model = ?", (model,)))
        self.on_change(model)

    def table(self, definitions: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
        """Return what holds for these models (name, definition) as plain data, by model and mechanism."""
        return table((found for _, found in sorted(self._known.items())), definitions)

    def _put(self, before: Measured, **changes: object) -> None:
        measured = msgspec.structs.replace(before, at=time.time(), **changes)
        self._known[measured.model, measured.mechanism] = measured
        row = (measured.model, measured.mechanism, msgspec.json.encode(measured).decode())
        self._store.send(("insert or replace into measurements values (?, ?, ?)", row))
        self.on_change(measured.model)


def table(known: Iterable[Measured], definitions: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return which of ``known`` holds for these models (name, definition), as plain data in the same order."""
    current = dict(definitions)
    return [
        {
            "model": found.model,
            "mechanism": found.mechanism,
            "ok": found.ok,
            "reason": found.reason,
            "first_seconds": found.first,
            "steady_seconds": found.steady,
            "last_seconds": found.last,
            "count": found.count,
            "residue_bytes": found.residue,
            "host_bytes": found.host,
            "reference_tokens": len(found.reference) if found.mechanism == COLD else None,
            "reference": "".join(found.reference) if found.mechanism == COLD else None,
            "engine_version": found.version or None,
            "at": found.at,
        }
        for found in known
        if current.get(found.model) == found.definition
    ]


def kept_in(database: Path) -> list[Measured]:
    """Return what an orchestrator has measured that may run or not; nothing if its database can't be read.

    Blocks for the reading of a file, which is left as it is.
    """
    return list(_decoded(peek(database, _QUERY)))


def agrees(answer: tuple[str, ...] | None, reference: tuple[str, ...]) -> bool:
    """Return whether a greedy answer begins as the reference says."""
    return answer is not None and answer[: len(reference)] == reference


def _decoded(rows: Iterable[tuple[Any, ...]]) -> Iterator[Measured]:
    for (record,) in rows:
        try:
            yield msgspec.json.decode(record, type=Measured)
        except (msgspec.DecodeError, TypeError):  # written by another version
            continue


def _common(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    common = 0
    while common < min(len(first), len(second)) and first[common] == second[common]:
        common += 1
    return first[:common]
