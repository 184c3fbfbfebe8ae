"""llama-swap's macros: ``${name}`` in commands and addresses, the model's own before the file's.

As its ``internal/config`` does it: later macros are filled in first, so that their values may hold earlier ones;
``${env.NAME}`` is the environment's and becomes our ``${NAME}``; ``${PORT}`` and ``${PID}`` are known only later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

_ENV: Final = re.compile(r"\$\{env\.([A-Za-z_][A-Za-z0-9_]*)\}")
_LEFT: Final = re.compile(r"\$\{(?!env\.)([^}]*)\}")
_LATER: Final = ("PORT", "PID")


class Macros:
    """The macros of one model; ``used`` collects the names of the file's own that were needed."""

    def __init__(self, model: str, common: Mapping[str, Any], own: Mapping[str, Any], used: set[str]) -> None:
        self._values = {"MODEL_ID": model, **common, **own}
        self._own = own
        self._used = used
        self.own_used: set[str] = set()
        self.unknown: set[str] = set()

    def command(self, text: str) -> str:
        """Return a command line filled in; its comments go first, since a macro may have several lines."""
        return self.text(without_comments(text))

    def text(self, text: str, *, port: str = "${PORT}") -> str:
        """Return ``text`` filled in, in the syntax of our config; ``port`` stands for llama-swap's ``${PORT}``."""
        for name in reversed(self._values):
            value = self._values[name]
            if f"${{{name}}}" in text and not isinstance(value, (dict, list)):
                (self.own_used if name in self._own else self._used).add(name)
                text = text.replace(f"${{{name}}}", "" if value is None else str(value))
        text = text.replace("${PORT}", port)
        self.unknown |= {name for name in _LEFT.findall(text) if name not in _LATER}
        return _ENV.sub(r"${\1}", _LEFT.sub(self._left, text))

    def _left(self, match: re.Match[str]) -> str:
        return match[0] if match[1] in _LATER else f"${match[0]}"


def without_comments(text: str) -> str:
    """Return a command line without the lines that are comments."""
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
