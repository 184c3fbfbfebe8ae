"""Names that requests can use, each given to one model only."""

from __future__ import annotations

import re
from collections.abc import Iterable

from modelswap.importing.result import Imported, Kind
from modelswap.spec.rules import LONGEST_NAME


class Names:
    """Gives out names, models first: a name that a model has is no other one's alias."""

    def __init__(self, imported: Imported) -> None:
        self._imported = imported
        self._taken: dict[str, str] = {}

    def model(self, wanted: Iterable[str], source: str) -> str:
        """Return the first of ``wanted`` that is free and can be used; ``source`` is the key that it comes from.

        If none is, the last one is mended until it can be.
        """
        name = ""
        for name in wanted:
            if usable(name) and name not in self._taken:
                self._taken[name] = source
                return name
            if name in self._taken:
                text = f"the name '{name}' belongs to {self._taken[name]} already"
                self._imported.note(Kind.CHANGED, source, text)
        free = mended(name)
        number = 2
        while free in self._taken:
            free = f"{mended(name)}-{number}"
            number += 1
        if free != name:
            self._imported.note(Kind.CHANGED, source, f"requests name it '{free}'")
        self._taken[free] = source
        return free

    def aliases(self, model: str, wanted: Iterable[str], source: str) -> list[str]:
        """Return those of ``wanted`` that are free and can be used; the others are noted."""
        result = []
        for name in dict.fromkeys(wanted):
            if name == model:
                continue
            if name in self._taken:
                text = f"the name '{name}' belongs to {self._taken[name]} already"
                self._imported.note(Kind.LOST, source, text)
            elif not usable(name, alias=True):
                self._imported.note(Kind.LOST, source, f"'{name}' is not a name that requests can use")
            else:
                self._taken[name] = source
                result.append(name)
        return result


def usable(name: str, *, alias: bool = False) -> bool:
    """Return whether requests can use ``name``. References are filled in for aliases only."""
    if "${" in name:
        return alias
    return 0 < len(name) <= LONGEST_NAME and name.isprintable() and not re.search(r"\s|^-", name)


def mended(name: str) -> str:
    """Return ``name`` with what can't be used replaced."""
    text = re.sub(r"\$+\{\w+[^}]*\}", "", name)
    return re.sub(r"[^\w./:@+-]+", "-", text)[:LONGEST_NAME].strip("-") or "model"
