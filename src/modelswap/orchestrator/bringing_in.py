"""Carries out `effects.BringIn`: start, wait until ready, canary.

A swap's time is mostly spent here, so nothing waits longer than it must: the address is probed with bare connections
until something listens, then the engine is asked for its readiness at intervals that grow with the time it takes.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

import aiohttp
from pydantic import ByteSize

from modelswap.core import events
from modelswap.engines.base import Address, CanaryFailed, Diagnosis, Engine, Launch, Readiness
from modelswap.orchestrator import sleepers, trust
from modelswap.orchestrator.abilities import learn, sleep_levels
from modelswap.orchestrator.endings import exit_code, failed_start
from modelswap.orchestrator.hooks import run_hooks
from modelswap.orchestrator.hosting import Hosted, Outside, pause, told
from modelswap.orchestrator.proving import prove_cold
from modelswap.orchestrator.stopping import stop_grace, stop_surely
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.base import Exit, NotPrepared, Running, StartFailed, StartOrder
from modelswap.spec.config import Model

POLL_LIMIT: Final = 5.0
"""How long an engine may take to say whether it is ready, in seconds."""
LAST_WORDS: Final = 0.5
"""How long after a broken connection the engine's end may be seen, in seconds."""
TURNING_AWAY_LIMIT: Final = 60.0
"""How long a start waits for the end of what others have started, in seconds."""
FAILED_GRACE: Final = 1.0
"""How long a start that failed may take to end by itself, in seconds: it has nothing to finish."""


class _Ended(Exception):
    """The engine's process ended before it was ready."""

    def __init__(self, exit_: Exit) -> None:
        super().__init__(str(exit_))
        self.exit = exit_


class _NeverReady(Exception):
    """The engine says that it never will be ready as started."""


async def bring_in(outside: Outside, hosted: Hosted, *, adopted: bool) -> None:
    """Start an instance (or, ``adopted``, only wait for it) and report `BroughtIn` or `BringInFailed`.

    When cancelled, what was started goes on: whoever cancels stops it, or leaves it to the next orchestrator.
    """
    try:
        await _bring_in(outside, hosted, adopted=adopted)
    except Exception as bug:  # a mistake in an engine's or our code must not leave the scheduler waiting
        await _fail(outside, hosted, Code.INTERNAL, Diagnosis(f"{hosted.model}: internal error: {bug!r}", False))
        raise


async def _bring_in(outside: Outside, hosted: Hosted, *, adopted: bool) -> None:
    began = outside.clock()
    free: int | None = None
    try:
        limit = asyncio.timeout(hosted.spec.start_timeout)
        try:
            async with limit:
                if not adopted:
                    await run_hooks(outside, hosted, "before_load")
                    free = await _free(outside, hosted)
                    await _start(outside, hosted)
                await learn(outside, hosted)
                slots = await _prove(outside, hosted)
                await run_hooks(outside, hosted, "after_load")
        except TimeoutError:
            if not limit.expired():
                raise
            reason = f"{hosted.model} was not ready within start_timeout ({hosted.spec.start_timeout:g} s)"
            await _fail(outside, hosted, Code.SWAP_TIMEOUT, Diagnosis(reason, permanent=False))
            return
    except _Ended as ended:
        await _fail(outside, hosted, None, await _diagnose(outside, hosted, ended.exit))
    except _NeverReady as never:
        await _fail(outside, hosted, None, Diagnosis(f"{hosted.model} can't serve: {never}", permanent=True))
    except (CanaryFailed, aiohttp.ClientError, TimeoutError) as failed:
        reason = f"{hosted.model} said it was ready, but failed its canary request: {str(failed) or 'no answer'}"
        await _fail(outside, hosted, None, Diagnosis(reason, permanent=False))
    except NotPrepared as missing:
        reason = f"{hosted.model} has to be made ready again: {missing}"
        await _fail(outside, hosted, missing.code, Diagnosis(reason, permanent=False), unprepared=True)
    except ModelswapError as error:
        permanent = error.code is Code.MODEL_BROKEN
        await _fail(outside, hosted, error.code, Diagnosis(f"{hosted.model} can't be started: {error}", permanent))
    else:
        hosted.slots = slots
        hosted.ready = True
        outside.journal.opened(hosted.instance, slots)
        mechanism = hosted.running.mechanism if hosted.running is not None else "cold"
        if not adopted:
            trust.start_succeeded(outside, hosted, mechanism)
            await _measured(outside, hosted, mechanism, outside.clock() - began, free)
        address = _address(hosted)
        outside.post(
            events.BroughtIn(
                at=outside.clock(),
                instance=hosted.instance,
                host=address.host,
                port=address.port,
                slots=slots,
                mechanism=mechanism,
            )
        )


