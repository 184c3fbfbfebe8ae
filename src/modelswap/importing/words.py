"""Command lines as lists of words: splitting them, and taking options out of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import PurePath, PureWindowsPath

from modelswap.importing.result import CannotImport

_SHELLS = frozenset({"sh", "bash", "ash", "dash", "zsh"})
_BETWEEN = frozenset({"&&", "||", ";", "|", "&", "(", ")"})


def split(text: str, where: str) -> list[str]:
    """Return the words of ``text`` by the shell's rules of quoting; ``where`` names its place in errors."""
    try:
        return shlex.split(re.sub(r"\\\r?\n", " ", text))
    except ValueError as error:
        raise CannotImport(f"{where}: can't be split into words: {error}", "mend its quotes, then import") from None


def program(word: str) -> str:
    """Return a program's bare name: no folder, no ``.exe``."""
    path = PureWindowsPath(word) if "\\" in word else PurePath(word)
    return path.name.removesuffix(".exe")


def script(words: list[str]) -> list[list[str]] | None:
    """Return the commands in ``sh -c SCRIPT``, each as its words; None if ``words`` are no such thing."""
    if len(words) < 3 or program(words[0]) not in _SHELLS:
        return None
    for index, word in enumerate(words[1:-1], start=1):
        if re.fullmatch(r"-[a-z]*c[a-z]*", word):
            return _commands(words[index + 1])
        if not word.startswith("-"):
            return None
    return None


def _commands(text: str) -> list[list[str]]:
    commands: list[list[str]] = [[]]
    for line in re.sub(r"\\\n", " ", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        lexer.commenters = "#"
        try:
            for word in lexer:
                if word in _BETWEEN:
                    commands.append([])
                else:
                    commands[-1].append(word)
        except ValueError:
            commands.append([])
        commands.append([])
    return [words[1:] if words[0] == "exec" else words for words in commands if words]


class Options:
    """The words after a program; options are taken out of it, and what stays is ``words``.

    ``--name value`` and ``--name=value`` are the same, and so are dashes and underscores in long names.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = list(words)

    def value(self, *names: str) -> str | None:
        """Take the options called ``names`` out; return the last one's value."""
        values = self._take(names, several=False)
        return values[-1] if values else None

    def values(self, *names: str) -> list[str]:
        """Take the options called ``names`` out, each with all words up to the next option; return the last one's."""
        return self._take(names, several=True)

    def flag(self, *names: str) -> bool:
        """Take options without values out; return whether there was one."""
        wanted = {same(name) for name in names}
        kept = [word for word in self.words if same(word) not in wanted]
        found = len(kept) != len(self.words)
        self.words = kept
        return found

    def peek(self, *names: str) -> str | None:
        """Return the last value of the options called ``names``, and leave them where they are."""
        return Options(self.words).value(*names)

    def has(self, *names: str) -> bool:
        """Return whether one of ``names`` is there, and leave it."""
        wanted = {same(name) for name in names}
        return any(same(word.partition("=")[0]) in wanted for word in self.words)

    def first(self) -> str | None:
        """Take the first word out if it is no option, and return it."""
        if self.words and not self.words[0].startswith("-"):
            return self.words.pop(0)
        return None

    def _take(self, names: tuple[str, ...], *, several: bool) -> list[str]:
        wanted = {same(name) for name in names}
        kept: list[str] = []
        found: list[str] = []
        index = 0
        while index < len(self.words):
            word = self.words[index]
            index += 1
            name, equals, value = word.partition("=")
            if same(name) not in wanted:
                kept.append(word)
                continue
            if equals:
                found = [value]
                continue
            found = []
            while index < len(self.words) and (not found or several):
                if found and self.words[index].startswith("-"):
                    break
                found.append(self.words[index])
                index += 1
        self.words = kept
        return found


def same(name: str) -> str:
    """Return an option's name in one spelling."""
    return name[:2] + name[2:].replace("_", "-") if name.startswith("--") else name
