"""What an import yields: the config, and an account of everything that isn't in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from modelswap.protocol.errors import Code, ModelswapError

_ORDER: Final = (
    *(
        "engine",
        "model",
        "aliases",
        "container",
        "compose_service",
        "image",
        "entrypoint",
        "program",
        "command",
        "args",
    ),
    *("port", "ready", "adapters", "api_key", "env", "cwd", "volumes", "gpus", "devices", "shm_size", "ipc", "ulimits"),
    *("network", "extra_hosts", "pull"),
)


def _place(key: str) -> int:
    return _ORDER.index(key) if key in _ORDER else len(_ORDER) + (key == "hooks")


class CannotImport(ModelswapError):
    """Raised when a file can't be imported at all; ``remedy`` says what to do instead."""

    code = Code.BAD_REQUEST

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy


class Kind(StrEnum):
    """How much a note matters."""

    ACTION = "action"
    """The user has something to do before it works as before."""
    LOST = "lost"
    """Said in the input, and not in our config."""
    CHANGED = "changed"
    """Carried over, and works differently here."""


@dataclass(frozen=True, slots=True)
class Note:
    """One thing to know about ``key``, the dotted path of a key of the input (empty: the whole)."""

    kind: Kind
    key: str
    text: str


@dataclass(frozen=True, slots=True)
class Found:
    """One model for the summary: what serves it, what it loads, and what hosts it."""

    name: str
    engine: str
    loads: str
    host: str


@dataclass(slots=True)
class Imported:
    """The outcome.

    ``config`` is what the file is to say, in its own syntax (``${NAME}`` is a reference). ``comments`` are lines to put
    above a key, by its path. ``ignored`` names what has nothing to do with models. ``variables`` are the environment
    variables that must be set before the config loads. ``steps`` are commands to give before the first start, each
    with why.
    """

    config: dict[str, Any] = field(default_factory=lambda: {"models": {}})
    comments: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    variables: set[str] = field(default_factory=set)
    steps: list[tuple[str, str]] = field(default_factory=list)

    def add(self, found: Found, model: dict[str, Any]) -> None:
        """Add a model, without the keys that say nothing."""
        kept = {key: value for key, value in model.items() if value not in (None, [], {}, ())}
        self.config["models"][found.name] = {key: kept[key] for key in sorted(kept, key=_place)}
        self.found.append(found)

    def note(self, kind: Kind, key: str, text: str) -> None:
        """Add a note, once."""
        note = Note(kind, key, text)
        if note not in self.notes:
            self.notes.append(note)

    def comment(self, path: tuple[str, ...], text: str) -> None:
        """Put a line above the key at ``path``."""
        self.comments.setdefault(path, []).append(text)
