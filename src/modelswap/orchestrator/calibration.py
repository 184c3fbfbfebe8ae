"""Measures a model's ways in and out on purpose, by swaps like all others.

Two cold starts make the reference answer. Then it is started once from a standby, if one waits, and for each level that
the engine allows, a fresh instance sleeps and wakes twice. The executors measure and judge, as they do in every swap;
here they are only given the occasions: the model is asked for as an operator does, and put out again as soon as it is
idle. What was resident before comes back in the end, unless somebody wants something else by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from modelswap.core import events
from modelswap.core.snapshot import Snapshot
from modelswap.core.states import InstanceState
from modelswap.orchestrator.abilities import sleep_levels
from modelswap.orchestrator.answers import Answers
from modelswap.orchestrator.facts import Configured
from modelswap.orchestrator.hosting import Outside
from modelswap.orchestrator.measurements import sleeping
from modelswap.orchestrator.ways import Chooser
from modelswap.protocol.errors import Code, ModelswapError

COLD_STARTS: Final = 2
WAKES: Final = 2
OUT_LIMIT: Final = 900.0
"""How long a model may take to be put out, in seconds: requests for it may come in between."""
LOOK_EVERY: Final = 0.02
_OUT: Final = frozenset({InstanceState.ABSENT, InstanceState.ASLEEP, InstanceState.FAILED})

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False, kw_only=True)
class Calibrator:
    """Calibrates one model at a time. ``reconfigure`` tells the scheduler what `idle` has changed to.

    ``publish`` is told each step.
    """

    outside: Outside
    chooser: Chooser
    answers: Answers
    configured: Callable[[], Configured]
    snapshot: Callable[[], Snapshot]
    reconfigure: Callable[[], None]
    publish: Callable[..., None]
    idle: set[str] = field(default_factory=set)
    """Models that are to be put out as soon as they have nothing to do."""
    progress: dict[str, Any] | None = None
    """What is being done now, None if nothing is."""

    async def calibrate(self, *models: str) -> list[dict[str, Any]]:
        """Forget what was measured of ``models`` and measure them anew, in turn; returns that as plain data.

        Raises `ModelswapError` if one can't be made resident, or another calibration goes on. Cancelling it is safe.
        """
        before = next((view.resident for view in self.snapshot().devices if view.resident is not None), None)
        measured: list[dict[str, Any]] = []
        try:
            for model in models:
                if self.progress is not None:
                    busy, before = self.progress["model"], None
                    raise ModelswapError(f"{busy} is being calibrated; wait for that", code=Code.BAD_REQUEST)
                measured += await self._one(model)
        finally:
            if before is not None:
                self._bring_back(before, models)
        return measured

    async def _one(self, model: str) -> list[dict[str, Any]]:
        configured = self.configured()
        self._refuse_pinned(model)
        definition = configured.definitions[model]
        levels, standby = self._levels(model), self._stands_by(model)
        steps = COLD_STARTS + standby + len(levels) * (1 + WAKES)
        self._tell(model, "begin", 0, steps)
        try:
            self._begin(model)
            await self._calibrate(model, definition, levels, steps, standby=standby)
        finally:
            self.progress = None
            self.outside.without_standby.discard(model)
            self.idle.discard(model)
            self.chooser.forced.pop(model, None)
            self.reconfigure()
            self.chooser.tell()
        result = self.outside.measurements.table([(model, definition)])
        self.publish("calibrated", model=model, measurements=result)
        _log.info("calibrated", model=model, levels=levels)
        return result

    def _refuse_pinned(self, model: str) -> None:
        """Raise `ModelswapError`, before anything is forgotten, if an operator has pinned it: it would stay in."""
        view = next((view for view in self.snapshot().models if view.name == model), None)
        if view is not None and view.pinned and not self.configured().config.models[model].pin:
            raise ModelswapError(f"{model} is pinned; release it first", code=Code.MODEL_PINNED)

    def _bring_back(self, model: str, calibrated: tuple[str, ...]) -> None:
        """Ask for what was resident before, unless another model has the device, or is wanted there."""
        others = [one for one in self.snapshot().models if one.device is not None and one.name not in calibrated]
        taken = any(one.state not in _OUT or one.waiting for one in others)
        if model in self.configured().config.models and not taken:
            number = self.answers.number()
            self.outside.post(events.Ensure(at=self.outside.clock(), request=number, model=model))

    def _begin(self, model: str) -> None:
        self.outside.measurements.forget(model)
        self.chooser.forced[model] = 0
        self.chooser.tell()
        self.idle.add(model)
        self.reconfigure()

    async def _calibrate(
        self, model: str, definition: str, levels: tuple[int, ...], steps: int, *, standby: bool
    ) -> None:
        step = 0
        self._tell(model, "making room", step, steps)
        await self._unload(model)
        self.outside.without_standby.add(model)
        for number in range(COLD_STARTS):
            step += 1
            self._tell(model, f"cold start {number + 1}", step, steps)
            await self._ensure(model)
            await self._out(model)
        self.outside.without_standby.discard(model)
        if standby:
            step += 1
            self._tell(model, "start from standby", step, steps)
            await self._ensure(model)
            await self._out(model)
        if not self.outside.measurements.reference(model, definition):
            return
        for level in levels:
            step = await self._level(model, definition, level, step, steps)

    async def _level(self, model: str, definition: str, level: int, step: int, steps: int) -> int:
        """Have a fresh instance sleep and wake; returns the number of the step reached."""
        self._force(model, level)
        end = step + 1 + WAKES
        self._tell(model, f"sleep level {level}", step + 1, steps)
        await self._ensure(model)
        for number in range(WAKES):
            if await self._out(model) is not InstanceState.ASLEEP:
                break
            self._tell(model, f"wake {number + 1} from level {level}", step + 2 + number, steps)
            if await self._ensure(model) != "wake":
                break
        self.outside.measurements.settle(model, definition, level)
        self._force(model, 0)
        if await self._out(model) is InstanceState.ASLEEP:
            await self._unload(model)
        return end

    def _force(self, model: str, level: int) -> None:
        self.chooser.forced[model] = level
        self.chooser.tell()

    def _levels(self, model: str) -> tuple[int, ...]:
        configured = self.configured()
        spec = configured.config.models[model]
        if spec.device != "gpu":
            return ()
        return sleep_levels(self.outside, configured.definitions[model], spec, configured.engines[model])

    def _stands_by(self, model: str) -> bool:
        """Return whether a standby waits that the model may be started from."""
        waits = any(state.ready for state in self.outside.runtime.standbys())
        return waits and self.configured().config.models[model].standby

    async def _ensure(self, model: str) -> str:
        """Make it resident; returns the mechanism by which it came in."""
        return await self._ask(lambda number: events.Ensure(at=self.outside.clock(), request=number, model=model))

    async def _unload(self, model: str) -> None:
        await self._ask(lambda number: events.Unload(at=self.outside.clock(), request=number, model=model))

    async def _ask(self, event: Callable[[int], events.Event]) -> str:
        number, future = self.answers.expect()
        try:
            self.outside.post(event(number))
            answer = await future
        finally:
            if self.answers.forget(number):
                self.outside.post(events.Withdraw(at=self.outside.clock(), request=number))
        if answer.code is not None:
            raise ModelswapError(answer.message, code=answer.code)
        return answer.mechanism

    async def _out(self, model: str) -> InstanceState:
        """Return the model's state once it has been put out because it was idle."""
        try:
            async with asyncio.timeout(OUT_LIMIT):
                while True:
                    view = next((view for view in self.snapshot().models if view.name == model), None)
                    if view is None:
                        raise ModelswapError(f"{model} is not in the config any more", code=Code.MODEL_NOT_FOUND)
                    if view.pinned:
                        raise ModelswapError(f"{model} is pinned; release it first", code=Code.MODEL_PINNED)
                    if view.state in _OUT:
                        return view.state
                    await asyncio.sleep(LOOK_EVERY)
        except TimeoutError:
            raise ModelswapError(
                f"{model} was not idle for {OUT_LIMIT:g} s; calibrate it when it has less to do", code=Code.SWAP_TIMEOUT
            ) from None

    def _tell(self, model: str, doing: str, step: int, steps: int) -> None:
        self.progress = {"model": model, "doing": doing, "step": step, "steps": steps}
        self.publish("calibration", **self.progress)
        _log.info("calibrating", model=model, doing=doing, step=step, steps=steps)


def verdicts(outside: Outside, configured: Configured, model: str) -> dict[int, bool | None]:
    """Return what is known of each level of a model: good, off, or not yet tried."""
    definition = configured.definitions[model]
    levels = sleep_levels(outside, definition, configured.config.models[model], configured.engines[model])
    return {level: outside.measurements.of(model, definition, sleeping(level)).ok for level in levels}
