"""Compose's ``${NAME}``: filled in, except where a secret would be copied or nobody knows the value.

The outcome is text in the syntax of our own config: ``${NAME}``, ``${NAME:-default}``, ``$${`` for a plain ``${``.
Compose's rules: https://docs.docker.com/reference/compose-file/interpolation/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from modelswap.importing.secrets import escaped, is_secret_name, looks_secret
from modelswap.importing.yamltext import Override

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LINE: Final = re.compile(
    r"""^[ \t]*(?:export[ \t]+)?(?P<name>[A-Za-z_][\w.-]*)[ \t]*[=:][ \t]*
    (?:'(?P<single>[^']*)'|"(?P<double>(?:\\.|[^"\\])*)"|(?P<plain>.*?))[ \t\r]*(?:(?<=\s)\#.*)?$""",
    re.VERBOSE | re.MULTILINE,
)


@dataclass(slots=True)
class Interpolation:
    """Fills in ``env``; remembers what it filled in, what it left to be set, and whose default it left out."""

    env: Mapping[str, str]
    filled: set[str] = field(default_factory=set)
    unset: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)

    def value(self, value: Any) -> Any:
        """Return ``value`` with every text in it interpolated; keys stay as they are."""
        match value:
            case str():
                return self.text(value)
            case list():
                return [self.value(each) for each in value]
            case dict():
                return {key: self.value(each) for key, each in value.items()}
            case Override():
                return Override(self.value(value.value), value.gone)
        return value

    def text(self, text: str) -> str:
        """Return ``text`` interpolated."""
        pieces: list[str] = []
        literal = ""
        index = 0
        while index < len(text):
            if text[index] != "$" or index + 1 == len(text):
                literal += text[index]
                index += 1
            elif text[index + 1] == "$":
                literal += "$"
                index += 2
            else:
                found = self._reference(text, index)
                if found is None:
                    literal += "$"
                    index += 1
                    continue
                piece, index = found
                pieces += [escaped(literal), piece]
                literal = ""
        return "".join([*pieces, escaped(literal)])

    def _reference(self, text: str, start: int) -> tuple[str, int] | None:
        braced = text[start + 1] == "{"
        match = _NAME.match(text, start + 1 + braced)
        if match is None:
            return None
        name, end = match[0], match.end()
        if not braced:
            return self._replaced(name, "", ""), end
        close = _closing(text, end)
        if close is None:
            return None
        rule = re.match(r":?[-?+]", text[end:close])
        if rule is None:
            return (self._replaced(name, "", ""), close + 1) if end == close else None
        return self._replaced(name, rule[0], text[end + len(rule[0]) : close]), close + 1

    def _replaced(self, name: str, rule: str, other: str) -> str:
        value = self.env.get(name)
        given = value is not None and (value != "" or not rule.startswith(":"))
        if rule.endswith("+"):
            return self.text(other) if given else ""
        if is_secret_name(name) or (value is not None and looks_secret(value)):
            if rule.endswith("-"):
                if not other:
                    return f"${{{name}:-}}"
                self.hidden.add(name)
            # Compose takes a variable that isn't set for an empty one; with '?' it insists.
            return f"${{{name}}}" if rule else f"${{{name}:-}}"
        if given:
            self.filled.add(name)
            return escaped(value or "")
        if rule.endswith("-"):
            return self.text(other)
        self.unset.add(name)
        return f"${{{name}}}"


def _closing(text: str, start: int) -> int | None:
    depth = 1
    for index in range(start, len(text)):
        if text[index] == "{" and text[index - 1] == "$":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return index
    return None


def dotenv(text: str, env: Mapping[str, str]) -> dict[str, str]:
    """Return what an ``.env`` file says; ``env`` goes first where its values refer to variables."""
    values: dict[str, str] = {}
    for match in _LINE.finditer(text):
        if match["single"] is not None:
            values[match["name"]] = match["single"]
            continue
        value = match["double"] if match["double"] is not None else match["plain"].strip()
        if match["double"] is not None:
            value = re.sub(r"\\(.)", lambda each: {"n": "\n", "t": "\t"}.get(each[1], each[1]), value)
        values[match["name"]] = _plain(value, {**values, **env})
    return values


def _plain(text: str, env: Mapping[str, str]) -> str:
    def one(match: re.Match[str]) -> str:
        return env.get(match["braced"] or match["bare"]) or match["fallback"] or ""

    return re.sub(r"\$(?:\{(?P<braced>[A-Za-z_]\w*)(?::?-(?P<fallback>[^}]*))?\}|(?P<bare>[A-Za-z_]\w*))", one, text)
