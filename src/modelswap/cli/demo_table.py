"""The table at the end of the demo: what each request cost, and which of it was a swap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from modelswap.cli.chat import Reply
from modelswap.cli.words import NONE, duration


@dataclass(frozen=True, slots=True)
class Row:
    """One request with the swap it waited for, if any; times in seconds."""

    reply: Reply
    mechanism: str
    queue: float
    swap: float | None


def rows(replies: Sequence[Reply], swaps: Sequence[dict[str, Any]]) -> list[Row]:
    """Match each reply with the swap that brought its model in while it waited.

    ``swaps`` are the orchestrator's records (``at``: when the swap ended, Unix seconds). A request that came while its
    model was resident has none; of those that waited for the same swap, each is shown with it.
    """
    found = []
    for reply in replies:
        until = reply.first if reply.first is not None else reply.ended
        brought_in = [
            swap
            for swap in swaps
            if swap.get("target") == reply.model
            and swap.get("outcome") == "ok"
            and until is not None
            and reply.sent <= float(swap["at"]) <= until
        ]
        if brought_in:
            swap = min(brought_in, key=lambda swap: float(swap["at"]))
            seconds = float(swap["seconds"])
            queue = max(0.0, float(swap["at"]) - seconds - reply.sent)
            found.append(Row(reply, str(swap.get("mechanism", "cold")), queue, seconds))
        else:
            found.append(Row(reply, "resident", 0.0, None))
    return found


def table(found: Sequence[Row]) -> Table:
    """Return it for the terminal."""
    result = Table(title="What happened", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("#", justify="right", style="dim")
    result.add_column("model")
    result.add_column("mechanism")
    for name in ("queue wait", "swap", "first token", "tokens/s"):
        result.add_column(name, justify="right")
    for number, row in enumerate(found, 1):
        if row.reply.error:
            result.add_row(str(number), row.reply.model, Text("failed", "red"), "", "", "", "")
            continue
        result.add_row(
            str(number),
            row.reply.model,
            Text(row.mechanism, "green" if row.mechanism == "resident" else "yellow"),
            duration(row.queue) if row.swap is not None else NONE,
            duration(row.swap),
            duration(row.reply.first_token_seconds),
            NONE if row.reply.tokens_per_second is None else f"{row.reply.tokens_per_second:.0f}",
        )
    result.caption = "first token: from sending the request, waiting and swapping included"
    result.caption_justify = "left"
    return result
