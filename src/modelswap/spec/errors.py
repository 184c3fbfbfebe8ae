"""What is wrong with a config file, told with the place and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from modelswap.protocol.errors import ModelswapError

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one place of a file.

    ``line`` and ``column`` count from 1, and are None where the file as a whole is meant. ``key`` is the path of the
    key, empty for the file itself. No field ever holds a value that came from the environment.
    """

    file: str
    line: int | None
    column: int | None
    key: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        text = ": ".join(part for part in (place, self.key, self.message) if part)
        return f"{text}; {self.hint}" if self.hint else text


class ConfigError(ModelswapError):
    """Raised when a config file can't be used; holds every problem that was found, in the file's order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.line or 0, p.column or 0, p.key, p.message)))
        super().__init__("\n".join(map(str, self.problems)))


def dotted(path: Path) -> str:
    """Return ``path`` as people write it: ``models.coder.aliases[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nearest(word: str, words: tuple[str, ...]) -> str | None:
    """Return which of ``words`` was probably meant by ``word``."""
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if not found:
        found = difflib.get_close_matches(word.lower().replace("-", "_"), words, n=1, cutoff=0.6)
    return found[0] if found else None
