"""The state folder: journal, engine logs and token of one orchestrator."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from modelswap.protocol.errors import ModelswapError
from modelswap.spec.config import Config

DATABASE: Final = "modelswap.db"
"""The journal's name in the state folder."""


class StateDirUnusable(ModelswapError):
    """Raised when the state folder can't be made or written, or another orchestrator uses it."""


def state_dir(config: Config, env: Mapping[str, str] = os.environ) -> Path:
    """Return where state is kept: ``orchestrator.state_dir``, else ``$XDG_STATE_HOME`` or ``~/.local/state``."""
    if config.orchestrator.state_dir is not None:
        return config.orchestrator.state_dir.expanduser().absolute()
    base = Path(env.get("XDG_STATE_HOME", ""))
    if not base.is_absolute():  # the XDG specification: a relative path is to be ignored
        base = Path.home() / ".local" / "state"
    return base / "modelswap"


def prepare(path: Path) -> None:
    """Create the state folder, readable by us only; raises `StateDirUnusable`."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StateDirUnusable(
            f"can't make the state folder {path}: {error.strerror}; name another one in orchestrator.state_dir"
        ) from error


@contextlib.contextmanager
def sole_owner(path: Path) -> Iterator[None]:
    """Hold the state folder for this process; raises `StateDirUnusable` while another orchestrator holds it."""
    lock = path / "lock"
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateDirUnusable(f"can't write to the state folder {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise StateDirUnusable(
                f"another orchestrator{f' (PID {holder})' if holder else ''} uses {path}; "
                "stop it, or give this one its own orchestrator.state_dir"
            ) from error
        with contextlib.suppress(OSError):  # the number is for the message above only
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)
