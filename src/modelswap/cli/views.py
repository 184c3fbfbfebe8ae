"""The orchestrator's answers as rich tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from modelswap.cli import words
from modelswap.cli.words import NONE, duration

Json = Mapping[str, Any]

_PHASES: Final = ("drain", "out", "release", "in", "canary")
_SHOWN_SWAPS: Final = 8


def status(found: Json, url: str) -> Iterator[RenderableType]:
    """Yield the parts of the status screen, from top to bottom."""
    yield _headline(found, url)
    for problem in found.get("problems", []):
        yield Text.assemble(("problem: ", "bold red"), str(problem))
    for warning in found.get("warnings", []):
        yield Text.assemble(("warning: ", "yellow"), str(warning))
    for swap in found.get("swaps", []):
        yield _under_way(swap)
    yield _models(found.get("models", []))
    yield from _problems(found.get("models", []))
    if swaps := found.get("last_swaps", []):
        yield _swaps(swaps[:_SHOWN_SWAPS], float(found.get("time", time.time())))
    if devices := found.get("devices", []):
        yield _devices(devices)


def models(found: Any) -> Iterator[RenderableType]:
    """Yield the list of models, and what was measured of their ways in and out."""
    listed = found.get("models", []) if isinstance(found, dict) else []
    yield _listed(listed)
    rows = [row for model in listed for row in model.get("measurements") or []]
    if rows:
        yield measurements(rows, "measured")


def _listed(found: Sequence[Json]) -> Table:
    table = _table()
    for name in ("model", "engine", "state", "device", "is put out by", "priority", "also called"):
        table.add_column(name, overflow="fold", justify="right" if name == "priority" else "left")
    for model in found:
        others = ", ".join([*model.get("aliases", []), *model.get("adapters", [])])
        table.add_row(
            _name(model),
            str(model.get("engine", NONE)),
            words.state(str(model.get("state", NONE))),
            str(model.get("device") or "none"),
            _way(model),
            str(model.get("priority", 0)),
            Text(others or NONE),
        )
    return table


def measurements(found: Sequence[Json], title: str | None = None) -> Table:
    """Return what was measured of models' ways in and out."""
    table = _table(title)
    for name in ("model", "way", "verdict"):
        table.add_column(name, overflow="fold")
    for name in ("first", "usually", "leaves on the device", "host memory"):
        table.add_column(name, justify="right")
    for row in found:
        ok, reason = row.get("ok"), str(row.get("reason") or "")
        answer = f"answers {row['reference']!r}" if row.get("reference") else NONE
        verdict = Text("off: " if ok is False else "", "red") + Text(reason or ("good" if ok else answer))
        table.add_row(
            Text(str(row.get("model")), "bold"),
            str(row.get("mechanism")),
            verdict,
            duration(row.get("first_seconds")),
            duration(row.get("steady_seconds")),
            words.size(int(row["residue_bytes"])) if row.get("residue_bytes") is not None else NONE,
            words.size(int(row["host_bytes"])) if row.get("host_bytes") is not None else NONE,
        )
    return table


def _way(model: Json) -> Text:
    way = Text(words.way(int(model.get("sleep_level") or 0)))
    if model.get("pinned"):
        way.append(" (pinned)", "yellow")
    for told in words.off(model.get("measurements") or []):
        way.append(f"\n{told}", "red")
    return way


def _headline(found: Json, url: str) -> Text:
    current = found.get("current_model")
    what = (str(current), "bold green") if current else ("none", "dim")
    workers = len(found.get("gateways", []))
    uptime = words.ago(float(found.get("uptime_seconds", 0)))
    about = f"orchestrator {url}, up for {uptime}, {workers} gateway worker{'s' * (workers != 1)}"
    return Text.assemble("current model: ", what, "\n", (about, "dim"))


def _under_way(swap: Json) -> Text:
    what = f"{swap.get('source') or 'nothing'} → {swap.get('target') or 'nothing'}"
    done = ", ".join(f"{name} {duration(float(took))}" for name, took in dict(swap.get("phases", {})).items())
    return Text.assemble(
        ("swap under way: ", "bold yellow"),
        f"{what}, {words.phase(dict(swap))}, {duration(float(swap.get('seconds', 0)))} so far",
        (f" ({done})" if done else "", "dim"),
    )


def _models(found: Sequence[Json]) -> Table:
    table = _table()
    table.add_column("model", overflow="fold")
    table.add_column("state")
    for name in ("running", "waiting", "oldest wait", "comes in"):
        table.add_column(name, justify="right")
    for model in found:
        waiting = int(model.get("waiting", 0))
        state = words.state(str(model.get("state", NONE)))
        if model.get("resident") and model.get("state") == "ready":
            state.append(", open")
        backoff = float(model.get("backoff_seconds", 0))
        if backoff > 0:
            state.append(f", again in {duration(backoff)}", "red")
        table.add_row(
            _name(model),
            state,
            str(model.get("in_flight", 0)),
            Text(str(waiting), "yellow" if waiting else ""),
            duration(float(model["oldest_wait"])) if waiting and "oldest_wait" in model else NONE,
            duration(model.get("swap_seconds")),
        )
    return table


def _problems(found: Sequence[Json]) -> Iterator[Text]:
    for model in found:
        if model.get("problem"):
            name, problem = str(model.get("name")), str(model["problem"])
            rest = problem.removeprefix(f"{name} ")  # what most problems begin with
            yield Text.assemble((name, "bold red"), " " if rest != problem else ": ", rest)


def _swaps(found: Sequence[Json], now: float) -> Table:
    table = _table("last swaps")
    table.add_column("ago", justify="right", style="dim")
    table.add_column("swap", overflow="fold")
    table.add_column("how")
    for name in ("total", *_PHASES):
        table.add_column(name, justify="right")
    for swap in found:
        phases = dict(swap.get("phases", {}))
        outcome = str(swap.get("outcome", "ok"))
        how = str(swap.get("mechanism", NONE)) if outcome == "ok" else outcome
        if outcome == "ok" and swap.get("out") == "sleep" and swap.get("target"):
            how = f"sleep, {how}"
        table.add_row(
            words.ago(max(0.0, now - float(swap["at"]))) if "at" in swap else NONE,
            Text(f"{swap.get('source') or 'nothing'} → {swap.get('target') or 'nothing'}"),
            Text(how, {"failed": "red", "cancelled": "dim"}.get(outcome, "")),
            duration(swap.get("seconds")),
            *(duration(phases.get(phase)) for phase in _PHASES),
        )
    return table


def _devices(found: Sequence[Json]) -> Table:
    table = _table("devices")
    for name in ("device", "what", "resident", "memory"):
        table.add_column(name, overflow="fold")
    for device in found:
        row = [str(device.get("name")), str(device.get("title") or device.get("kind") or NONE)]
        table.add_row(*row, str(device.get("resident") or NONE), _memory(device))
    return table


def _memory(device: Json) -> Text:
    if device.get("problem"):
        return Text(str(device["problem"]), "bold red")
    memory = device.get("memory")
    if not isinstance(memory, dict):
        return Text("can't be read here", "dim")
    total, free = int(memory["total"]), int(memory["free"])
    return Text(f"{words.size(total - free)} of {words.size(total)} used")


def _name(model: Json) -> Text:
    return Text(str(model.get("name")), "bold green" if model.get("resident") else "bold")


def _table(title: str | None = None) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
