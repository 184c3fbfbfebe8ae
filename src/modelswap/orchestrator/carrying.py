"""Carries out the scheduler's effects: what is quick at once and in order, what takes time as tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import structlog

from modelswap.core import effects, events
from modelswap.core.states import InstanceState
from modelswap.core.swap import Phase, SwapOutcome, SwapRecord
from modelswap.orchestrator import (
    appearances,
    bringing_in,
    preparing,
    putting_out,
    releasing,
    sleeping,
    waking,
    watching,
)
from modelswap.orchestrator.answers import Answers
from modelswap.orchestrator.facts import Configured
from modelswap.orchestrator.feed import Feed
from modelswap.orchestrator.history import History
from modelswap.orchestrator.hosting import Hosted, Outside, Preparing
from modelswap.orchestrator.links import Links
from modelswap.orchestrator.metrics import CANARY, Metrics
from modelswap.orchestrator.preparing import Weights
from modelswap.orchestrator.reading_ahead import ReadingAhead
from modelswap.orchestrator.tasks import Tasks
from modelswap.protocol.errors import Code
from modelswap.protocol.messages import Open, OrchestratorMessage
from modelswap.runtimes.base import Running

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Carrier:
    """Where effects go. ``configured`` returns the config that the scheduler was told last."""

    outside: Outside
    links: Links
    answers: Answers
    history: History
    feed: Feed
    metrics: Metrics
    tasks: Tasks
    configured: Callable[[], Configured]
    on_finished: Callable[[], None]
    weights: Weights
    ahead: ReadingAhead

    def carry(self, effect: effects.Effect) -> None:
        """Carry out one effect; what takes time goes on as a task and reports with an event."""
        match effect:
            case effects.Say():
                self.links.say(effect.gateway, self._with_key(effect.message))
            case effects.Transitioned():
                self._transitioned(effect)
            case effects.TicketEnded():
                self.metrics.ticket_ended(effect.model, effect.outcome, effect.waited)
            case effects.BringIn():
                self._bring_in(effect)
            case effects.Sleep():
                self._sleep(effect)
            case effects.Wake():
                self._wake(effect)
            case effects.PutOut():
                work = putting_out.put_out(self.outside, effect.instance, kill=effect.kill)
                self.tasks.start(work, f"put out {effect.instance}")
            case effects.Watch():
                hosted = self.outside.hosted.get(effect.instance)
                unwatched = hosted is not None and (hosted.watch is None or hosted.watch.done())
                if hosted is not None and hosted.running is not None and unwatched:
                    work = watching.watch(self.outside, hosted, asleep=effect.asleep)
                    hosted.watch = self.tasks.start(work, f"watch {effect.instance}")
            case effects.Prepare():
                self._prepare(effect)
            case effects.ReadAhead():
                self.ahead.turn_to(effect)
            case effects.TurnAway():
                self._turn_away(effect)
            case effects.Probe():
                self.tasks.start(watching.probe(self.outside, effect.instance), f"probe {effect.instance}")
            case effects.VerifyReleased():
                self._verify_released(effect)
            case effects.SwapEnded():
                self._swap_ended(effect)
            case effects.Answer():
                self.answers.give(effect)
            case effects.Disconnect():
                self.links.disconnect(effect.gateway, effect.reason)
            case effects.Finished():
                self.on_finished()
            case _:
                raise TypeError(f"nobody carries out {effect!r}")

    def _with_key(self, message: OrchestratorMessage) -> OrchestratorMessage:
        """Return an `Open` with the model's API key, which is no business of the scheduler's."""
        if isinstance(message, Open) and message.api_key is None:
            model = self.configured().config.models.get(message.model)
            if model is not None and model.api_key is not None:
                return msgspec.structs.replace(message, api_key=model.api_key.get_secret_value())
        return message

    def _transitioned(self, effect: effects.Transitioned) -> None:
        self.outside.journal.moved(effect.instance, effect.after)
        self.metrics.transitioned(effect.model, effect.before, effect.after)
        level = _log.warning if effect.after is InstanceState.FAILED else _log.info
        level("instance", instance=effect.instance, model=effect.model, state=str(effect.after), cause=effect.cause)
        self.feed.publish(
            "transition",
            instance=effect.instance,
            model=effect.model,
            before=effect.before,
            after=effect.after,
            cause=effect.cause,
        )

    def _bring_in(self, effect: effects.BringIn) -> None:
        hosted = self.outside.hosted.get(effect.instance)
        if hosted is None:
            configured = self.configured()
            spec = configured.config.models.get(effect.model)
            if spec is None or configured.definitions[effect.model] != effect.definition:
                self._refuse(effect)
                return
            hosted = Hosted(
                instance=effect.instance,
                model=effect.model,
                definition=effect.definition,
                spec=spec,
                engine=configured.engines[effect.model],
            )
            self.outside.hosted[effect.instance] = hosted
        elif effect.adopted and hosted.running is not None and effect.instance not in self.outside.journal.entries:
            self.take_up(hosted.running)
        work = bringing_in.bring_in(self.outside, hosted, adopted=effect.adopted)
        hosted.job = self.tasks.start(work, f"bring in {effect.instance}")

    def _sleep(self, effect: effects.Sleep) -> None:
        hosted = self.outside.hosted.get(effect.instance)
        if hosted is None or hosted.running is None:
            message = "nothing of it runs"
            self.outside.post(events.SleepFailed(at=self.outside.clock(), instance=effect.instance, message=message))
            return
        timeout = self.configured().config.device.release_timeout
        work = sleeping.fall_asleep(self.outside, hosted, effect.level, timeout, target=effect.target)
        hosted.job = self.tasks.start(work, f"sleep {effect.instance}")

    def _wake(self, effect: effects.Wake) -> None:
        hosted = self.outside.hosted.get(effect.instance)
        if hosted is None or hosted.running is None:
            message = "nothing of it runs"
            self.outside.post(events.WakeFailed(at=self.outside.clock(), instance=effect.instance, message=message))
            return
        timeout = self.configured().config.device.release_timeout
        work = waking.wake(self.outside, hosted, effect.level, timeout)
        hosted.job = self.tasks.start(work, f"wake {effect.instance}")

    def take_up(self, running: Running) -> None:
        """Note that an instance that somebody else has started goes on as one of ours."""
        self.outside.journal.found(running)
        self.foreign_start(running, "adopted", "nothing else was on the device")

    def foreign_start(self, running: Running, outcome: str, reason: str) -> None:
        """Tell what becomes of an instance that somebody else has started: ``adopted`` or ``stopped``."""
        said = {"model": running.model, "instance": running.instance, "reason": reason}
        level = _log.warning if outcome == "stopped" else _log.info
        level("started by somebody else", outcome=outcome, container=running.container[:12], **said)
        self.metrics.foreign_start(running.model, outcome)
        self.feed.publish("foreign_start", outcome=outcome, container=running.container, **said)

    def turn_away(self, running: Running, reason: str) -> asyncio.Task[None]:
        """Stop an instance that somebody else has started; no start begins before it has ended."""
        self.foreign_start(running, "stopped", reason)
        task = self.tasks.start(appearances.turn_away(self.outside, running), f"stop {running.instance}")
        self.outside.turning_away[running.instance] = task
        task.add_done_callback(lambda _: self.outside.turning_away.pop(running.instance, None))
        return task

    def _turn_away(self, effect: effects.TurnAway) -> None:
        hosted = self.outside.hosted.pop(effect.instance, None)
        if hosted is not None and hosted.running is not None:
            self.turn_away(hosted.running, effect.reason)

    def _prepare(self, effect: effects.Prepare) -> None:
        current = self.outside.preparing.get(effect.model)
        given_up = current is None or current.job is None or current.job.cancelling()
        if current is not None and current.definition == effect.definition and not given_up:
            return
        configured = self.configured()
        spec = configured.config.models.get(effect.model)
        if spec is None or configured.definitions[effect.model] != effect.definition:
            return  # the scheduler has yet to hear of the config that has replaced it, and asks again then
        began = Preparing(effect.model, effect.definition, self.outside.clock())
        self.outside.preparing[effect.model] = began

        def ended(well: bool, seconds: float) -> None:
            self.metrics.prepared(effect.model, well=well, seconds=seconds)
            self.feed.publish("prepare", model=effect.model, outcome="ok" if well else "failed", seconds=seconds)

        work = preparing.prepare(
            self.outside,
            began,
            spec,
            configured.engines[effect.model],
            self.weights,
            before=current.job if current is not None else None,
            ended=ended,
        )
        began.job = self.tasks.start(work, f"prepare {effect.model}")

    def _refuse(self, effect: effects.BringIn) -> None:
        self.outside.post(
            events.BringInFailed(
                at=self.outside.clock(),
                instance=effect.instance,
                code=Code.MODEL_START_FAILED,
                message=f"{effect.model} was changed or removed in the config just now",
            )
        )

    def _verify_released(self, effect: effects.VerifyReleased) -> None:
        configured = self.configured()
        sleepers = (one for one in self.outside.hosted.values() if one.asleep and one.model == effect.model)
        work = releasing.verify_released(
            self.outside,
            effect.device,
            configured.config.device,
            configured.config.models.get(effect.model),
            configured.engines.get(effect.model),
            next((one for one in sleepers if not (one.leaving or one.given_up)), None),
            current=lambda: self.configured().config.models.get(effect.model),
        )
        self.tasks.start(work, f"verify released {effect.device}")

    def _with_canary(self, record: SwapRecord) -> SwapRecord:
        """Return the record with the canary as a phase of its own, not part of the coming in."""
        taken = record.phases.get(Phase.IN)
        if record.outcome is not SwapOutcome.OK or taken is None:
            return record
        came = next((one for one in self.outside.hosted.values() if one.model == record.target and one.ready), None)
        if came is None or not came.canary_seconds:
            return record
        canary = min(came.canary_seconds, taken)
        return msgspec.structs.replace(record, phases={**record.phases, Phase.IN: taken - canary, CANARY: canary})

    def _swap_ended(self, effect: effects.SwapEnded) -> None:
        record = self._with_canary(effect.record)
        self.history.add(record)
        self.metrics.swap_ended(record)
        _log.info(
            "swap",
            source=record.source,
            target=record.target,
            mechanism=record.mechanism,
            out=record.out,
            outcome=str(record.outcome),
            seconds=round(record.seconds, 3),
            queue_seconds=round(record.queue, 3),
            message=record.message.partition("\n")[0],
            **{f"{phase}_seconds": round(seconds, 3) for phase, seconds in record.phases.items()},
        )
        self.feed.publish("swap", **msgspec.to_builtins(record))
