"""A stand-in for the orchestrator: says hello back, opens one lease on the given engine, answers heartbeats."""

import asyncio
import sys

from websockets.asyncio.server import ServerConnection, serve

from modelswap.protocol.codec import decode_from_gateway, encode
from modelswap.protocol.messages import Catalog, CatalogModel, Epoch, Heartbeat, Hello, Limits, Open


async def main(port: int, engine_port: int) -> None:
    limits = Limits(queue_timeout_ms=60_000, queue_requests=1000, queue_bytes=1 << 30)
    model = CatalogModel(name="bench", state="ready", resident=True)
    catalog = Catalog(generation=1, term_ms=10_000, limits=limits, models=(model,))
    lease = Open(model="bench", epoch=Epoch(1, 1), host="127.0.0.1", port=engine_port, slots=100_000)

    async def talk(connection: ServerConnection) -> None:
        async for frame in connection:
            message = decode_from_gateway(frame)
            if isinstance(message, Hello):
                await connection.send(encode(catalog), text=True)
                await connection.send(encode(lease), text=True)
            elif isinstance(message, Heartbeat):
                await connection.send(encode(message), text=True)

    async with serve(talk, "127.0.0.1", port) as server:
        print("ready", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
