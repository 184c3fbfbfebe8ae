"""Loopback ports for engines, handed out in turn."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from modelswap.runtimes.base import StartFailed

HOST: Final = "127.0.0.1"
_PREFERRED: Final = (range(20_000, 30_000), range(10_000, 32_768), range(61_000, 65_536))
_ENOUGH: Final = 256
_KERNEL: Final = Path("/proc/sys/net/ipv4")


def _spans(text: str) -> list[range]:
    """Read the kernel's lists of ports: ``8080,9000-9010``."""
    spans = []
    for item in text.strip().split(","):
        first, _, last = item.partition("-")
        if first:
            spans.append(range(int(first), int(last or first) + 1))
    return spans


def outside_ephemeral(kernel: Path = _KERNEL) -> Sequence[int]:
    """Return ports that no program is given by chance.

    Outgoing connections get theirs from the kernel's ephemeral range, and could take an engine's just before it
    listens. What the administrator reserved is left alone too.
    """
    taken = [range(32_768, 61_000)]
    with contextlib.suppress(OSError, ValueError):
        low, high = (kernel / "ip_local_port_range").read_text().split()
        taken = [range(int(low), int(high) + 1)]
    with contextlib.suppress(OSError, ValueError):
        taken += _spans((kernel / "ip_local_reserved_ports").read_text())
    for preferred in _PREFERRED:
        ports = [port for port in preferred if not any(port in span for span in taken)]
        if len(ports) >= _ENOUGH:
            return ports
    # A machine that gives everything away: a port that is free now is the best there is.
    return _PREFERRED[0]


def is_free(port: int, *, lingering: bool) -> bool:
    """Return whether a server could listen on a port now; ``lingering``: even if closed connections linger on it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if lingering:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


class Ports:
    """Hands out ports in turn, so that an address comes back as late as possible.

    The last one is kept in ``memory``, so that a restart goes on where it ended; without it the start is random.
    """

    def __init__(self, memory: Path, ports: Iterable[int] | None = None) -> None:
        self._memory = memory
        self._ports = list(outside_ephemeral() if ports is None else ports)
        if not self._ports:
            raise ValueError("no ports to choose from")
        self._next = self._start()

    def _start(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self._ports.index(int(self._memory.read_text())) + 1
        return random.randrange(len(self._ports))  # noqa: S311 - spreads, keeps no secret

    def take(self) -> int:
        """Return the next port that is free; raises `StartFailed` if none is."""
        # Most servers can listen where closed connections linger, some can't: such ports come second.
        for lingering in (False, True):
            for step in range(len(self._ports)):
                index = (self._next + step) % len(self._ports)
                port = self._ports[index]
                if is_free(port, lingering=lingering):
                    self._next = index + 1
                    self._remember(port)
                    return port
        low, high = min(self._ports), max(self._ports)
        raise StartFailed(
            f"none of the {len(self._ports)} ports between {low} and {high} on {HOST} is free for an engine; "
            "see what listens there with: ss -ltnp"
        )

    def _remember(self, port: int) -> None:
        # A full disk costs only the memory: a restart then begins at a random port.
        with contextlib.suppress(OSError):
            self._memory.write_text(f"{port}\n")
