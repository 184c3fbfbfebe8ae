"""Does what a model's ``hooks`` say, around its loads and unloads."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from typing import IO, Final, Literal

import aiohttp
import structlog

from modelswap.orchestrator.hosting import Hosted, Outside
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.spec.config import Hook

Moment = Literal["before_load", "after_load", "before_unload", "after_unload"]
_MOST_SAID: Final = 500
_CANT_FAIL: Final = ("before_unload", "after_unload")

_log = structlog.get_logger(__name__)


class HookFailed(ModelswapError):
    """A hook with ``on_failure: fail`` has failed, and the load with it."""

    code = Code.MODEL_START_FAILED


async def run_hooks(outside: Outside, hosted: Hosted, moment: Moment) -> None:
    """Do what is to be done at this ``moment``, in turn; raises `HookFailed`.

    A failure is only logged where the config says so, and always when something is put out: others wait for that.
    """
    hooks: list[Hook] = getattr(hosted.spec.hooks, moment)
    for number, hook in enumerate(hooks):
        began = outside.clock()
        try:
            async with asyncio.timeout(hook.timeout):
                problem = await _call(outside, hosted, hook) if hook.url else await _run(hosted, hook, moment)
        except TimeoutError:
            problem = f"it took longer than its timeout ({hook.timeout:g} s)"
        except (aiohttp.ClientError, OSError) as error:
            problem = str(error) or type(error).__name__
        seconds = round(outside.clock() - began, 3)
        if not problem:
            _log.info("hook", model=hosted.model, hook=moment, number=number, seconds=seconds)
            continue
        _log.warning("hook failed", model=hosted.model, hook=moment, number=number, seconds=seconds, reason=problem)
        if hook.on_failure == "fail" and moment not in _CANT_FAIL:
            raise HookFailed(f"its hook {moment}[{number}] failed: {problem}")


async def _call(outside: Outside, hosted: Hosted, hook: Hook) -> str:
    """Send the request; returns what is wrong, empty if nothing."""
    assert hook.url is not None  # noqa: S101 - for the type checker: the caller looked
    url, headers = hook.url, {}
    if url.startswith("/"):
        if hosted.address is None:
            return "the engine doesn't run"
        url = hosted.address.url + url
        if hosted.spec.api_key is not None:
            headers["authorization"] = f"Bearer {hosted.spec.api_key.get_secret_value()}"
    async with outside.http.request(hook.method, url, json=hook.body, headers=headers) as answer:
        return "" if answer.ok and answer.status < 300 else f"it was answered with status {answer.status}"


async def _run(hosted: Hosted, hook: Hook, moment: Moment) -> str:
    """Run the command; returns what is wrong, empty if nothing."""
    assert hook.command is not None  # noqa: S101 - for the type checker: one of both is given
    running = hosted.address is not None and moment in ("after_load", "before_unload")
    told = {
        "MODELSWAP_MODEL": hosted.model,
        "MODELSWAP_HOOK": moment,
        "MODELSWAP_URL": hosted.address.url if running and hosted.address is not None else "",
    }
    # A file, not a pipe: what it leaves running in the background may hold that open for ever.
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *hook.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | told,
            cwd=hosted.spec.cwd,
            start_new_session=True,
        )
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            raise
        return "" if code == 0 else f"{hook.command[0]} exited with status {code}{_last_words(errors)}"


def _last_words(errors: IO[bytes]) -> str:
    """Return the last line that a command wrote to its standard error, as an addition to a sentence."""
    errors.seek(max(errors.seek(0, os.SEEK_END) - _MOST_SAID, 0))
    lines = errors.read(_MOST_SAID).decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last}" if last else ""
