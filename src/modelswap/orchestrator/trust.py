"""Whether a model's next start may spend a standby.

One that became the server and failed may have failed for that, or the model can't be started at all. So the next start,
for the same waiters, is cold. If that succeeds the standby was to blame; after `measurements.FAILURES` times in a row
the model is started cold until it is calibrated anew, or defined otherwise.
"""

from __future__ import annotations

import structlog

from modelswap.orchestrator.hosting import Hosted, Outside
from modelswap.orchestrator.measurements import STANDBY

_log = structlog.get_logger(__name__)


def trusts_standby(outside: Outside, model: str, definition: str) -> bool:
    """Return whether a start of this model may spend a standby."""
    return (model, definition) not in outside.suspects and outside.measurements.of(
        model, definition, STANDBY
    ).ok is not False


def start_failed(outside: Outside, hosted: Hosted, reason: str, *, permanent: bool) -> bool:
    """Take in that a start failed; returns whether that says nothing about the model yet.

    A known cause that is ``permanent`` (no such weights, say) is believed at once.
    """
    key = (hosted.model, hosted.definition)
    if hosted.running is None:
        return False
    if hosted.running.mechanism != STANDBY:
        outside.suspects.pop(key, None)
        return False
    if permanent:
        return False
    outside.suspects[key] = reason
    _log.warning("cold start instead", model=hosted.model, reason=f"the standby became the server, but {reason}")
    return True


def start_succeeded(outside: Outside, hosted: Hosted, mechanism: str) -> None:
    """Take in that a start succeeded: a cold one shows that the standby before it was to blame."""
    reason = outside.suspects.pop((hosted.model, hosted.definition), None)
    if reason is None or mechanism == STANDBY:
        return
    if not outside.measurements.spoilt(hosted.model, hosted.definition, STANDBY, reason):
        _log.warning("no standby for this model any more; its starts are cold", model=hosted.model, reason=reason)
