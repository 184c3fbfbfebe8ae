"""Keeps engine processes waiting for their models, made while nobody waits for anything else."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import msgspec
import structlog

from modelswap.engines.base import Address, Engine, Place, StandbyPlan
from modelswap.orchestrator import sleepers
from modelswap.orchestrator.facts import Configured
from modelswap.orchestrator.hosting import Outside
from modelswap.orchestrator.shell import Shell
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import StandbyState
from modelswap.spec.config import Model

LOOK_EVERY: Final = 1.0
QUIET_FOR: Final = 3.0
"""Seconds without a swap or a waiting request after which a standby may be made."""
USUAL_BYTES: Final = 700 << 20
"""Host memory that a standby is expected to take until it is measured (vLLM 0.32: 0.43 GiB when ready)."""
PLAN_EVERY: Final = 60.0
"""How often it is looked anew what standbys there could be, in seconds: an image may have come."""
_SOMEWHERE: Final = Place(Address("127.0.0.1", 1))

_log = structlog.get_logger(__name__)


class Places(Protocol):
    """What is asked where containers are made."""

    async def allocate(self, spec: Model) -> Place:
        """See `modelswap.runtimes.base.Runtime.allocate`."""
        ...


async def plans(models: Mapping[str, Model], engines: Mapping[str, Engine], places: Places) -> list[StandbyPlan]:
    """Return one plan for each interpreter and environment that models are started in.

    The hints of models that share a plan are put together. With a single model there is nothing to swap, so nothing to
    wait for.
    """
    found: dict[str, StandbyPlan] = {}
    if sum(model.device == "gpu" for model in models.values()) < 2:
        return []
    for name, model in models.items():
        if not model.standby or model.runtime == "adopted":
            continue
        try:
            place = _SOMEWHERE if model.runtime == "process" else await places.allocate(model)
            launch = await asyncio.to_thread(engines[name].launch, name, model, place.address, place.program)
            plan = await asyncio.to_thread(engines[name].standby, model, launch)
        except ModelswapError:
            continue  # its start will say why
        if plan is None:
            continue
        known = found.get(plan.key)
        hints = dict.fromkeys((*(known.hints if known else ()), *plan.hints))
        found[plan.key] = msgspec.structs.replace(known or plan, hints=tuple(hints))
    return list(found.values())


def affordable(
    wanted: Sequence[StandbyPlan], states: Sequence[StandbyState], spare: int, *, quiet: bool
) -> list[StandbyPlan]:
    """Return which of ``wanted`` to keep waiting, given the ``spare`` bytes of host memory beyond what they take now.

    While it isn't ``quiet`` nothing new is made. When memory is short the last are let go first.
    """
    there = {state.key: state for state in states if not state.problem}
    left = spare + sum(_taken(state) for state in there.values())
    kept = []
    for plan in wanted:
        state = there.get(plan.key)
        if state is None and not quiet:
            continue
        needed = USUAL_BYTES if state is None else _taken(state)
        if needed <= left:
            kept.append(plan)
            left -= needed
    return kept


class Asked(Protocol):
    """What this needs of an orchestrator (`modelswap.orchestrator.service.Service`)."""

    configured: Configured
    outside: Outside
    shell: Shell


async def keep_standing_by(service: Asked) -> None:
    """Have standbys made while nobody waits, and let go while host memory is short, until cancelled."""
    loop = asyncio.get_running_loop()
    runtime = service.outside.runtime
    configured: Configured | None = None
    wanted: list[StandbyPlan] = []
    busy_at = planned_at = loop.time()
    short = False
    while True:
        await asyncio.sleep(LOOK_EVERY)
        now = loop.time()
        if busy(service):
            busy_at = now
        if service.configured is not configured or now - planned_at > PLAN_EVERY:
            configured, planned_at = service.configured, now
            wanted = await plans(configured.config.models, configured.engines, runtime)
        there = runtime.standbys()
        if not wanted and not there:
            continue
        kept = affordable(wanted, there, sleepers.spare(service.outside), quiet=now - busy_at >= QUIET_FOR)
        ended = {state.key for state in there if not state.problem} - {plan.key for plan in kept}
        if ended and not short:
            _log.warning("standby let go: too little host memory, or no model uses it any more", keys=sorted(ended))
        short = bool(ended)
        await runtime.stand_by(kept)


def busy(service: Asked) -> bool:
    """Return whether a swap goes on, or anybody waits."""
    shown = service.shell.snapshot()
    return bool(shown.swaps) or any(model.waiting for model in shown.models)


def host_bytes(outside: Outside) -> int:
    """Return the host memory that all standbys take; of one that is being made, what it will."""
    return sum(_taken(state) for state in outside.runtime.standbys() if not state.problem)


def _taken(state: StandbyState) -> int:
    return state.host_bytes if state.ready else max(state.host_bytes, USUAL_BYTES)
