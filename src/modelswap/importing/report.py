"""An import as a file: the config with its comments, checked to say what it is meant to say."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping

from modelswap.importing.render import render
from modelswap.importing.result import Imported, Kind
from modelswap.spec import load
from modelswap.spec.config import Config

_HEADINGS = {
    Kind.ACTION: "To do:",
    Kind.CHANGED: "Works differently now:",
    Kind.LOST: "Not carried over:",
}
_WIDTH = 110


def text(imported: Imported, command: str) -> str:
    """Return the config file's text; ``command`` is what wrote it."""
    header = [
        f"Written by `{command}`.",
        "Every key is explained in `python -m modelswap.spec.example`; what was left behind is listed at the end.",
    ]
    return render(imported.config, imported.comments, header, _footer(imported))


def verify(written: str, imported: Imported, env: Mapping[str, str], source: str) -> Config:
    """Return the config that ``written`` says; raises `spec.errors.ConfigError` if it is none.

    Variables that it needs and ``env`` lacks stand for themselves: whoever starts modelswap sets them.
    """
    missing = {name: name.lower() for name in imported.variables if not env.get(name)}
    return load.loads(written, ChainMap(missing, dict(env)), source)


def by_kind(imported: Imported) -> dict[Kind, list[tuple[str, list[str]]]]:
    """Return the notes, the most urgent kind first, each text with all the keys that it is about."""
    result: dict[Kind, list[tuple[str, list[str]]]] = {}
    for kind in (Kind.ACTION, Kind.CHANGED, Kind.LOST):
        texts: dict[str, list[str]] = {}
        for note in imported.notes:
            if note.kind is kind:
                keys = texts.setdefault(note.text, [])
                if note.key and note.key not in keys:
                    keys.append(note.key)
        if texts:
            result[kind] = list(texts.items())
    return result


def _footer(imported: Imported) -> list[str]:
    lines: list[str] = []
    for kind, notes in by_kind(imported).items():
        lines += ([""] if lines else []) + [_HEADINGS[kind]]
        for said, keys in notes:
            lines += _wrapped(f"{', '.join(keys)}: {said}" if keys else said)
    return lines


def _wrapped(said: str) -> list[str]:
    lines, line = [], "  -"
    for word in said.split():
        if len(line) + len(word) > _WIDTH:
            lines.append(line)
            line = "   "
        line += f" {word}"
    return [*lines, line]
