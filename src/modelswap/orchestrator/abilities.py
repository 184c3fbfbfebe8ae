"""At which levels a model can sleep: its config tells, or the command of a container that somebody else made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import structlog

from modelswap.engines.base import Engine
from modelswap.orchestrator.hosting import Hosted, Outside
from modelswap.protocol.errors import ModelswapError
from modelswap.spec.config import Model

_log = structlog.get_logger(__name__)


def sleep_levels(outside: Outside, definition: str, spec: Model, engine: Engine) -> tuple[int, ...]:
    """Return the levels at which a model can sleep.

    With ``sleep: auto``, of somebody else's container what its command was when it last ran here (`learn`).
    """
    told = outside.told.get(definition)
    return engine.sleep_levels(spec if told is None or spec.sleep != "auto" else told)


async def learn(outside: Outside, hosted: Hosted) -> None:
    """Take in what somebody else's container was started with; that may have changed since it ran last."""
    spec, running = hosted.spec, hosted.running
    if spec.runtime != "adopted" or running is None:
        return
    try:
        told = await outside.runtime.told(running)
    except ModelswapError as error:  # it is stopped when it is put out, as before anything was known
        _log.info("its command can't be read", model=hosted.model, reason=str(error))
        told = None
    if told is None:
        outside.told.pop(hosted.definition, None)
    else:
        outside.told[hosted.definition] = as_ours(spec, told.command, told.env)


def as_ours(spec: Model, command: Sequence[str], env: Mapping[str, str]) -> Model:
    """Return somebody else's container as a model that we would start with the same command and environment."""
    whose = {"container": None, "compose_service": None, "image": "its own"}
    return spec.model_copy(update={**whose, "args": list(command), "env": dict(env)})
