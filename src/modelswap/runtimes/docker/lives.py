"""What is known of each start of a container: whose it is, and how it ended."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from modelswap.runtimes.base import Exit, Running

_REMEMBERED: Final = 256
_SIGNALLED: Final = 128
_SIGNALS: Final = 64
_SIGKILL: Final = 9

Key = tuple[str, int]
"""A start's identity: its container's full id, and when Docker started it, in microseconds."""


def key_of(container: str, born: float) -> Key:
    """Return a start's identity; ``born`` in Unix seconds."""
    return container, round(born * 1e6)


@dataclass(slots=True, eq=False)
class Life:
    """One start of a container, from when we hear of it. Times are Docker's, in Unix seconds."""

    running: Running
    foreign: bool = False
    """Somebody else started it, and its model is configured as it runs."""
    unwanted: bool = False
    """It carries our labels, but somebody else started it, and no model is configured like this."""
    announced: bool = False
    """Whoever waits for what others start has been told, or needn't be."""
    port: int = 0
    """Where it listens in its container; 0: not known."""
    log_since: float = 0.0
    """From when on its container's log is its own."""
    asked: bool = False
    """We have asked it to end."""
    killed: bool = False
    """We have sent it SIGKILL."""
    limited: bool | None = None
    """Its container has a memory limit; None: not known."""
    oom: bool = False
    """Something in it was killed at its memory limit."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    exit: Exit | None = None
    ended_at: float = 0.0

    def end(self, code: int | None, at: float = 0.0) -> None:
        """Note how it ended (``code`` as Docker tells it), unless that is known."""
        if self.exit is None:
            signalled = code is not None and _SIGNALLED < code <= _SIGNALLED + _SIGNALS
            number = _SIGNALLED - code if code is not None and signalled else code
            self.exit = Exit(number, killed=self.killed and number == -_SIGKILL, oom=self.oom)
            self.ended_at = at
            self.ended.set()


class Lives:
    """All starts that we know of; of those that have ended, the last 256."""

    def __init__(self) -> None:
        self._lives: dict[Key, Life] = {}

    def get(self, container: str, born: float) -> Life | None:
        """Return what is known of a start."""
        return self._lives.get(key_of(container, born))

    def add(self, life: Life) -> None:
        """Note a start that we hear of now; who knew it as another instance is told that that has ended."""
        key = key_of(life.running.container, life.running.born)
        if (before := self._lives.get(key)) is not None:
            before.end(None)
        self._lives[key] = life
        ended = [known for known, one in self._lives.items() if one.exit is not None]
        for known in ended[:-_REMEMBERED]:
            del self._lives[known]

    def living(self, container: str | None = None) -> list[Life]:
        """Return the starts of which no end is known: of one container, or all."""
        return [life for life in self._all(container) if life.exit is None]

    def all(self) -> list[Life]:
        """Return all, also those that have ended."""
        return list(self._lives.values())

    def _all(self, container: str | None) -> list[Life]:
        return [life for life in self._lives.values() if container in (None, life.running.container)]
