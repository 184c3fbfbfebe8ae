"""Keeps engine processes waiting for their models, made while the device is quiet: no model goes out or comes in."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import msgspec
import structlog

from modelswap.core.snapshot import Snapshot
from modelswap.core.swap import Phase
from modelswap.engines.base import Address, Engine, Place, StandbyPlan
from modelswap.orchestrator import sleepers
from modelswap.orchestrator.facts import Configured
from modelswap.orchestrator.hosting import Outside
from modelswap.orchestrator.preparing import Weights
from modelswap.orchestrator.shell import Shell
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import StandbyState
from modelswap.spec.config import Model

LOOK_EVERY: Final = 1.0
QUIET_FOR: Final = 3.0
"""Seconds after a model has gone out or come in, after which a standby may be made."""
USUAL_BYTES: Final = 700 << 20
"""Host memory that a standby is expected to take until it is measured (vLLM 0.32: 0.43 GiB when ready)."""
PLAN_EVERY: Final = 60.0
"""How often it is looked anew what standbys there could be, in seconds: an image may have come."""
CAN_STAND_BY: Final = frozenset({"vllm"})
"""The engines that have a plan for it (`Engine.standby`)."""
UNKNOWN_PYTHON: Final = "its command doesn't say which Python runs vLLM; `standby: false` if that is all right"
_SOMEWHERE: Final = Place(Address("127.0.0.1", 1))

_log = structlog.get_logger(__name__)


class Places(Protocol):
    """What is asked where containers are made."""

    async def allocate(self, spec: Model) -> Place:
        """See `modelswap.runtimes.base.Runtime.allocate`."""
        ...


async def plans(
    models: Mapping[str, Model],
    engines: Mapping[str, Engine],
    places: Places,
    weights: Weights,
    told: set[str] | None = None,
) -> list[StandbyPlan]:
    """Return one plan for each interpreter and environment that models are started in.

    The hints of models that share a plan are put together, as far as we see what they are loaded from. With a single
    model there is nothing to swap, so nothing to wait for. Models for which there is no way are logged, and put into
    ``told``, unless they are there.
    """
    told = set() if told is None else told
    found: dict[str, StandbyPlan] = {}
    if not take_turns(models):
        return []
    for name, model in models.items():
        try:
            wanted = await plan(name, model, engines[name], places, weights)
        except ModelswapError:
            continue  # its start will say why
        if wanted is None:
            if model.engine in CAN_STAND_BY and wants_one(model) and name not in told:
                told.add(name)
                _log.warning("no standby; starts are cold", model=name, reason=UNKNOWN_PYTHON)
            continue
        known = found.get(wanted.key)
        hints = dict.fromkeys((*(known.hints if known else ()), *wanted.hints))
        found[wanted.key] = msgspec.structs.replace(known or wanted, hints=tuple(hints))
    return list(found.values())


def take_turns(models: Mapping[str, Model]) -> bool:
    """Return whether there is anything to swap."""
    return sum(model.device == "gpu" for model in models.values()) > 1


def wants_one(model: Model) -> bool:
    """Return whether a model is to have a standby; somebody else's container has a command that is fixed."""
    return model.standby and model.runtime != "adopted"


async def plan(
    name: str, model: Model, engine: Engine, places: Places, weights: Weights | None = None
) -> StandbyPlan | None:
    """Return how a standby for a model waits; None if it shall or can have none.

    Without ``weights`` it lacks hints, which aren't part of its key.

    Raises `ModelswapError` where it can't be started at all, or not yet (its image isn't here).
    """
    if not wants_one(model):
        return None
    place = _SOMEWHERE if model.runtime == "process" else await places.allocate(model)
    launch = await asyncio.to_thread(engine.launch, name, model, place.address, place.program)
    folder = await weights.folder(name, model) if weights is not None else None
    return await asyncio.to_thread(engine.standby, model, launch, folder)


def affordable(
    wanted: Sequence[StandbyPlan], states: Sequence[StandbyState], spare: int, *, quiet: bool
) -> list[StandbyPlan]:
    """Return which of ``wanted`` to keep waiting, given the ``spare`` bytes of host memory beyond what they take now.

    While it isn't ``quiet`` nothing new is made. When memory is short the last are let go first.
    """
    there = {state.key: state for state in states if not state.problem}
    left = spare + sum(taken(state) for state in there.values())
    kept = []
    for plan in wanted:
        state = there.get(plan.key)
        if state is None and not quiet:
            continue
        needed = USUAL_BYTES if state is None else taken(state)
        if needed <= left:
            kept.append(plan)
            left -= needed
    return kept


class Asked(Protocol):
    """What this needs of an orchestrator (`modelswap.orchestrator.service.Service`)."""

    configured: Configured
    outside: Outside
    shell: Shell
    weights: Weights


async def keep_standing_by(service: Asked) -> None:
    """Have standbys made while the device is quiet, and let go while host memory is short, until cancelled."""
    loop = asyncio.get_running_loop()
    runtime = service.outside.runtime
    configured: Configured | None = None
    wanted: list[StandbyPlan] = []
    told: set[str] = set()
    busy_at = planned_at = loop.time()
    short = False
    while True:
        await asyncio.sleep(LOOK_EVERY)
        now = loop.time()
        if moving(service.shell.snapshot()):
            busy_at = now
        quiet = now - busy_at >= QUIET_FOR
        # Weights may have come meanwhile, which tell what a standby had better import.
        stale = now - planned_at > PLAN_EVERY or (quiet and planned_at < busy_at)
        if service.configured is not configured or stale:
            told = told if service.configured is configured else set()
            configured, planned_at = service.configured, now
            wanted = await plans(configured.config.models, configured.engines, runtime, service.weights, told)
        there = runtime.standbys()
        if not wanted and not there:
            continue
        kept = affordable(wanted, there, sleepers.spare(service.outside), quiet=quiet)
        ended = {state.key for state in there if not state.problem} - {plan.key for plan in kept}
        if ended and not short:
            _log.warning("standby let go: too little host memory, or no model uses it any more", keys=sorted(ended))
        short = bool(ended)
        await runtime.stand_by(kept)


def moving(shown: Snapshot) -> bool:
    """Return whether a model goes out or comes in.

    One that drains doesn't, however many wait for the next: what is made meanwhile is there for them.
    """
    return any(swap.phase is not Phase.DRAIN for swap in shown.swaps)


def host_bytes(outside: Outside) -> int:
    """Return the host memory that all standbys take, or are about to."""
    return sum(taken(state) for state in outside.runtime.standbys() if not state.problem)


def taken(state: StandbyState) -> int:
    """Return the host memory that one takes; while it is being made, what it is expected to."""
    return state.host_bytes if state.ready else max(state.host_bytes, USUAL_BYTES)
