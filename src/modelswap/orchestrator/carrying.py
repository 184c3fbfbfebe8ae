"""Carries out the scheduler's effects: what is quick at once and in order, what takes time as tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import structlog

from modelswap.core import effects, events
from modelswap.core.states import InstanceState
from modelswap.orchestrator import bringing_in, putting_out, releasing, watching
from modelswap.orchestrator.answers import Answers
from modelswap.orchestrator.facts import Configured
from modelswap.orchestrator.feed import Feed
from modelswap.orchestrator.history import History
from modelswap.orchestrator.hosting import Hosted, Outside
from modelswap.orchestrator.links import Links
from modelswap.orchestrator.metrics import Metrics
from modelswap.orchestrator.tasks import Tasks
from modelswap.protocol.errors import Code
from modelswap.protocol.messages import Open, OrchestratorMessage

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
            case effects.PutOut():
                work = putting_out.put_out(self.outside, effect.instance, kill=effect.kill)
                self.tasks.start(work, f"put out {effect.instance}")
            case effects.Watch():
                hosted = self.outside.hosted.get(effect.instance)
                unwatched = hosted is not None and (hosted.watch is None or hosted.watch.done())
                if hosted is not None and hosted.running is not None and unwatched:
                    hosted.watch = self.tasks.start(watching.watch(self.outside, hosted), f"watch {effect.instance}")
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
        work = bringing_in.bring_in(self.outside, hosted, adopted=effect.adopted)
        hosted.job = self.tasks.start(work, f"bring in {effect.instance}")

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
        work = releasing.verify_released(
            self.outside,
            effect.device,
            configured.config.device,
            configured.config.models.get(effect.model),
            configured.engines.get(effect.model),
        )
        self.tasks.start(work, f"verify released {effect.device}")

    def _swap_ended(self, effect: effects.SwapEnded) -> None:
        record = effect.record
        self.history.add(record)
        self.metrics.swap_ended(record)
        _log.info(
            "swap",
            source=record.source,
            target=record.target,
            mechanism=record.mechanism,
            outcome=str(record.outcome),
            seconds=round(record.seconds, 3),
            message=record.message.partition("\n")[0],
            **{f"{phase}_seconds": round(seconds, 3) for phase, seconds in record.phases.items()},
        )
        self.feed.publish("swap", **msgspec.to_builtins(record))
