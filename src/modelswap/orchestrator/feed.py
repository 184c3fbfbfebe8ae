"""What happens, as it happens, for ``GET /events``."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import msgspec

_REMEMBERED: Final = 500
_QUEUED: Final = 1000


class Item(msgspec.Struct, frozen=True):
    """One thing that happened: ``id`` grows by one, ``data`` is JSON."""

    id: int
    kind: str
    data: bytes


class Feed:
    """Remembers the last things that happened and tells every subscriber.

    A subscriber that doesn't keep up gets None as its last item, and may come back with the last id it saw.
    """

    def __init__(self) -> None:
        self._last = 0
        self._past: deque[Item] = deque(maxlen=_REMEMBERED)
        self._subscribers: set[asyncio.Queue[Item | None]] = set()
        self._closed = False

    def publish(self, kind: str, **data: Any) -> None:
        """Tell everyone."""
        self._last += 1
        item = Item(self._last, kind, msgspec.json.encode({"at": time.time(), **data}))
        self._past.append(item)
        for queue in list(self._subscribers):
            if queue.qsize() >= _QUEUED:
                self._end(queue)
            else:
                queue.put_nowait(item)

    @contextlib.contextmanager
    def subscribe(self, after: int | None = None) -> Iterator[asyncio.Queue[Item | None]]:
        """Give a queue of what happens from now on, and of what is remembered after the item ``after``."""
        queue: asyncio.Queue[Item | None] = asyncio.Queue()
        if after is not None:
            # An id from before a restart may be greater than all we know: then everything is news.
            for item in self._past:
                if item.id > after or after > self._last:
                    queue.put_nowait(item)
        self._subscribers.add(queue)
        if self._closed:
            self._end(queue)
        try:
            yield queue
        finally:
            self._subscribers.discard(queue)

    def close(self) -> None:
        """End every subscription."""
        self._closed = True
        for queue in list(self._subscribers):
            self._end(queue)

    def _end(self, queue: asyncio.Queue[Item | None]) -> None:
        self._subscribers.discard(queue)
        queue.put_nowait(None)
