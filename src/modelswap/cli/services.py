"""``modelswap orchestrator`` and ``modelswap gateway``: one service in this process."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from pathlib import Path
from typing import Final, TextIO

from modelswap.cli import addresses
from modelswap.cli.failure import ExitCode, Failure
from modelswap.cli.parent import tie_to_parent
from modelswap.cli.settings import config_failure, load_config
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.spec.errors import ConfigError

_TOKEN: Final = "MODELSWAP_TOKEN"  # noqa: S105 - the variable's name
_TOKEN_WITHIN: Final = 30.0
_LOOK_EVERY: Final = 0.1


def orchestrator(path: Path) -> None:
    """Run the orchestrator until SIGTERM; raises `Failure`."""
    tie_to_parent()
    forgive_stderr()
    from modelswap.orchestrator.main import run

    try:
        run(path)
    except ConfigError as error:
        raise config_failure(error) from error
    except ModelswapError as error:
        raise Failure(str(error), code=_code(error)) from error


def _code(error: ModelswapError) -> ExitCode:
    """Return how to end: a Docker that isn't there may come, so that starting again helps."""
    from modelswap.runtimes.docker.client import DockerAway

    may_come = isinstance(error, DockerAway) and error.code is not Code.MODEL_BROKEN
    return ExitCode.FAILED if may_come else ExitCode.USAGE


def gateway(path: Path, worker: int, url: str | None) -> int:
    """Run gateway worker number ``worker`` until SIGTERM and return its exit status; raises `Failure`."""
    tie_to_parent()
    forgive_stderr()
    config = load_config(path)
    from modelswap.gateway.main import run
    from modelswap.orchestrator.logging_setup import log_to_stderr
    from modelswap.orchestrator.state import state_dir

    log_to_stderr()
    state = state_dir(config)
    try:
        return run(
            config,
            worker=worker,
            orchestrator_url=url or addresses.url(config.orchestrator.host, config.orchestrator.port),
            token=wait_for_token(state),
            metrics_folder=state / "gateway-metrics",
        )
    except ModelswapError as error:
        raise Failure(str(error), code=ExitCode.USAGE) from error
    except OSError as error:
        where = f"{config.gateway.host}:{config.gateway.port}"
        raise Failure(f"can't listen at {where}: {error.strerror}", "free it, or change gateway.port") from error


class Forgiving(io.TextIOBase):
    """Writes to ``stream`` for as long as that takes anything.

    A terminal that was closed, a full disk or a reader that has gone must not end a service that only wants to log.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``, or lose it."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what was written, or lose it."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False


def forgive_stderr() -> None:
    """Let nothing that goes wrong with our stderr be an error."""
    sys.stderr = Forgiving(sys.stderr)


def wait_for_token(state: Path, within: float = _TOKEN_WITHIN) -> str:
    """Return the gateways' token; waits for the orchestrator to make it, at most ``within`` seconds.

    Raises `Failure`.
    """
    if given := os.environ.get(_TOKEN, "").strip():
        return given
    path = state / "token"
    deadline = time.monotonic() + within
    while True:
        try:
            if token := path.read_text().strip():
                return token
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as error:
            raise Failure(f"can't read the token {path}: {error}", f"mend that, or set {_TOKEN}") from error
        if time.monotonic() > deadline:
            raise Failure(
                f"there is no token at {path} after {within:g} s",
                f"start the orchestrator first, or set {_TOKEN} for both",
            )
        time.sleep(_LOOK_EVERY)