async def _free(outside: Outside, hosted: Hosted) -> int | None:
    """Return what is free on the device but for sleepers, if it is of interest; None if that can't be read."""
    if not sleep_levels(outside, hosted.definition, hosted.spec, hosted.engine):
        return None
    try:
        reading = await outside.device.read()
    except ModelswapError:  # it matters when it is put to sleep, and may be readable then
        return None
    return None if reading is None else reading.free + sleepers.residues(outside)


async def _measured(outside: Outside, hosted: Hosted, mechanism: str, seconds: float, free: int | None) -> None:
    """Keep what a start took, in seconds and in bytes of its device."""
    outside.measurements.took(hosted.model, hosted.definition, mechanism, seconds)
    if free is None:
        return
    after = await _free(outside, hosted)
    if after is not None:
        hosted.held = max(free - after, 0)
        sleepers.used(outside, hosted)


async def _start(outside: Outside, hosted: Hosted) -> None:
    await _check_size(outside, hosted)
    order = await order_for(outside, hosted.engine, hosted.instance, hosted.model, hosted.spec, hosted.definition)
    hosted.address = order.address
    await outside.journal.intend(hosted.instance, hosted.model, hosted.definition, order.address)
    await _alone(outside)
    starting = asyncio.ensure_future(outside.runtime.start(order))
    try:
        running = await asyncio.shield(starting)
    except asyncio.CancelledError:
        # Half a start can't be stopped: see it through, so that whoever cancelled knows what to stop.
        await asyncio.wait([starting])
        if starting.exception() is None:
            _started(outside, hosted, starting.result())
        raise
    _started(outside, hosted, running)


async def _alone(outside: Outside) -> None:
    """Wait until nothing that others have started is being stopped: it may hold the device, or the very container."""
    try:
        async with asyncio.timeout(TURNING_AWAY_LIMIT):
            while outside.turning_away:
                await asyncio.wait(outside.turning_away.values())
    except TimeoutError:
        names = ", ".join(sorted(outside.turning_away))
        raise StartFailed(
            f"{names}, which somebody else started, has not ended within {TURNING_AWAY_LIMIT:g} s; stop it"
        ) from None


async def order_for(
    outside: Outside, engine: Engine, instance: str, model: str, spec: Model, definition: str
) -> StartOrder:
    """Return what the runtime needs to start an instance, or to make ready for its start."""
    place = await outside.runtime.allocate(spec)
    if spec.runtime == "adopted":  # somebody else has said how it is started
        launch, standby = Launch((), {}), None
    else:
        launch = engine.launch(model, spec, place.address, place.program)
        wanted = spec.standby and model not in outside.without_standby
        trusted = wanted and trust.trusts_standby(outside, model, definition)
        standby = engine.standby(spec, launch) if trusted else None
    return StartOrder(
        instance=instance,
        model=model,
        definition=definition,
        spec=spec,
        launch=launch,
        address=place.address,
        standby=standby,
    )


async def _check_size(outside: Outside, hosted: Hosted) -> None:
    wanted = hosted.spec.memory
    if wanted is None or hosted.spec.device == "none":
        return
    reading = await outside.device.read()
    if reading is not None and wanted > reading.total:
        raise ModelswapError(
            f"it wants {wanted.human_readable()} of device memory, and {outside.device.name} has only "
            f"{ByteSize(reading.total).human_readable()}; lower its 'memory'",
            code=Code.MODEL_BROKEN,
        )


def _started(outside: Outside, hosted: Hosted, running: Running) -> None:
    hosted.running = running
    hosted.address = running.address
    outside.journal.started(running)


