"""Shows answers as they stream in: one at a time, in the order in which they begin."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from rich.console import Console
from rich.status import Status
from rich.text import Text

from modelswap.cli.chat import Reply
from modelswap.cli.client import AdminClient
from modelswap.cli.failure import Failure
from modelswap.cli.words import duration, phase

_LOOK_EVERY: Final = 0.3
_TELL_EVERY: Final = 3.0

Ask = Callable[[Callable[[str], None]], Awaitable[Reply]]


class Screen:
    """Prints answers to ``console``; while none comes, what the orchestrator at ``admin`` is doing."""

    def __init__(self, console: Console, admin: AdminClient) -> None:
        self._console = console
        self._admin = admin
        self._writing = asyncio.Lock()
        self._spinner: Status | None = None

    async def show(self, asks: Sequence[Ask], turn: Sequence[tuple[str, str]]) -> list[Reply]:
        """Ask all at once, print every answer, and return the replies in the same order."""
        together = " (at the same time)" if len(turn) > 1 else ""
        for model, prompt in turn:
            self._console.print(Text.assemble(("▶ ", "cyan"), (model, "bold"), f"{together}: {prompt}"))
        waiting = asyncio.create_task(self._tell_what_happens())
        try:
            return list(await asyncio.gather(*(self._one(ask, *said) for ask, said in zip(asks, turn, strict=True))))
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            self._rest()

    async def _one(self, ask: Ask, model: str, prompt: str) -> Reply:
        texts: asyncio.Queue[str | None] = asyncio.Queue()
        printing = asyncio.create_task(self._print(model, texts))
        try:
            reply = await ask(texts.put_nowait)
        finally:
            texts.put_nowait(None)
            await printing
        if reply.error:
            self._console.print(Text.assemble((f"  {model} failed: ", "bold red"), reply.error), soft_wrap=True)
        return reply

    async def _print(self, model: str, texts: asyncio.Queue[str | None]) -> None:
        text = await texts.get()
        if text is None:
            return
        async with self._writing:
            self._rest()
            self._console.print(Text(f"  {model} ", "bold green"), end="")
            while text is not None:
                self._console.print(Text(text.replace("\n", "\n  "), "green"), end="", soft_wrap=True)
                text = await texts.get()
            self._console.print("\n")

    def _rest(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    async def _tell_what_happens(self) -> None:
        told = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            if self._writing.locked():
                continue
            with contextlib.suppress(Failure):
                line = doing(await self._admin.status())
                if not line or self._writing.locked():
                    continue
                if self._console.is_terminal:
                    self._spin(line)
                elif time.monotonic() - told >= _TELL_EVERY:
                    self._console.print(f"  … {line}")
                    told = time.monotonic()

    def _spin(self, line: str) -> None:
        if self._spinner is None:
            self._spinner = self._console.status(line, spinner_style="yellow")
            self._spinner.start()
        self._spinner.update(Text(line, "yellow"))


def doing(status: dict[str, Any]) -> str:
    """Return in words the swap under way, empty if there is none."""
    for swap in status.get("swaps", []):
        what = f"swapping to {swap['target']}" if swap.get("target") else "unloading"
        return f"{what}: {phase(swap)} ({duration(float(swap.get('seconds', 0)))})"
    return ""
