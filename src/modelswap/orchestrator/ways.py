"""Tells the scheduler how each model is to be put out, from what was measured and what memory is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import structlog

from modelswap.core import events
from modelswap.devices.base import Reading
from modelswap.orchestrator import hostmemory, sleepers
from modelswap.orchestrator.abilities import sleep_levels
from modelswap.orchestrator.choice import STOP, Room, SleepWay, Verdict, choose
from modelswap.orchestrator.facts import Configured
from modelswap.orchestrator.hosting import Hosted, Outside
from modelswap.orchestrator.measurements import COLD, STANDBY, sleeping, waking
from modelswap.orchestrator.measurements import STOP as STOPPING

_log = structlog.get_logger(__name__)


class Chooser:
    """Chooses anew whenever it is asked to `tell`, and tells what has changed.

    ``reading`` returns the device as it was read last; what can't be read has no sleepers, because nobody could see
    their memory come back. ``forced`` is what calibration says instead, by model.
    """

    def __init__(
        self, outside: Outside, configured: Callable[[], Configured], reading: Callable[[], Reading | None]
    ) -> None:
        self.forced: dict[str, int] = {}
        self._outside = outside
        self._configured = configured
        self._reading = reading
        self._told: dict[str, tuple[str, int]] = {}

    def tell(self) -> None:
        """Tell the scheduler of every model whose way out is another than before."""
        configured = self._configured()
        for name, definition in configured.definitions.items():
            before = self._told.get(name, (definition, STOP))
            level = self._level(configured, name, definition)
            if (definition, level) == before or (before[0] != definition and level == STOP):
                self._told[name] = (definition, level)
                continue
            self._told[name] = (definition, level)
            _log.info("way out", model=name, way=f"sleep at level {level}" if level else "stop")
            self._outside.post(events.Ways(at=self._outside.clock(), model=name, definition=definition, level=level))

    def _level(self, configured: Configured, name: str, definition: str) -> int:
        spec, engine = configured.config.models[name], configured.engines[name]
        levels = sleep_levels(self._outside, definition, spec, engine) if spec.device == "gpu" else ()
        if not levels:
            return STOP
        if name in self.forced:
            return self.forced[name]
        reading, known = self._reading(), self._outside.measurements
        if reading is None or not known.reference(name, definition):
            return STOP
        ways_in = [known.of(name, definition, mechanism) for mechanism in (COLD, STANDBY)]
        way_in = min((way.steady for way in ways_in if way.steady is not None and way.ok is not False), default=None)
        out = known.seconds(name, definition, STOPPING) or 0.0
        hosted = next((one for one in self._outside.hosted.values() if one.model == name), None)
        ways = [self._way(name, definition, level, hosted) for level in levels]
        return choose(None if way_in is None else way_in + out, ways, self._room(configured, name, reading, hosted))

    def _way(self, name: str, definition: str, level: int, hosted: Hosted | None) -> SleepWay:
        known = self._outside.measurements
        sleep = known.of(name, definition, sleeping(level))
        wake = known.of(name, definition, waking(level))
        verdict = {None: Verdict.UNTRIED, True: Verdict.GOOD, False: Verdict.OFF}[sleep.ok]
        seconds = None if sleep.steady is None or wake.steady is None else sleep.steady + wake.steady
        host = sleep.host if sleep.host is not None else self._guess(definition, level, hosted)
        paid = hosted.host_bytes if hosted is not None else 0
        return SleepWay(
            level=level,
            verdict=verdict,
            seconds=seconds,
            host=max(host - paid, 0),
            residue=sleep.residue or 0,  # unknown: it is tried, and what is missing then is taken from sleepers
        )

    def _guess(self, definition: str, level: int, hosted: Hosted | None) -> int:
        """Return roughly what a sleeper will take; whoever puts it to sleep looks closely."""
        if level != 1:
            return 0
        held = hosted.held if hosted is not None else None
        return int(self._outside.weights.get(definition, held or 0) * sleepers.PINNED)

    def _room(self, configured: Configured, name: str, reading: Reading, hosted: Hosted | None) -> Room:
        """Return what is left if every sleeper goes that is worth less."""
        outside = self._outside
        mine = hosted.instance if hosted is not None else ""
        lesser = sleepers.lesser(outside, name, but=mine)
        memory = outside.memory
        spare = hostmemory.spare(memory.budget(), sleepers.spent(outside), memory.available(), memory.total)
        needs = list(_needs(configured, name, reading.total))
        device = None
        if needs:
            held = sleepers.residues(outside, but=mine) - sum(sleeper.residue for sleeper in lesser)
            device = reading.total - max(needs) - held
        return Room(host=spare + sum(sleeper.host for sleeper in lesser), device=device)


def _needs(configured: Configured, but: str, total: int) -> Iterator[int]:
    """Yield what the other models need of the device, as far as that can be told."""
    for name, spec in configured.config.models.items():
        if name == but or spec.device != "gpu":
            continue
        need = spec.memory if spec.memory is not None else configured.engines[name].device_bytes(spec, total)
        if need is not None and need <= total:
            yield int(need)
