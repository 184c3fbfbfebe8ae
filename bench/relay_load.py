"""Reads event streams, so many at once, for so long; prints how many events came.

Every stream is asked for on a new connection, and left when the time is over.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop

_BODY = b'{"model":"bench","stream":true,"messages":[{"role":"user","content":"hello"}]}'
_REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n" % len(_BODY)
) + _BODY


class Reader(asyncio.Protocol):
    """Asks for a stream, again whenever one has ended, and counts its events."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(_REQUEST)

    def data_received(self, data: bytes) -> None:
        """Count."""
        self.events += data.count(b"data: ")
        if data.endswith(b"\r\n0\r\n\r\n"):
            self.transport.write(_REQUEST)


async def main(port: int, streams: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    readers = [(await loop.create_connection(Reader, "127.0.0.1", port))[1] for _ in range(streams)]
    await asyncio.sleep(seconds)
    print(sum(reader.events for reader in readers), flush=True)
    for reader in readers:
        reader.transport.close()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