async def _prove(outside: Outside, hosted: Hosted) -> int:
    """Wait for readiness and canary, or for the process's end; returns the slots."""
    running = hosted.running
    assert running is not None  # noqa: S101 - for the type checker: it has been started or adopted
    ended = asyncio.ensure_future(outside.ended(running))
    proof = asyncio.ensure_future(_ready_and_tested(outside, hosted, running))
    try:
        await asyncio.wait({ended, proof}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done() and proof.exception() is not None:
            # A connection that broke may be the first sign of an end, which says more.
            await asyncio.wait({ended}, timeout=LAST_WORDS)
        if ended.done():
            raise _Ended(ended.result())
        readiness = proof.result()
    finally:
        for task in (ended, proof):
            task.cancel()
        await asyncio.gather(ended, proof, return_exceptions=True)
    return hosted.spec.concurrency or readiness.slots or hosted.engine.slots(hosted.spec)


async def _ready_and_tested(outside: Outside, hosted: Hosted, running: Running) -> Readiness:
    readiness = await _ready(outside, hosted, running)
    _stage(outside, hosted, "canary", None)
    await prove_cold(outside, hosted, running.address)
    return readiness


async def _ready(outside: Outside, hosted: Hosted, running: Running) -> Readiness:
    began = outside.clock()
    accepts = ours = False
    shown: tuple[str, int | None] = ("", None)
    while True:
        accepts = accepts or await _accepts(running.address)
        if accepts:
            # Asked while it still loads, this costs no time; once it is so, it stays so.
            ours = ours or await outside.listening(running)
            said = await _ask(outside, hosted, running)
            if said.problem is not None:
                raise _NeverReady(said.problem)
            if said.ready and ours:
                return said
            percent = None if said.fraction is None else int(said.fraction * 100)
            if (said.stage, percent) != shown:
                shown = (said.stage, percent)
                _stage(outside, hosted, said.stage, said.fraction)
        await asyncio.sleep(pause(outside.clock() - began))


async def _ask(outside: Outside, hosted: Hosted, running: Running) -> Readiness:
    try:
        async with asyncio.timeout(POLL_LIMIT):
            return await hosted.engine.readiness(outside.http, hosted.model, hosted.spec, running.address)
    except (aiohttp.ClientError, TimeoutError):
        return Readiness(ready=False)


async def _accepts(address: Address) -> bool:
    """Return whether something listens; far cheaper than an HTTP request, because most of these fail."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            async with asyncio.timeout(1.0):
                await asyncio.get_running_loop().sock_connect(probe, (address.host, address.port))
        except (OSError, TimeoutError):
            return False
    return True


def _stage(outside: Outside, hosted: Hosted, stage: str, fraction: float | None) -> None:
    outside.post(
        events.BringInStage(at=outside.clock(), instance=hosted.instance, stage=stage, fraction=fraction),
    )


async def _diagnose(outside: Outside, hosted: Hosted, exit_: Exit) -> Diagnosis:
    found = hosted.engine.diagnose(exit_code(hosted, exit_), await outside.last_lines(hosted, 200))
    return failed_start(hosted, exit_, found)


async def _fail(
    outside: Outside,
    hosted: Hosted,
    code: Code | None,
    diagnosis: Diagnosis,
    *,
    unprepared: bool = False,
) -> None:
    """Stop what is left of the instance, then report why it failed."""
    if hosted.running is not None:
        await stop_surely(outside, hosted, hosted.running, min(stop_grace(hosted), FAILED_GRACE))
    message = told(diagnosis.reason, await outside.last_lines(hosted) if hosted.running is not None else [])
    unproven = trust.start_failed(outside, hosted, diagnosis.reason, permanent=diagnosis.permanent)
    outside.hosted.pop(hosted.instance, None)
    if code is None:
        code = Code.MODEL_BROKEN if diagnosis.permanent else Code.MODEL_START_FAILED
    outside.post(
        events.BringInFailed(
            at=outside.clock(),
            instance=hosted.instance,
            code=code,
            message=message,
            permanent=diagnosis.permanent,
            blameless=diagnosis.blameless or unproven,
            unprepared=unprepared,
        )
    )


def _address(hosted: Hosted) -> Address:
    assert hosted.address is not None  # noqa: S101 - for the type checker: it runs
    return hosted.address
