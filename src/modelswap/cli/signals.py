"""SIGINT, SIGTERM and SIGHUP as events, for the commands that stay up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator


class Stopping:
    """``asked`` is set by the first SIGINT or SIGTERM, ``hurry`` by the second; ``interrupted`` if one was SIGINT."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurry = asyncio.Event()
        self.interrupted = False

    def heard(self, number: signal.Signals) -> None:
        """Note a signal."""
        if number == signal.SIGINT:
            self.interrupted = True
        if self.asked.is_set():
            self.hurry.set()
        self.asked.set()


def _terminal() -> int | None:
    with contextlib.suppress(OSError):
        return os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    return None


@contextlib.contextmanager
def stop_signals(reload: Callable[[], None] | None = None) -> Iterator[Stopping]:
    """Have stop signals noted instead of ending this process, and SIGHUP call ``reload``.

    A SIGHUP that comes because the terminal was closed is a wish to stop, unless SIGHUP was ignored (nohup).
    """
    loop = asyncio.get_running_loop()
    stopping = Stopping()
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN

    def hung_up() -> None:
        terminal = _terminal()
        if terminal is not None:
            os.close(terminal)
        if had_terminal and terminal is None and not ignored:
            stopping.heard(signal.SIGHUP)
        elif reload is not None:
            reload()

    terminal = _terminal()
    had_terminal = terminal is not None
    if terminal is not None:
        os.close(terminal)
    loop.add_signal_handler(signal.SIGINT, stopping.heard, signal.SIGINT)
    loop.add_signal_handler(signal.SIGTERM, stopping.heard, signal.SIGTERM)
    if not ignored or reload is not None:
        loop.add_signal_handler(signal.SIGHUP, hung_up)
    try:
        yield stopping
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
