"""A tiny fast engine: any POST gets a small JSON answer, one to /v1/chat/completions that streams gets events.

Events go out one chunk a write, EVENTS in all, paced so that each is a read of its own at the proxy.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Final, cast

import uvloop

EVENTS: Final = 1000
GAP_SECONDS: Final = 0.002

_ANSWER: Final = (
    b'{"id":"cmpl-1","object":"text_completion","created":1,"model":"bench",'
    b'"choices":[{"index":0,"text":"Hello there, how can I help you today?","finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":9,"completion_tokens":12,"total_tokens":21}}'
)
UNARY: Final = (
    b"HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2024 00:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-length: %d\r\ncontent-type: application/json\r\n\r\n" % len(_ANSWER)
) + _ANSWER
_EVENT: Final = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"bench",'
    b'"choices":[{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
)
CHUNK: Final = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
STREAM_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ndate: Mon, 01 Jan 2024 00:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


class Engine(asyncio.Protocol):
    """One connection; a request must come in one read or in head and body."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._buffer = b""
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the stream."""
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        """Answer a request once it is whole."""
        if self._buffer:
            data = self._buffer + data
        end = data.find(b"\r\n\r\n")
        at = data.lower().find(b"content-length:", 0, end)
        length = int(data[at + 15 : data.find(b"\r\n", at)]) if at > 0 else 0
        if end < 0 or len(data) < end + 4 + length:
            self._buffer = data
            return
        self._buffer = b""
        if b'"stream":true' in data:
            self._task = asyncio.get_running_loop().create_task(self._stream())
        else:
            self.transport.write(UNARY)

    async def _stream(self) -> None:
        self.transport.write(STREAM_HEAD)
        for _ in range(EVENTS):
            await asyncio.sleep(GAP_SECONDS)
            self.transport.write(CHUNK)
        self.transport.write(b"0\r\n\r\n")


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port, backlog=1024)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
