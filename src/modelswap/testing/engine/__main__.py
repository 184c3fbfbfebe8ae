"""Runs one simulated engine until it is told to end, or ends by itself; exits with its status."""

from __future__ import annotations

import asyncio
import signal
import sys

import uvloop

from modelswap.testing.engine.options import Options, parse
from modelswap.testing.engine.server import SimEngine


async def serve(options: Options) -> int:
    """Run an engine to its end and return its exit status."""
    engine = SimEngine(options, own_process=True)
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    try:
        await engine.start()
    except OSError as error:
        engine.log.error(f"[Errno {error.errno}] {error.strerror}")
        return 1

    async def watch() -> None:
        while not engine.ended.is_set():
            await asked.wait()
            asked.clear()
            await engine.terminate()

    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch())
        await engine.ended.wait()
        watching.cancel()
    await engine.stop()
    return engine.exit_code or 0


def main() -> int:
    """Run from the command line."""
    options = parse()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(options))


if __name__ == "__main__":
    sys.exit(main())
