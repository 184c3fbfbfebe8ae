"""A gateway worker as a process: its event loop and its signals."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvloop

from modelswap.gateway.worker import serve
from modelswap.spec.config import Config


def run(
    config: Config,
    *,
    worker: int,
    orchestrator_url: str,
    token: str,
    sock: socket.socket | None = None,
    ready: Callable[[int], None] | None = None,
    metrics_folder: Path | None = None,
) -> int:
    """Run a worker until SIGTERM or SIGINT; return its exit status.

    The first signal lets running requests finish (at most `scheduling.drain_timeout`); a second ends it at once, with
    status 1. SIGHUP changes nothing: the orchestrator tells of a changed configuration.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_main(config, worker, orchestrator_url, token, sock, ready, metrics_folder))


async def _main(
    config: Config,
    worker: int,
    orchestrator_url: str,
    token: str,
    sock: socket.socket | None,
    ready: Callable[[int], None] | None,
    metrics_folder: Path | None,
) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    gc.freeze()  # what is loaded by now stays, so collections need not look at it
    await serve(
        config,
        worker=worker,
        orchestrator_url=orchestrator_url,
        token=token,
        sock=sock,
        ready=ready,
        stop=stop,
        metrics_folder=metrics_folder,
    )
    return 0
