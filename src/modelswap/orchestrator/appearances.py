"""Sees to engines that somebody else starts (``docker start``, compose): on a free device they stay, else they end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from modelswap.core import events
from modelswap.orchestrator.facts import Configured
from modelswap.orchestrator.hosting import Hosted, Outside
from modelswap.orchestrator.stopping import STUCK_PAUSE
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import Running

TURN_AWAY_GRACE: Final = 3.0
"""How long an engine that isn't welcome may take to end by itself, in seconds: it has served nobody of ours."""
WATCH_AGAIN: Final = 1.0

_log = structlog.get_logger(__name__)


async def watch_appearances(outside: Outside, configured: Callable[[], Configured]) -> None:
    """Tell the scheduler of every engine that somebody else starts, until cancelled."""
    told = ""
    while True:
        try:
            running = await outside.runtime.appeared()
        except Exception as error:  # noqa: BLE001 - whatever fails there, later starts must be noticed
            if repr(error) != told:
                told = repr(error)
                _log.error("starts by others can't be watched", error=told)
            await asyncio.sleep(WATCH_AGAIN)
        else:
            told = ""
            notice(outside, configured(), running)


async def look_around(outside: Outside, configured: Configured) -> None:
    """Tell the scheduler of what others started before we knew its model."""
    try:
        living = await outside.runtime.instances()
    except ModelswapError as error:
        _log.warning("can't see what runs", reason=str(error))
        return
    for running in living:
        if outside.runtime.foreign(running):
            notice(outside, configured, running)


def notice(outside: Outside, configured: Configured, running: Running) -> None:
    """Tell the scheduler of one, unless it knows already; `BringIn` or `TurnAway` will say what becomes of it."""
    spec = configured.config.models.get(running.model)
    if spec is None or running.instance in outside.hosted or running.instance in outside.turning_away:
        return
    engine = configured.engines[running.model]
    slots = spec.concurrency or engine.slots(spec)
    _log.info(
        "started by somebody else", model=running.model, instance=running.instance, container=running.container[:12]
    )
    outside.hosted[running.instance] = Hosted(
        instance=running.instance,
        model=running.model,
        definition=running.definition,
        spec=spec,
        engine=engine,
        address=running.address,
        running=running,
        slots=slots,
    )
    outside.post(
        events.Appeared(
            at=outside.clock(),
            instance=running.instance,
            model=running.model,
            definition=running.definition,
            host=running.address.host,
            port=running.address.port,
            slots=slots,
        )
    )


async def turn_away(outside: Outside, running: Running) -> None:
    """Stop what somebody else has started; returns when it has ended, however long that takes."""
    grace, told = TURN_AWAY_GRACE, False
    while True:
        try:
            ended = await outside.runtime.stop(running, grace)
        except Exception as stuck:  # noqa: BLE001 - Unkillable, or the runtime fails: it runs until it is seen to end
            if not told:
                told = True
                _log.error("can't be stopped", model=running.model, instance=running.instance, reason=str(stuck))
            grace = 0.0
            await asyncio.sleep(STUCK_PAUSE)
        else:
            _log.info("stopped", model=running.model, instance=running.instance, exit=str(ended))
            return
