"""A transport that only records."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


class RecordingTransport(asyncio.Transport):
    """Keeps what is written; closes at once."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._protocol = protocol
        self._closing = False
        self._seen = 0
        self.written: list[bytes] = []
        protocol.connection_made(self)

    def write(self, data: Any) -> None:
        """Record."""
        assert not self._closing
        self.written.append(bytes(data))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Record."""
        self.write(b"".join(list_of_data))

    def get_write_buffer_size(self) -> int:
        """All is sent."""
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """There is no socket."""
        return default

    def is_closing(self) -> bool:
        """Whether it has been closed."""
        return self._closing

    def close(self) -> None:
        """Close."""
        self._closing = True

    def abort(self) -> None:
        """Close."""
        self._closing = True

    def pause_reading(self) -> None:
        """Tests feed protocols by hand."""

    def resume_reading(self) -> None:
        """Tests feed protocols by hand."""

    def can_write_eof(self) -> bool:
        """Yes."""
        return True

    def write_eof(self) -> None:
        """Nothing more comes."""

    def lose(self) -> None:
        """Tell the protocol that the other side has closed."""
        if not self._closing:
            self._closing = True
            self._protocol.connection_lost(None)

    def take_request(self) -> bool:
        """Whether something has been written since this was last asked."""
        written = len(self.written)
        new, self._seen = written > self._seen, written
        return new
