"""A reader that knows what it has read, so that nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from modelswap.importing.result import CannotImport
from modelswap.spec.errors import Path, dotted

_TRUE = ("true", "yes", "on", "y")
_FALSE = ("false", "no", "off", "n")


class Section:
    """A mapping of the input at ``path``; every ``take…`` marks its key as read.

    Values are texts, lists, mappings and None (`yamltext.parse`). A value of the wrong kind raises `CannotImport`.
    """

    def __init__(self, value: dict[str, Any], path: Path = ()) -> None:
        self.value = value
        self.path = path
        self._read: set[str] = set()
        self._inner: dict[str, Section] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.value

    def key(self, *parts: str | int) -> str:
        """Return the dotted path of a key in it."""
        return dotted((*self.path, *parts))

    def take(self, key: str) -> Any:
        """Return the value of ``key`` as it is; None if there is none."""
        self._read.add(key)
        return self.value.get(key)

    def text(self, key: str) -> str | None:
        """Return a text; None if there is none."""
        value = self.take(key)
        if isinstance(value, (dict, list)):
            raise self._wrong(key, "a text", value)
        return None if value is None else str(value)

    def flag(self, key: str) -> bool | None:
        """Return true or false; None if it isn't given."""
        value = self.text(key)
        if value is None:
            return None
        if value.lower() not in (*_TRUE, *_FALSE):
            raise self._wrong(key, "true or false", value)
        return value.lower() in _TRUE

    def whole(self, key: str) -> int | None:
        """Return a whole number; None if it isn't given."""
        value = self.text(key)
        if value is None:
            return None
        try:
            return int(value)
        except ValueError:
            raise self._wrong(key, "a whole number", value) from None

    def texts(self, key: str) -> list[str]:
        """Return a list of texts; a single text is a list of one, nothing an empty one."""
        value = self.take(key)
        if value is None:
            return []
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list) or any(isinstance(each, (dict, list)) for each in value):
            raise self._wrong(key, "a list of texts", value)
        return [str(each) for each in value if each is not None]

    def section(self, key: str) -> Section:
        """Return the mapping at ``key`` as a section of its own, which counts for itself; empty if there is none."""
        if key not in self._inner:
            value = self.value.get(key)
            if value is None:
                self._read.add(key)
                value = {}
            if not isinstance(value, dict):
                raise self._wrong(key, "a mapping (key: value)", value)
            self._inner[key] = Section(value, (*self.path, key))
        return self._inner[key]

    def sections(self) -> Iterator[tuple[str, Section]]:
        """Yield every key with its mapping."""
        for key in self.value:
            yield key, self.section(key)

    def finish(self) -> None:
        """Count everything in it as read."""
        self._read.update(self.value)
        self._inner.clear()

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Yield the dotted path and value of everything that nobody has read."""
        for key, value in self.value.items():
            if key in self._inner:
                yield from self._inner[key].unread()
            elif key not in self._read:
                yield self.key(key), value

    def _wrong(self, key: str, wanted: str, value: Any) -> CannotImport:
        kind = "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else "another text"
        return CannotImport(f"{self.key(key)}: wants {wanted}, found {kind}", "mend it, then import")
