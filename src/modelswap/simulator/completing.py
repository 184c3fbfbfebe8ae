"""How the shell's tasks end, and what the scheduler hears of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelswap.core import events
from modelswap.protocol.errors import Code
from modelswap.simulator.tasks import Kind, Task

if TYPE_CHECKING:
    from modelswap.simulator.system import System


def complete(system: System, task: Task, *, well: bool) -> None:
    """Tell the scheduler how a task ended (``well``: as hoped)."""
    match task.kind:
        case Kind.BRING_IN:
            _brought_in(system, task, well=well)
        case Kind.SLEEP:
            _slept(system, task, well=well)
        case Kind.WAKE:
            _woken(system, task, well=well)
        case Kind.PUT_OUT if well:
            system.bury(task.subject)
            system.handle(events.PutOut(at=system.now, instance=task.subject))
        case Kind.PUT_OUT:
            system.handle(events.PutOutFailed(at=system.now, instance=task.subject, message="can't be killed"))
            system.begin(Kind.PUT_OUT, task.subject, task.model)
        case Kind.VERIFY if well:
            for leaving in system.leaving(task.subject):
                system.bury(leaving)
            system.machine.release(task.subject)
            system.handle(events.Released(at=system.now, device=task.subject))
        case Kind.VERIFY:
            system.begin(Kind.VERIFY, task.subject, task.model)
            system.handle(events.ReleaseFailed(at=system.now, device=task.subject, message="still held"))
        case Kind.PROBE:
            engine = system.machine.engines.get(task.subject)
            healthy = engine is not None and engine.ready
            system.handle(events.Probed(at=system.now, instance=task.subject, healthy=healthy, message="it is gone"))
        case Kind.NOTICE_DEATH:
            system.handle(events.Died(at=system.now, instance=task.subject, message="exited with status 1"))
        case Kind.PREPARE if well:
            system.machine.prepared.add(task.subject)
            system.told_prepared.add(task.subject)
            system.handle(events.PrepareStage(at=system.now, model=task.subject, definition="v1", stage="pulling"))
            system.handle(events.Prepared(at=system.now, model=task.subject, definition="v1"))
        case Kind.PREPARE:
            system.handle(
                events.PrepareFailed(
                    at=system.now,
                    model=task.subject,
                    definition="v1",
                    code=Code.MODEL_START_FAILED,
                    message="no such image",
                )
            )
        case Kind.TURN_AWAY:
            system.bury(task.subject)


def _slept(system: System, task: Task, *, well: bool) -> None:
    """End falling asleep; an engine that has died, or runs a request that nobody knew of, can't."""
    engine = system.machine.engines[task.subject]
    if well and engine.alive and not engine.running:
        system.machine.sleep(task.subject)
        system.handle(events.Slept(at=system.now, instance=task.subject))
    else:
        engine.falling = False
        system.handle(events.SleepFailed(at=system.now, instance=task.subject, message="it won't sleep"))


def _woken(system: System, task: Task, *, well: bool) -> None:
    engine = system.machine.engines[task.subject]
    if well and engine.alive:
        engine.ready = True
        host, port = engine.address
        system.handle(
            events.BroughtIn(
                at=system.now, instance=task.subject, host=host, port=port, slots=engine.slots, mechanism="wake"
            )
        )
    else:
        system.bury(task.subject)
        system.handle(events.WakeFailed(at=system.now, instance=task.subject, message="out of memory"))


def _brought_in(system: System, task: Task, *, well: bool) -> None:
    engine = system.machine.engines.get(task.subject)
    needed = engine is not None and not engine.by_hand and system.facts[engine.model].prepare
    unprepared = needed and task.model not in system.machine.prepared
    if well and engine is not None and engine.alive and not unprepared:
        engine.ready = True
        host, port = engine.address
        system.handle(
            events.BroughtIn(at=system.now, instance=engine.instance, host=host, port=port, slots=engine.slots)
        )
        return
    system.bury(task.subject)
    if unprepared:
        system.told_prepared.discard(task.model)
    system.handle(
        events.BringInFailed(
            at=system.now,
            instance=task.subject,
            code=Code.MODEL_START_FAILED,
            message="it won't start",
            unprepared=unprepared,
        )
    )
