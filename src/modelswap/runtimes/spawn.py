"""Starting an engine's process, and what to say when that fails."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from modelswap.engines.base import Launch
from modelswap.protocol.errors import Code
from modelswap.runtimes.base import StartFailed

# Ours alone; an engine has no business with it.
_SECRETS: Final = ("MODELSWAP_TOKEN",)
_PASSING: Final = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETXTBSY, errno.EIO})


def environment(launch: Launch, ids: dict[str, str]) -> dict[str, str]:
    """Return an engine's environment: ours, the launch's, and our ids."""
    inherited = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    # The setproctitle library (vLLM uses it) writes titles over the environment as others see it, our ids included,
    # unless this is set.
    return {**inherited, "SPT_NOENV": "1", **launch.env, **ids}


def spawn(launch: Launch, env: dict[str, str], log: int) -> int:
    """Start a process in a session of its own and return its PID; the caller collects it when it ends.

    Both its outputs go to the descriptor ``log``; it gets no other descriptor of ours, and nothing ties it to our
    life. Raises `StartFailed`.
    """
    try:
        # Started directly and not through asyncio, whose child watchers would collect it behind our back. On Linux
        # this is a vfork: it blocks for as long as the kernel takes to load the program (measured: 0.1 to 2 ms).
        process = subprocess.Popen(
            launch.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=env,
            cwd=launch.cwd,
            start_new_session=True,
            close_fds=True,
        )
    except (OSError, ValueError, IndexError) as error:
        raise StartFailed(explain(launch, env, error), code=_code(error)) from error
    # From here on the PID alone is what we keep; this keeps the object from warning about a child it left running.
    process.returncode = 0
    return process.pid


def _code(error: Exception) -> Code:
    """Return what clients are told: only a system without room for it may start the same program later."""
    passing = isinstance(error, OSError) and error.errno in _PASSING
    return Code.MODEL_START_FAILED if passing else Code.MODEL_BROKEN


def explain(launch: Launch, env: dict[str, str], error: Exception) -> str:
    """Say why a process could not be started, and what to do."""
    if not launch.argv:
        return "the engine's command is empty; give it a program to run"
    program = launch.argv[0]
    if launch.cwd is not None and not Path(launch.cwd).is_dir():
        return f"the engine's working folder {launch.cwd} is not there or no folder; create it, or mend 'cwd'"
    found = shutil.which(program, path=env.get("PATH", os.defpath))
    where = Path(launch.cwd or ".", program) if os.sep in program else None
    match error:
        case FileNotFoundError() | NotADirectoryError() if found or (where and where.exists()):
            return (
                f"{found or program} is there, but the interpreter in its first line (or its loader) is not; "
                "install that, or name it in the command"
            )
        case FileNotFoundError() | NotADirectoryError() if where is None:
            return (
                f"there is no program '{program}' on the engine's PATH ({env.get('PATH', 'empty')}); install it, "
                "or give its full path"
            )
        case FileNotFoundError() | NotADirectoryError():
            return f"there is no program {program}; install it, or mend its path"
        case PermissionError():
            return f"{found or program} may not be run by this user; check its permissions (chmod +x) and its folder's"
        case OSError(errno=errno.ENOEXEC):
            return f"this machine can't run {found or program}: it is for another architecture, or a script without #!"
        case OSError(errno=errno.E2BIG):
            return "the engine's command line and environment together are too long for the system; shorten them"
        case OSError(errno=errno.EAGAIN | errno.ENOMEM):
            return f"the system has no room for another process ({error.strerror}); see ulimit -u, and free memory"
        case OSError(errno=errno.EMFILE | errno.ENFILE):
            return f"no file descriptors left ({error.strerror}); raise ulimit -n"
        case _:
            return f"{program} can't be started: {error}"


def explain_log(path: Path, error: OSError) -> str:
    """Say why an engine's log can't be written, and what to do."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"no space left for the engine's log {path}; free some, or move orchestrator.state_dir elsewhere"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"the engine's log {path} may not be written; check the permissions of orchestrator.state_dir"
        case errno.EMFILE | errno.ENFILE:
            return f"no file descriptors left for the engine's log ({error.strerror}); raise ulimit -n"
        case _:
            return f"the engine's log {path} can't be opened: {error.strerror}"
