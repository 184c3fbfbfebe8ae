"""Proves that an instance answers, and that one which has slept answers as it did before."""

from __future__ import annotations

import asyncio
from typing import Final

import aiohttp
import msgspec
import structlog

from modelswap.engines.base import Address, CanaryFailed
from modelswap.orchestrator.abilities import sleep_levels
from modelswap.orchestrator.hosting import Hosted, Outside
from modelswap.orchestrator.measurements import TOKENS, agrees

CANARY_LIMIT: Final = 120.0
"""How long the canary may take, in seconds: a first request may compile."""
VERSION_LIMIT: Final = 5.0
_VERSION_PATHS: Final = ("/version", "/server_info", "/get_server_info")

_log = structlog.get_logger(__name__)


class WrongAnswer(CanaryFailed):
    """An instance that has slept doesn't answer as the cold ones did."""


class _Said(msgspec.Struct):
    version: str = ""


async def prove_cold(outside: Outside, hosted: Hosted, address: Address) -> None:
    """Pass the canary; for an engine that can sleep, note its version and what a greedy answer of it is.

    Raises `CanaryFailed`, `aiohttp.ClientError` or `TimeoutError`.
    """
    began = outside.clock()
    async with asyncio.timeout(CANARY_LIMIT):
        await hosted.engine.canary(outside.http, hosted.model, hosted.spec, address)
        if sleep_levels(outside, hosted.definition, hosted.spec, hosted.engine):
            await _note_answer(outside, hosted, address)
    hosted.canary_seconds = outside.clock() - began


async def prove_awake(outside: Outside, hosted: Hosted, address: Address) -> None:
    """Compare the greedy answer with the cold ones'; raises `WrongAnswer` or as `prove_cold` does."""
    began = outside.clock()
    reference = outside.measurements.reference(hosted.model, hosted.definition)
    if not reference:
        raise CanaryFailed("nothing is known any more that its answer could be compared with")
    async with asyncio.timeout(CANARY_LIMIT):
        answer = await hosted.engine.greedy(outside.http, hosted.model, hosted.spec, address, len(reference))
    hosted.canary_seconds = outside.clock() - began
    if not agrees(answer, reference):
        raise WrongAnswer(f"it answered {''.join(answer or ())[:80]!r} instead of {''.join(reference)[:80]!r}")


async def _note_answer(outside: Outside, hosted: Hosted, address: Address) -> None:
    """Keep the version and the answer of a cold start; a failure here only means that it isn't put to sleep."""
    known = outside.measurements
    known.versioned(hosted.model, hosted.definition, await _build(outside, hosted, address))
    if not known.wants_answer(hosted.model, hosted.definition):
        return
    try:
        answer = await hosted.engine.greedy(outside.http, hosted.model, hosted.spec, address, TOKENS)
    except (CanaryFailed, aiohttp.ClientError) as error:
        _log.warning("no greedy answer; it will not be put to sleep", model=hosted.model, reason=str(error))
    else:
        known.answered(hosted.model, hosted.definition, answer)


async def _build(outside: Outside, hosted: Hosted, address: Address) -> str:
    """Return what is started besides what the config says: the engine's version, and somebody else's container.

    That one's image and arguments aren't in the config, and can't change but with its id.
    """
    version = await _version(outside, address)
    if hosted.spec.runtime != "adopted" or hosted.running is None:
        return version
    return f"{version or 'unknown'}, container {hosted.running.container[:12]}"


async def _version(outside: Outside, address: Address) -> str:
    """Return what the engine calls its version; empty if it doesn't tell."""
    for path in _VERSION_PATHS:
        try:
            async with asyncio.timeout(VERSION_LIMIT), outside.http.get(address.url + path) as answer:
                if answer.status == 200 and (said := msgspec.json.decode(await answer.read(), type=_Said)).version:
                    return said.version
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError):
            continue
    return ""
