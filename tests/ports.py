"""Ports for servers that a test starts in processes of their own, where they can't take any that is free."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from typing import Final

from modelswap.runtimes.ports import is_free

_EACH: Final = 1_000


def _in_turn() -> Iterator[int]:
    """Yield ports that neither the kernel nor an engine nor another test process is given, each in turn."""
    first = 10_000 + _EACH * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    start = random.randrange(_EACH)
    for step in itertools.count(start):
        yield first + step % _EACH


_PORTS: Final = _in_turn()


def free_port() -> int:
    """Return a loopback port that nothing uses now, and that nothing else will take."""
    return next(port for port in _PORTS if is_free(port, lingering=True))
