"""The fixtures of these tests, and the converters on texts instead of files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from modelswap.importing.compose.convert import convert
from modelswap.importing.result import Imported, Kind

DATA = Path(__file__).with_name("data")
HOME = "/stack/compose.yaml"


def text(name: str) -> str:
    """Return a fixture."""
    return (DATA / name).read_text(encoding="utf-8")


def plain(name: str) -> Any:
    """Return a fixture's values."""
    return yaml.safe_load(text(name))


def compose(source: str | Mapping[str, str], env: Mapping[str, str] | None = None, *, manage: bool = False) -> Imported:
    """Import a compose file that lies in ``/stack``, or several files there by name, the first the main one."""
    files = {"compose.yaml": source} if isinstance(source, str) else source
    there = {f"/stack/{name}": content for name, content in files.items()}
    return convert([next(iter(there))], there.get, env or {}, manage=manage)


def service(lines: str, *, manage: bool = False) -> tuple[dict[str, Any], Imported]:
    """Import a compose file with one service, ``llm``; return its model (without name), and all."""
    body = "".join(f"    {line}\n" for line in lines.strip("\n").splitlines())
    imported = compose(f"services:\n  llm:\n{body}", manage=manage)
    (model,) = imported.config["models"].values()
    return model, imported


def noted(imported: Imported, kind: Kind, key: str, words: str = "") -> bool:
    """Return whether there is such a note about ``key`` with ``words`` in it."""
    return any(note.kind is kind and note.key == key and words in note.text for note in imported.notes)
