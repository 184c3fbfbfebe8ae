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


class Wrapped:
    """Wraps text between words while it comes in piece by piece, and hands it to ``write``.

    ``width`` is the terminal's; lines after the first begin with ``indent`` spaces, the first one at ``column``.
    """

    def __init__(self, write: Callable[[str], None], width: int, *, indent: int, column: int) -> None:
        self._write = write
        self._width = width
        self._indent = indent
        self._column = column
        self._gap = ""
        self._word = ""

    def feed(self, text: str) -> None:
        """Take in more text; a word is written when its end has come."""
        for character in text:
            if character == "\n":
                self.end()
                self._break()
            elif character.isspace():
                self.end()
                self._gap += " "
            else:
                self._word += character

    def end(self) -> None:
        """Write the word that has begun."""
        if not self._word:
            return
        if self._column + len(self._gap) + len(self._word) > self._width and self._column > self._indent:
            self._break()
        self._write(self._gap + self._word)
        self._column += len(self._gap) + len(self._word)
        self._gap = self._word = ""

    def _break(self) -> None:
        self._write("\n" + " " * self._indent)
        self._column = self._indent
        self._gap = ""


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
            self._console.print(Text.assemble(("▶ ", "cyan"), (model, "bold"), f"{together}: {prompt}"), soft_wrap=True)
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
            wrapped = Wrapped(self._write, self._console.width, indent=2, column=len(model) + 3)
            while text is not None:
                wrapped.feed(text)
                text = await texts.get()
            wrapped.end()
            self._console.print("\n")

    def _write(self, text: str) -> None:
        self._console.print(Text(text, "green"), end="", soft_wrap=True)

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
