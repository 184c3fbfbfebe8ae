"""``modelswap swap``, ``unload``, ``calibrate``, ``pin``: ask the orchestrator, and show what it does meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from modelswap.cli import views, words
from modelswap.cli.client import AdminClient
from modelswap.cli.failure import Failure
from modelswap.cli.look import print_json
from modelswap.cli.words import duration

_LOOK_EVERY: Final = 0.25
_TELL_EVERY: Final = 5.0


def swap(url: str, model: str) -> None:
    """Make ``model`` resident and say how that went; raises `Failure`."""
    answer = asyncio.run(_ask(url, "/ensure_model", {"model": model}, f"waiting for {model}"))
    Console(highlight=False).print(_swapped(answer, model))


def unload(url: str, model: str | None) -> None:
    """Stop ``model``, or every one, and say so; raises `Failure`."""
    body = {"model": model} if model else {}
    answer = asyncio.run(_ask(url, "/unload", body, f"unloading {model or 'every model'}"))
    Console(highlight=False).print(Text(_unloaded(answer, model)))


def calibrate(url: str, model: str | None, *, as_json: bool) -> None:
    """Measure how ``model``, or every one, comes in and out, and print the measurements; raises `Failure`."""
    body = {"model": model} if model else {}
    answer = asyncio.run(_ask(url, "/calibrate", body, f"calibrating {model or 'every model'}"))
    if as_json:
        print_json(answer)
        return
    Console(highlight=False).print(views.measurements(answer.get("measurements", [])))


def pin(url: str, model: str | None, *, pinned: bool) -> None:
    """Pin ``model`` (every resident one), or release it (every one), and say so; raises `Failure`."""
    body = {"pinned": pinned} | ({"model": model} if model else {})
    answer = asyncio.run(_ask(url, "/pin", body, "asking"))
    what = answer.get("model") or ("what is resident" if pinned else "every model")
    said = "is pinned: it is not left for other models" if pinned else "is not pinned any more"
    Console(highlight=False).print(Text(f"{what} {said}"))


def _swapped(answer: dict[str, Any], model: str) -> Text:
    name = str(answer.get("model") or model)
    previous, seconds = answer.get("previous_model"), float(answer.get("seconds") or 0.0)
    mechanism = str(answer.get("mechanism") or "")
    if previous == name or mechanism in ("", "none", "resident"):
        how = "already resident"
    else:
        how = f"{mechanism}, {duration(seconds)}" + (f" (was {previous})" if previous else "")
    address = f" at {answer['address']}" if answer.get("address") else ""
    return Text.assemble((name, "bold green"), f" is ready: {how}{address}")


def _unloaded(answer: dict[str, Any], model: str | None) -> str:
    what = answer.get("model") or model
    if answer.get("mechanism") == "absent":
        return f"{what} was not loaded" if what else "nothing was loaded"
    return f"{what or 'everything'} is unloaded ({duration(float(answer.get('seconds') or 0.0))})"


async def _ask(url: str, path: str, body: dict[str, Any], doing: str) -> dict[str, Any]:
    """Post the question, show the progress until it is answered, and return the answer."""
    console = Console(stderr=True, highlight=False)
    async with AdminClient(url) as admin:
        asking = asyncio.create_task(admin.post(path, body, timeout=None))
        if console.is_terminal:
            with console.status(doing, spinner_style="yellow") as spinner:
                await _while(asking, _watch(admin, doing, lambda line: spinner.update(Text(line, "yellow")), 0.0))
        else:
            await _while(asking, _watch(admin, doing, lambda line: console.print(f"… {line}"), _TELL_EVERY))
        answer = asking.result()
        return dict(answer) if isinstance(answer, dict) else {}


async def _while(asking: asyncio.Task[Any], watching: Coroutine[Any, Any, None]) -> None:
    """Run ``watching`` until ``asking`` ends; raises what that raised."""
    watch = asyncio.create_task(watching)
    try:
        await asking
    finally:
        asking.cancel()
        watch.cancel()
        await asyncio.gather(asking, watch, return_exceptions=True)


async def _watch(admin: AdminClient, doing: str, tell: Callable[[str], None], every: float) -> None:
    """Tell what the orchestrator does, at most once in ``every`` seconds."""
    told = began = time.monotonic()
    while True:
        await asyncio.sleep(_LOOK_EVERY)
        if time.monotonic() - told < every:
            continue
        with contextlib.suppress(Failure):  # the question itself will fail, too, if it must
            found = await admin.status()
            steps = [words.step(found["calibrating"])] if found.get("calibrating") else []
            under_way = " · ".join([*steps, *(words.phase(swap) for swap in found.get("swaps", []))])
            told = time.monotonic()
            tell(f"{doing}: {under_way or 'queued'} ({duration(told - began)})")
