"""How vLLM sleeps and wakes, through its development endpoints.

Read in the sources of vLLM 0.32 (`vllm/entrypoints/serve/dev/sleep`, `v1/engine/core.py`, `v1/executor/abstract.py`,
`v1/worker/gpu_worker.py`), and tried with its CPU build:

- The endpoints are there with ``VLLM_SERVER_DEV_MODE=1``. Without ``--enable-sleep-mode`` (CPU builds refuse it) they
  do all but give memory back: newer versions even say that they sleep, because nothing is scheduled.
- ``/sleep`` without ``mode=wait`` aborts what runs. Older versions know no ``mode`` and ignore it.
- Waking a part (``tags``) that is awake already does nothing, so a wake that failed can be begun anew. Requests are
  scheduled again once all parts are awake.
- Level 2 keeps buffers and drops parameters, which ``reload_weights`` reads from disk again.
- An error while waking is an exception in another process; the answer may be a bare "Internal Server Error".
"""

from __future__ import annotations

import os
import re
from typing import Final

import aiohttp

from modelswap.engines import http as ask
from modelswap.engines import options
from modelswap.engines.base import Address, CannotSleep, CannotWake, WakeOutOfMemory
from modelswap.spec.config import Model

FLAG: Final = "--enable-sleep-mode"
DEV_MODE: Final = "VLLM_SERVER_DEV_MODE"
_REMEDY: Final = f"it needs {FLAG} and {DEV_MODE}=1 (sleep: on)"
# With these, dropped weights are known to come back wrong, or not at all.
_NO_RELOAD: Final = (
    *("--enable-lora", "--lora-modules", "--quantization", "-q"),
    *("--speculative-config", "--speculative-model", "-sc", "--spec-method", "--spec-model"),
)
_BARE: Final = re.compile(r"\(nothing\)|Internal Server Error", re.IGNORECASE)


def enabled(model: Model) -> bool:
    """Return whether it is started so that it can sleep.

    Somebody else's container isn't unless the config says so; what it was started with is not known here
    (`modelswap.orchestrator.abilities`).
    """
    if model.device == "none":
        return False
    if model.sleep != "auto":
        return model.sleep == "on"
    if model.runtime == "adopted":
        return False
    on, off = (_last(model, flag) for flag in (FLAG, "--no-enable-sleep-mode"))
    return on > off and _develops(model)


def levels(model: Model) -> tuple[int, ...]:
    """Return the levels that the model's arguments allow.

    Pooling models keep most of their memory asleep, and have no answer to compare. Level 2 isn't for LoRA adapters,
    draft models and quantisation given in ``args``.
    """
    if not enabled(model) or pools(model):
        return ()
    return (1,) if model.adapters or options.given(model.args, *_NO_RELOAD) else (1, 2)


def pools(model: Model) -> bool:
    """Return whether ``args`` (or its canary) make it a pooling model."""
    task = options.value(model.args, "--task")
    pooling = options.value(model.args, "--runner") == "pooling" or task in ("embed", "embedding")
    return pooling or task in ("classify", "score", "reward") or model.canary == "embedding"


async def sleep(http: aiohttp.ClientSession, model: Model, address: Address, level: int, busy: int | None) -> None:
    """Have it sleep at ``level``, unless it is ``busy``; raises `CannotSleep`."""
    if busy:
        raise CannotSleep(f"{busy} requests still run or wait in it")
    reply = await ask.post(http, model, address, f"/sleep?level={level}&mode=wait", None, ask.PATIENT)
    if reply.status == 404:
        raise CannotSleep(f"it has no /sleep; {_REMEDY}")
    if reply.status != 200:
        raise CannotSleep(f"/sleep was answered with {reply.status}: {ask.complaint(reply)}")
    if not await asleep(http, model, address):
        raise CannotSleep(f"/sleep was answered with 200, but it doesn't sleep; {_REMEDY}")


async def wake(http: aiohttp.ClientSession, model: Model, address: Address, level: int) -> None:
    """Wake it from ``level``; raises `CannotWake`, `WakeOutOfMemory`."""
    if level == 2:
        await _told(http, model, address, "/wake_up?tags=weights")
        await _told(http, model, address, "/collective_rpc", {"method": "reload_weights"})
        await _told(http, model, address, "/wake_up?tags=kv_cache")
        # What it holds was computed with other weights, as far as it knows.
        await _told(http, model, address, "/reset_prefix_cache")
    else:
        await _told(http, model, address, "/wake_up")
    if await asleep(http, model, address):
        raise CannotWake("/wake_up was answered with 200, but it still sleeps")


async def asleep(http: aiohttp.ClientSession, model: Model, address: Address) -> bool | None:
    """Return what ``/is_sleeping`` says; None if it says nothing."""
    reply = await ask.get(http, model, address, "/is_sleeping")
    answer = reply.json()
    said = answer.get("is_sleeping") if reply.status == 200 and isinstance(answer, dict) else None
    return said if isinstance(said, bool) else None


async def _told(
    http: aiohttp.ClientSession, model: Model, address: Address, path: str, body: dict[str, str] | None = None
) -> None:
    reply = await ask.post(http, model, address, path, body, ask.PATIENT)
    if reply.status == 200:
        return
    complaint = ask.complaint(reply)
    said = f"{path} was answered with {reply.status}: {complaint}"
    untold = path.startswith("/wake_up") and _BARE.fullmatch(complaint) is not None
    if ask.out_of_memory(reply) or (untold and reply.status >= 500):
        raise WakeOutOfMemory(said)
    raise CannotWake(said)


def _develops(model: Model) -> bool:
    inherited = os.environ.get(DEV_MODE, "") if model.runtime == "process" else ""
    return model.env.get(DEV_MODE, inherited).strip() not in ("", "0")


def _last(model: Model, flag: str) -> int:
    return max((index for index, word in enumerate(model.args) if options.given([word], flag)), default=-1)
