"""Findings for people and for programs."""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.text import Text

from modelswap.cli.doctor.finding import Finding, Level
from modelswap.cli.doctor.run import Report

_SYMBOLS: Final = {
    Level.OK: ("✓", "+", "green"),
    Level.NOTE: ("·", "-", "cyan"),
    Level.WARNING: ("!", "!", "yellow"),
    Level.PROBLEM: ("✗", "x", "bold red"),
}
_WORDS: Final = {
    Level.PROBLEM: ("problem", "problems"),
    Level.WARNING: ("warning", "warnings"),
    Level.NOTE: ("note", "notes"),
    Level.OK: ("fine", "fine"),
}


def show(report: Report, console: Console) -> None:
    """Print the report, group by group, each finding with its remedy below it."""
    plain = not (console.encoding or "").lower().startswith("utf")
    for group, findings in report.groups.items():
        console.print(Text(group, "bold"))
        for finding in findings:
            for line in _lines(finding, plain=plain):
                console.print(line, soft_wrap=True)
        console.print()
    console.print(_sum(report), soft_wrap=True)


def _lines(finding: Finding, *, plain: bool) -> list[Text]:
    symbol, ascii_symbol, style = _SYMBOLS[finding.level]
    message, *more = finding.message.splitlines() or [""]
    lines = [Text.assemble("  ", (ascii_symbol if plain else symbol, style), " ", message)]
    lines += [Text(f"    {line}") for line in more]
    if finding.remedy:
        arrow, (first, *more) = "->" if plain else "→", finding.remedy.splitlines()
        lines.append(Text.assemble("    ", (arrow, "dim"), " ", first))
        lines += [Text(f"    {' ' * len(arrow)} {line}") for line in more]
    return lines


def _sum(report: Report) -> Text:
    parts = []
    for level, (one, several) in _WORDS.items():
        count = report.count(level)
        if count or level is Level.OK:
            style = _SYMBOLS[level][2] if level in (Level.PROBLEM, Level.WARNING) else ""
            parts.append(Text(f"{count} {one if count == 1 else several}", style))
    return Text(", ").join(parts)


def as_json(report: Report) -> str:
    """Return the report as JSON: ``ok`` is false if there is a problem."""
    told: list[dict[str, Any]] = [
        {"group": group, **msgspec.to_builtins(finding)}
        for group, findings in report.groups.items()
        for finding in findings
    ]
    counts = {str(level): report.count(level) for level in Level}
    whole = {"ok": not counts[Level.PROBLEM], "counts": counts, "findings": told}
    return json.dumps(whole, indent=2, ensure_ascii=False)
