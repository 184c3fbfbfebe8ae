"""Goes through every interleaving of a small world whose clock stands still."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from modelswap.core.policy import Policy
from modelswap.core.scheduler import Scheduler
from modelswap.core.world import World
from modelswap.protocol.messages import Close, Contended
from modelswap.simulator.fingerprint import fingerprint
from modelswap.simulator.stepped import Action, Stepped
from modelswap.simulator.traffic import Violation, claim


def _revive(policy: Policy, world: World) -> Scheduler:
    scheduler = Scheduler(world.generation, policy)
    scheduler._world = world
    return scheduler


_REDUCED: Final = copyreg.dispatch_table | {
    # Its handlers are made anew faster than copied.
    Scheduler: lambda scheduler: (_revive, (scheduler._policy, scheduler._world)),
}


@dataclass(slots=True)
class Explored:
    """What was covered: distinct states, steps between them, states in which nothing is owed to anybody."""

    states: int = 0
    steps: int = 0
    rests: int = 0


@dataclass(slots=True)
class _Frame:
    live: Stepped | None
    """The world itself, for whichever step is tried first; the others start from copies."""
    frozen: bytes
    state: int
    action: Action
    todo: list[Action] = field(default_factory=list)


def begin(world: Stepped) -> None:
    """Let a new world's gateways connect, and everything that follows from that happen."""
    while owed := _owed(world):
        world.do(owed[0])


def explore(world: Stepped, *, at_most: int = 10_000_000) -> Explored:
    """Try everything that can happen to ``world``, in every order, depth first.

    In every state all that `System.check` and `Scheduler.check` assert holds; no sequence of steps leads back to where
    it began (nothing runs in circles); and wherever nothing is owed any more, every request has its outcome once time
    passes, and nothing is left over. So every request ends, whatever came before. Raises `Violation` with the
    steps that led there, or when there are more than ``at_most`` states.
    """
    found = Explored()
    seen: set[int] = set()
    path: set[int] = set()
    stack: list[_Frame] = []
    _enter(world, ("begin",), found, seen, path, stack)
    while stack:
        frame = stack[-1]
        if not frame.todo:
            stack.pop()
            path.discard(frame.state)
            continue
        action = frame.todo.pop()
        after, frame.live = frame.live or _thaw(frame.frozen), None
        try:
            after.do(action)
            found.steps += 1
            _enter(after, action, found, seen, path, stack)
        except AssertionError as error:
            story = [frame.action for frame in stack] + [action]
            raise Violation(f"{error}\nafter {story}") from error
        if found.states > at_most:
            raise Violation(f"more than {at_most} states")
    return found


def _enter(
    world: Stepped, action: Action, found: Explored, seen: set[int], path: set[int], stack: list[_Frame]
) -> None:
    state = fingerprint(world)
    claim(state not in path, "it runs in circles")
    if state in seen:
        return
    seen.add(state)
    found.states += 1
    _forget_history(world)
    todo = _possible(world)
    rests = not _owed(world)
    frozen = _freeze(world) if len(todo) + rests > 1 else b""
    if rests:
        found.rests += 1
        (_thaw(frozen) if frozen else world).settle()
    path.add(state)
    stack.append(_Frame(world, frozen, state, action, todo))


def _freeze(world: Stepped) -> bytes:
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = _REDUCED
    pickler.dump(world)
    return buffer.getvalue()


def _thaw(frozen: bytes) -> Stepped:
    return cast(Stepped, pickle.loads(frozen))  # noqa: S301 - our own bytes, from a moment ago


def _forget_history(world: Stepped) -> None:
    world.story.clear()
    for request in list(world.system.requests.values()):
        if request.outcome is not None:
            del world.system.requests[request.id]
    world.system.swaps.clear()
    world.system.answers.clear()
    if world.system.scheduler is not None:
        for instance in world.system.scheduler.world.instances.values():
            instance.story.clear()


def _timeless(actions: Sequence[Action]) -> list[Action]:
    return [action for action in actions if action[0] not in ("tick", "time", "deadline")]


def _owed(world: Stepped) -> list[Action]:
    return _timeless(world.owed())


def _possible(world: Stepped) -> list[Action]:
    """Return what to try: all, or one step that could be taken first in any order with the same result.

    A gateway with nothing running, to which nothing else can happen any more, takes in a message that lets no request
    through: that commutes with whatever happens elsewhere.
    """
    budget = world.budget
    if not (budget.asks or budget.disturbances):
        for name, gateway in world.system.gateways.items():
            link = gateway.link
            if link is None or not link.down or gateway.running or gateway.stopped:
                continue
            if not gateway.waiting or isinstance(link.down[0][1], Contended | Close):
                return [("down", name)]
    return _timeless(world.enabled())
