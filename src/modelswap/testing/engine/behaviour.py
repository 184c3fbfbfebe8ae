"""What a simulated engine does wrong, slowly or otherwise than usual: for one request, or until told otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec


class Behaviour(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Comes as ``--fault KEY[=VALUE]``, in ``POST /sim/fault`` (replacing what was said there), in a body's ``sim``.

    The later ones go before the earlier. Everything is None (or False) if it was not asked for. Seconds and bytes.
    """

    # ── answers ──
    tokens: int | None = None
    """Pieces in an answer, before ``max_tokens``."""
    tokens_per_second: float | None = None
    """Pieces per second; 0 = as fast as they are read."""
    first_token_seconds: float | None = None
    """Silence before the first byte of an answer."""
    status: int | None = None
    """Answer with this status and an error instead."""
    message: str | None = None
    """…and this message."""
    wrong: bool = False
    """Answer gibberish, with status 200."""
    event_bytes: int | None = None
    """Make the first piece this long."""

    # ── the connection ──
    framing: Literal["length", "chunked", "close"] | None = None
    """How a body is delimited. Default: unary ``length``, streams ``chunked``; ``close``: by closing."""
    connection_close: bool = False
    """Say ``Connection: close``, and do it."""
    idle_timeout: float | None = None
    """Close an idle connection after this long, unannounced; 0 = right after the answer."""
    slow_headers: float | None = None
    """Trickle the response's head over so many seconds."""

    # ── failures ──
    hang: Literal["first_byte", "stream", "health", "sleep", "wake"] | None = None
    """Fall silent before the first byte, after ``after`` events, on ``/health``, or in the middle of sleep or wake."""
    drop: Literal["reused", "first_byte", "stream"] | None = None
    """Close the connection without an answer if it was used before; before the first byte; after ``after`` events."""
    crash: Literal["first_byte", "stream", "load", "sleep", "wake"] | None = None
    """End the process there."""
    by: Literal["exit", "kill"] = "exit"
    """How to crash: ``os._exit(1)``, or SIGKILL."""
    after: int = 1
    """Events of a stream before ``hang``, ``drop`` or ``crash`` at ``stream``; of a unary body: half its bytes."""
    health_status: int | None = None
    """What ``/health`` answers."""
    load: Literal["hang", "oom", "fail"] | None = None
    """Never become ready; die of out-of-memory; die of a permanent mistake in the model."""

    # ── sleep ──
    sleep: Literal["fail", "ignore"] | None = None
    """Answer an order to sleep with an error, or with success, and stay awake."""
    wake: Literal["fail", "oom"] | None = None
    """Answer an order to wake with an error, or with out-of-memory however much is free, and sleep on."""
    early_sleep: float | None = None
    """Say that it sleeps this long before it gives its memory back."""
    no_rollback: bool = False
    """A wake that runs out of memory keeps all that there was."""
    garbled: int | None = None
    """Answer gibberish after waking from this level, whether its weights were reloaded or not."""
    nth: int | None = None
    """Do what these say (and ``hang``, ``crash`` at sleep or wake) in the n-th sleep and n-th wake only, from 1."""

    # ── the process ──
    ignore_sigterm: bool = False
    """Go on after SIGTERM."""
    stop_seconds: float | None = None
    """Take so long to end after SIGTERM."""
    late_release: float | None = None
    """Device memory comes back this long after it was released or its process died."""
    child: Literal["child", "orphan", "session"] | None = None
    """A child process holds the memory (as vLLM's EngineCore does): ended with a clean stop, and surviving a SIGKILL
    of its parent; ``orphan``: surviving a clean stop as well; ``session``: that, in a session of its own."""

    times: int | None = None
    """Forget all this after so many inference requests."""


USUAL = Behaviour()

_FLAGS = {
    "child": "child",
    "connection_close": "true",
    "wrong": "true",
    "ignore_sigterm": "true",
    "no_rollback": "true",
}


def overlay(base: Behaviour, over: Behaviour) -> Behaviour:
    """Return ``base`` with what ``over`` asks for put on top."""
    asked = {field: value for field, value in msgspec.structs.asdict(over).items() if value != getattr(USUAL, field)}
    return msgspec.structs.replace(base, **asked) if asked else base


def parse_faults(faults: Sequence[str]) -> Behaviour:
    """Read ``KEY=VALUE`` texts (a flag may go without its value); raises `msgspec.ValidationError`."""
    said: dict[str, Any] = {}
    for fault in faults:
        key, equals, value = fault.partition("=")
        key = key.replace("-", "_")
        said[key] = value if equals else _FLAGS.get(key, "")
    return msgspec.convert(said, Behaviour, strict=False)
