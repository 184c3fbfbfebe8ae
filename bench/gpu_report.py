"""What `bench.gpu` found, as a Markdown section, and that section's place in a file. No I/O."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

GIB: Final = 1 << 30
PHASES: Final = ("drain", "out", "release", "in", "canary")
COLD: Final = "cold"
FIRST: Final = "first"
LATER: Final = "later"
OTHER: Final = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was measured on. ``gpu_bytes`` and ``host_bytes`` are all there is, ``date`` is ISO's."""

    name: str
    driver: str
    torch: str
    date: str
    cores: int
    gpu_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """How long freed memory took to appear as free: seconds after ``event``, which ended a hold of ``size`` bytes."""

    event: str
    size: int
    seconds: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """One swap: ``seconds`` from the request to its first token, the answer, and the orchestrator's own record."""

    seconds: float
    answer: str
    model: str
    record: Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Found:
    """Everything so far. ``bandwidth`` in bytes a second (``pinned_in`` …), ``swaps`` by sleep level (0: none).

    ``asleep``: device and host bytes that a sleeper takes, by level. ``missing``: the parts that could not be measured.
    """

    machine: Machine
    weights: int
    share: float
    bandwidth: Mapping[str, float] = field(default_factory=dict)
    releases: list[Release] = field(default_factory=list)
    swaps: dict[int, list[Swap]] = field(default_factory=dict)
    asleep: dict[int, tuple[int, int]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def kinds(swaps: Iterable[Swap]) -> list[str]:
    """Return what each swap was, oldest first: `COLD`, a `FIRST` or a `LATER` sleep and wake, or `OTHER`.

    ``first``: the model put out slept, or the one brought in woke, for the first time since its cold start.
    """
    slept: dict[str, int] = {}
    woken: dict[str, int] = {}
    found = []
    for swap in swaps:
        record = swap.record
        source, target = record["source"], record["target"]
        if record["mechanism"] == "cold":
            slept[target] = woken[target] = 0
        if record["out"] == "sleep":
            slept[source] = slept.get(source, 0) + 1
        if record["mechanism"] == "wake":
            woken[target] = woken.get(target, 0) + 1
        match record["out"], record["mechanism"]:
            case "stop", "cold":
                found.append(COLD)
            case "sleep", "wake":
                found.append(FIRST if slept[source] == 1 or woken[target] == 1 else LATER)
            case _:
                found.append(OTHER)
    return found


def same_answers(found: Found) -> bool:
    """Return whether each model answered the same whenever it was asked, and the models each something else."""
    answers: dict[str, set[str]] = {}
    for swap in (swap for swaps in found.swaps.values() for swap in swaps):
        answers.setdefault(swap.model, set()).add(swap.answer)
    every = [answer for said in answers.values() for answer in said]
    return len(every) == len(set(every)) == len(answers) and all(every)


def bound(found: Found, level: int) -> float | None:
    """Return the seconds that a swap's bytes take at the measured pinned bandwidth: in, and at level 1 out before."""
    if not found.bandwidth:
        return None
    seconds = found.weights / found.bandwidth["pinned_in"]
    return seconds + (found.weights / found.bandwidth["pinned_out"] if level == 1 else 0.0)


def render(found: Found) -> str:
    """Return the section, which begins with its heading."""
    machine = found.machine
    title = f"{machine.name}, driver {machine.driver}, torch {machine.torch}, {machine.date}"
    parts = [
        f"## Swaps on a GPU ({title})",
        _setting(found),
    ]
    if found.bandwidth:
        parts.append(_bandwidth(found.bandwidth))
    if found.releases:
        parts.append(_releases(found.releases))
    if found.swaps:
        parts.append(_swaps(found))
        same = "were the same throughout" if same_answers(found) else "**DIFFER**"
        said = [f"Greedy answers, which depend on every byte of the weights, {same}."]
        said += [
            f"Asleep at level {level}, an engine keeps {device / GIB:.2f} GiB of the device "
            f"and takes {host / GIB:.2f} GiB of host memory."
            for level, (device, host) in sorted(found.asleep.items())
        ]
        parts.append("\n".join(said))
    if found.missing:
        parts.append(f"Not measured in this run: {', '.join(found.missing)}.")
    return "\n\n".join(parts) + "\n"


def _setting(found: Found) -> str:
    machine = found.machine
    return (
        f"`make bench-gpu`: {machine.gpu_bytes / GIB:.3g} GiB of device memory, {machine.cores} cores, "
        f"{machine.host_bytes / GIB:.0f} GiB of host memory. Two models of {found.weights / GIB:.2f} GiB\n"
        "of random bf16 weights each, in engines built on PyTorch that sleep as vLLM does (`bench/gpu_engine.py`)\n"
        f"and fill {found.share:.0%} of the device while awake; their files are in the page cache. Phases are medians."
    )


def _bandwidth(found: Mapping[str, float]) -> str:
    rows = ["| host memory, GB/s | to the device | from the device |", "|---|---|---|"]
    rows += [
        f"| {kind} | {found[f'{kind}_in'] / 1e9:.1f} | {found[f'{kind}_out'] / 1e9:.1f} |"
        for kind in ("pinned", "pageable")
    ]
    return "\n".join(rows)


def _releases(found: Sequence[Release]) -> str:
    rows = ["| until the memory is free, after | held | median | max | rounds |", "|---|---|---|---|---|"]
    rows += [
        f"| {each.event} | {each.size / GIB:.2f} GiB | {_ms(statistics.median(each.seconds))} | "
        f"{_ms(max(each.seconds))} | {len(each.seconds)} |"
        for each in found
        if each.seconds
    ]
    return "\n".join(rows)


def _swaps(found: Found) -> str:
    rows = [
        "| swap | request to first token, p50 (min to max) | "
        + " | ".join(PHASES)
        + " | bytes / bandwidth | share | swaps |",
        "|---" * (5 + len(PHASES)) + "|",
    ]
    for level, swaps in sorted(found.swaps.items()):
        named = list(zip(kinds(swaps), swaps, strict=True))
        for kind in (COLD,) if level == 0 else (FIRST, LATER):
            chosen = [swap for each, swap in named if each == kind]
            if chosen:
                rows.append(_row(_title(level, kind), chosen, bound(found, level)))
    return "\n".join(rows)


def _row(title: str, swaps: Sequence[Swap], least: float | None) -> str:
    seconds = [swap.seconds for swap in swaps]
    middle = statistics.median(seconds)
    phases = (statistics.median([swap.record["phases"].get(phase, 0.0) for swap in swaps]) for phase in PHASES)
    cells = [title, f"**{middle:.3f} s** ({min(seconds):.3f} to {max(seconds):.3f})", *map(_ms, phases)]
    cells += ["", ""] if least is None else [_ms(least), f"{least / middle:.0%}"]
    return "| " + " | ".join([*cells, str(len(swaps))]) + " |"


def _title(level: int, kind: str) -> str:
    if kind == COLD:
        return "stop, cold start"
    return f"sleep level {level}, " + ("for the first time" if kind == FIRST else "later")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def put_into(page: str, name: str, section: str) -> str:
    """Return ``page`` with ``section`` between markers that carry the hardware's ``name``.

    An earlier section of the same hardware is replaced; else it comes last.
    """
    begin, end = f"<!-- bench-gpu: {name} -->\n", f"<!-- end of bench-gpu: {name} -->\n"
    marked = begin + section + end
    before, found, rest = page.partition(begin)
    if found:
        _, closed, after = rest.partition(end)
        if not closed:
            raise ValueError(f"{end.strip()} is missing after {begin.strip()}; mend that by hand")
        return before + marked + after
    return (page.rstrip("\n") + "\n\n" if page.strip() else "") + marked
