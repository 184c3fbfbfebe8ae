"""What ``modelswap pull`` shows: bars on a terminal, lines elsewhere, and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Final, Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from modelswap.cli.words import NONE, duration, size

_TELL_EVERY: Final = 5.0


class State(StrEnum):
    """What became of an item; the words are the user's."""

    WORKING = "interrupted"
    """So it is called if it never comes to an end."""
    HERE = "already here"
    CAME = "downloaded"
    NOTHING = "nothing to download"
    ELSEWHERE = "left to its engine"
    """Its cache is none that we see."""
    FAILED = "failed"


_STYLES: Final = {State.HERE: "dim", State.CAME: "green", State.NOTHING: "dim", State.ELSEWHERE: "dim"}


@dataclass(slots=True)
class Item:
    """One thing to have here: a model's ``kind`` (image, weights), called ``name``.

    ``total`` is its bytes, ``came`` those that were downloaded; None where that can't be told.
    """

    model: str
    kind: str
    name: str
    state: State = State.WORKING
    total: int | None = None
    came: int | None = None
    seconds: float = 0.0
    problem: str = ""
    began: float = field(default_factory=time.monotonic)

    @property
    def title(self) -> str:
        """What it is called in a line."""
        return f"{self.model}: {self.kind} {self.name}" if self.kind else self.model

    def end(self, state: State, *, total: int | None = None, came: int | None = None, problem: str = "") -> None:
        """Note how it ended."""
        self.state, self.total, self.came, self.problem = state, total, came, problem
        self.seconds = time.monotonic() - self.began


class Screen:
    """Shows how far items are, on ``console``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
        )
        self._bars = Progress(*columns, console=console) if console.is_terminal else None
        self._tasks: dict[int, TaskID] = {}
        self._told_at = 0.0

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, item: Item) -> None:
        """Show an item that is looked for now."""
        if self._bars is not None:
            self._tasks[id(item)] = self._bars.add_task(f"{item.model} {item.kind}", total=None, detail="")
        self._told_at = time.monotonic()

    def update(self, item: Item, fraction: float | None, detail: str = "") -> None:
        """Show how far it is (0..1), and ``detail``."""
        if self._bars is not None:
            task = self._tasks[id(item)]
            total = None if fraction is None else 1.0
            self._bars.update(task, total=total, completed=fraction or 0.0, detail=detail)
        elif fraction is not None and time.monotonic() - self._told_at >= _TELL_EVERY:
            self._told_at = time.monotonic()
            self._say(f"{item.title}: {fraction:.0%}{f' ({detail})' if detail else ''}")

    def end(self, item: Item) -> None:
        """Show how it ended."""
        if self._bars is not None:
            task = self._tasks[id(item)]
            done = item.state in (State.HERE, State.CAME)
            if done:
                self._bars.update(task, total=1.0, completed=1.0)
            self._bars.update(task, detail=str(item.state))
            self._bars.stop_task(task)
        else:
            self._say(f"{item.title}: {_ended(item)}")

    def _say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


def _ended(item: Item) -> str:
    if item.state is not State.CAME:
        return str(item.state)
    what = "" if item.came is None else f" {size(item.came)}"
    return f"{item.state}{what} in {duration(item.seconds)}"


def summary(items: Sequence[Item]) -> Table:
    """Return what was here already, what came, and how long that took."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "what", "name", "", "size", "downloaded", "time"):
        table.add_column(name, overflow="fold", justify="right" if name in ("size", "downloaded", "time") else "left")
    for item in items:
        table.add_row(
            Text(item.model, "bold"),
            item.kind or NONE,
            Text(item.name or NONE),
            Text(item.state, _STYLES.get(item.state, "bold red")),
            size(item.total),
            size(item.came) if item.came else NONE,
            duration(item.seconds) if item.state not in (State.NOTHING, State.ELSEWHERE) else NONE,
        )
    return table
