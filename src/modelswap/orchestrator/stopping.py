"""Stops an instance, however long that takes."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from modelswap.core import events
from modelswap.orchestrator.hosting import Hosted, Outside
from modelswap.runtimes.base import Running

STUCK_PAUSE: Final = 5.0

_log = structlog.get_logger(__name__)


def stop_grace(hosted: Hosted) -> float:
    """Return how long an instance may take to end by itself, in seconds."""
    own = hosted.spec.stop_grace
    return hosted.engine.stop_grace(hosted.spec) if own is None else own


async def stop_surely(outside: Outside, hosted: Hosted, running: Running, grace: float) -> None:
    """Return when nothing of the instance runs; while it can't be killed, report `PutOutFailed` and go on trying."""
    told = False
    while True:
        try:
            ended = await outside.runtime.stop(running, grace)
        except Exception as stuck:  # noqa: BLE001 - Unkillable, or the runtime fails: it runs until it is seen to end
            if not told:
                told = True
                _log.error("can't be stopped", model=hosted.model, instance=hosted.instance, reason=str(stuck))
                outside.post(events.PutOutFailed(at=outside.clock(), instance=hosted.instance, message=str(stuck)))
            grace = 0.0
            await asyncio.sleep(STUCK_PAUSE)
        else:
            _log.info("stopped", model=hosted.model, instance=hosted.instance, exit=str(ended))
            return
