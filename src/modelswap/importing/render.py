"""A config as YAML that people like to read, in the style of `spec.example`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml

_WIDTH: Final = 100
_INDENT: Final = "  "
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./-](?:[A-Za-z0-9_./@%+=-]|:(?=[A-Za-z0-9_./-]))*")
_LITERAL: Final = frozenset({"", "~", "null", "Null", "NULL"})
_TEXTS: Final = frozenset({"args", "command", "entrypoint", "env"})
"""Keys whose numbers need no quotes: the config takes them as written."""

Comments = Mapping[tuple[str, ...], Sequence[str]]


def render(config: Mapping[str, Any], comments: Comments, header: Sequence[str], footer: Sequence[str]) -> str:
    """Return ``config`` as YAML; ``header`` and ``footer`` are comment lines, ``comments`` go above their keys."""
    lines = [_comment(line) for line in header]
    for key, value in config.items():
        lines += ["", *_entry((key,), value, comments)]
    if footer:
        lines += ["", *map(_comment, footer)]
    return "\n".join(lines) + "\n"


def _comment(line: str) -> str:
    return f"# {line}" if line else "#"


def _entry(path: tuple[str, ...], value: Any, comments: Comments) -> list[str]:
    indent = _INDENT * (len(path) - 1)
    key = f"{indent}{_scalar(path[-1], as_written=False)}:"
    above = [f"{indent}{_comment(line)}" for line in comments.get(path, ())]
    if isinstance(value, dict) and value:
        inner: list[str] = []
        for name, each in value.items():
            # Models stand apart from each other.
            gap = [""] if path == ("models",) and inner else []
            inner += [*gap, *_entry((*path, name), each, comments)]
        return [*above, key, *inner]
    as_written = not _TEXTS.isdisjoint(path)
    if isinstance(value, list) and value:
        return [*above, *_list(key, [_inline(each, as_written=as_written) for each in value])]
    if isinstance(value, (dict, list)):
        return [*above, f"{key} {'{}' if isinstance(value, dict) else '[]'}"]
    return [*above, f"{key} {_scalar(value, as_written=as_written)}"]


def _inline(value: Any, *, as_written: bool) -> str:
    """Return a value within a line; what is in it follows its own keys."""
    if isinstance(value, dict):
        inner = (
            f"{_scalar(name, as_written=False)}: {_inline(each, as_written=as_written or name in _TEXTS)}"
            for name, each in value.items()
        )
        return f"{{{', '.join(inner)}}}"
    if isinstance(value, list):
        return f"[{', '.join(_inline(each, as_written=as_written) for each in value)}]"
    return _scalar(value, as_written=as_written)


def _list(key: str, words: list[str]) -> list[str]:
    """Return a list in brackets, an option and its values kept together where lines are broken."""
    if len(line := f"{key} [{', '.join(words)}]") <= _WIDTH:
        return [line]
    groups: list[list[str]] = []
    for word in words:
        if groups and not word.startswith("-") and groups[-1][0].startswith("-"):
            groups[-1].append(word)
        else:
            groups.append([word])
    indent = " " * (len(key) - len(key.lstrip())) + _INDENT
    lines = [f"{key} ["]
    for group in groups:
        text = ", ".join(group) + ","
        if len(lines) > 1 and len(lines[-1]) + 1 + len(text) <= _WIDTH:
            lines[-1] += f" {text}"
        else:
            lines.append(indent + text)
    # A YAML list may end in a comma, as a Python one.
    return [*lines, f"{indent[: -len(_INDENT)]}]"]


def _scalar(value: Any, *, as_written: bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return str(value)
    plain = value not in _LITERAL and _PLAIN.fullmatch(value) is not None and value not in ("-", "---", "...")
    if plain and (as_written or _is_text(value)):
        return value
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[^\x20-\x7e\xa1-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]", _escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _is_text(value: str) -> bool:
    resolved = yaml.SafeLoader("").resolve(yaml.ScalarNode, value, (True, False))  # type: ignore[no-untyped-call]
    return bool(resolved == "tag:yaml.org,2002:str")
