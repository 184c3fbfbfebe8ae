"""Carries out `effects.Prepare`: image, weights and container, ahead of time and without a device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import structlog

from modelswap.core import events
from modelswap.engines.base import Engine
from modelswap.orchestrator.bringing_in import order_for
from modelswap.orchestrator.hosting import Outside, Preparing
from modelswap.orchestrator.tasks import cancel
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.base import Report
from modelswap.spec.config import Model

TOLD_EVERY: Final = 0.25
"""How often progress is told at most, in seconds."""

_log = structlog.get_logger(__name__)


class Weights(Protocol):
    """Has the weights of models in the shared cache."""

    def wanted(self, spec: Model) -> bool:
        """Return whether a model's weights are for us to download ahead of its start."""
        ...

    async def fetch(self, name: str, spec: Model, report: Report) -> None:
        """Download what is missing of a model's weights; raises `ModelswapError`. Cancelling it is safe."""
        ...

    async def size(self, name: str, spec: Model) -> int | None:
        """Return the bytes of a model's weights; None if they aren't all here, or are none of ours."""
        ...

    async def folder(self, name: str, spec: Model) -> Path | None:
        """Return the folder that a model is loaded from, as we see it; None if it isn't here, or can't be seen."""
        ...

    async def files(self, name: str, spec: Model) -> list[Path]:
        """Return the files that a start of a model loads and that we see, in the order in which they are read."""
        ...


class NoWeights:
    """`Weights` where engines see to their own."""

    def wanted(self, spec: Model) -> bool:
        """See `Weights`."""
        return False

    async def fetch(self, name: str, spec: Model, report: Report) -> None:
        """See `Weights`."""

    async def size(self, name: str, spec: Model) -> int | None:
        """See `Weights`."""
        return None

    async def folder(self, name: str, spec: Model) -> Path | None:
        """See `Weights`."""
        return None

    async def files(self, name: str, spec: Model) -> list[Path]:
        """See `Weights`."""
        return []


def needed(spec: Model, weights: Weights) -> bool:
    """Return whether there is anything to do for a model before its start."""
    return spec.runtime != "process" or weights.wanted(spec)


async def prepare(
    outside: Outside,
    preparing: Preparing,
    spec: Model,
    engine: Engine,
    weights: Weights,
    *,
    before: asyncio.Task[None] | None = None,
    ended: Callable[[bool, float], None] = lambda *_: None,
) -> None:
    """Make a model ready; reports `PrepareStage`, then `Prepared` or `PrepareFailed`.

    ``before`` is the preparing of an earlier definition, which is given up first. ``ended`` is told whether it went
    well, and the seconds it took.
    """
    model, definition = preparing.model, preparing.definition
    progress = _Progress(outside, preparing)
    try:
        await cancel(before)
        await _prepare(outside, preparing, spec, engine, weights, progress)
    except ModelswapError as error:
        _log.warning("not prepared", model=model, reason=str(error))
        _fail(outside, preparing, error.code, f"{model} can't be made ready: {error}", ended)
    except Exception as bug:  # a mistake of ours must not leave the scheduler waiting
        _fail(outside, preparing, Code.INTERNAL, f"{model} can't be made ready: internal error: {bug!r}", ended)
        raise
    else:
        seconds = outside.clock() - preparing.began
        _log.info("prepared", model=model, seconds=round(seconds, 3))
        ended(True, seconds)
        outside.post(events.Prepared(at=outside.clock(), model=model, definition=definition))
    finally:
        progress.end()
        if outside.preparing.get(model) is preparing:
            del outside.preparing[model]


async def _prepare(
    outside: Outside, preparing: Preparing, spec: Model, engine: Engine, weights: Weights, progress: Report
) -> None:
    model = preparing.model
    await outside.runtime.fetch(model, spec, progress)
    if weights.wanted(spec):
        await weights.fetch(model, spec, progress)
    if spec.runtime != "process":
        progress("container", None)
        await outside.runtime.create(
            await order_for(outside, engine, f"{model}.prepared", model, spec, preparing.definition)
        )


def _fail(
    outside: Outside, preparing: Preparing, code: Code, message: str, ended: Callable[[bool, float], None]
) -> None:
    ended(False, outside.clock() - preparing.began)
    outside.post(
        events.PrepareFailed(
            at=outside.clock(),
            model=preparing.model,
            definition=preparing.definition,
            code=code,
            message=message,
            permanent=code is Code.MODEL_BROKEN,
        )
    )


class _Progress:
    """Keeps `Preparing` up to date, and tells the scheduler now and then; the last news is told in any case."""

    def __init__(self, outside: Outside, preparing: Preparing) -> None:
        self._outside = outside
        self._preparing = preparing
        self._loop = asyncio.get_running_loop()
        self._told_at = self._loop.time() - TOLD_EVERY
        self._later: asyncio.TimerHandle | None = None

    def __call__(self, stage: str, fraction: float | None) -> None:
        """See `Report`."""
        preparing = self._preparing
        if (stage, fraction) == (preparing.stage, preparing.fraction):
            return
        if stage != preparing.stage:
            _log.info("preparing", model=preparing.model, stage=stage)
        preparing.stage, preparing.fraction = stage, fraction
        if self._later is None:
            self._later = self._loop.call_at(self._told_at + TOLD_EVERY, self._tell)

    def end(self) -> None:
        """Tell nothing more."""
        if self._later is not None:
            self._later.cancel()

    def _tell(self) -> None:
        self._later = None
        self._told_at = self._loop.time()
        preparing = self._preparing
        self._outside.post(
            events.PrepareStage(
                at=self._outside.clock(),
                model=preparing.model,
                definition=preparing.definition,
                stage=preparing.stage,
                fraction=preparing.fraction,
            )
        )
