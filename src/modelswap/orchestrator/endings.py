"""What it means how an instance ended, which differs between a process and a container.

A container's status is that of its init: 128 + n for an engine that signal n has killed (as shells do; its runtime may
have told that apart already), and 143 or 0 for one that ``docker stop`` has asked to end.
"""

from __future__ import annotations

import signal
from typing import Final

from modelswap.engines.base import Diagnosis
from modelswap.orchestrator.hosting import Hosted
from modelswap.runtimes.base import Exit

_SIGNALLED: Final = 128
_SIGNALS: Final = 64
_STOPPED: Final = (0, -signal.SIGTERM)
"""How a container ends that ``docker stop`` has asked to."""


def exit_code(hosted: Hosted, exit_: Exit) -> int | None:
    """Return the exit code, negative for a signal, also of what ran in a container."""
    if _contained(hosted) and exit_.code is not None and _SIGNALLED < exit_.code <= _SIGNALLED + _SIGNALS:
        return _SIGNALLED - exit_.code
    return exit_.code


def _ended_from_outside(hosted: Hosted, exit_: Exit) -> bool:
    """Return whether somebody ended one that starts, which says nothing about the model.

    An engine doesn't send itself signals, and none is done before it has served.
    """
    if exit_.oom:
        return False
    code = exit_code(hosted, exit_)
    return code == -signal.SIGKILL or (_contained(hosted) and code in _STOPPED)


def death(hosted: Hosted, exit_: Exit) -> str:
    """Return in words how an instance ended that we had not told to."""
    if not _contained(hosted) or exit_.code is None:
        return f"{hosted.model} died: its engine {exit_}"
    status = f"exit status {_status(exit_.code)}"
    if exit_.oom:
        return f"{hosted.model} died: its engine {exit_} ({status})"
    code = exit_code(hosted, exit_)
    if code in _STOPPED:
        return f"{hosted.model} was stopped from outside ({status}), as by `docker stop`"
    if code == -signal.SIGKILL:
        return f"{hosted.model} was killed from outside ({status}), as by `docker kill` or for want of host memory"
    return f"{hosted.model} died: its engine {Exit(code)}" + (f" ({status})" if code != exit_.code else "")


def failed_start(hosted: Hosted, exit_: Exit, found: Diagnosis) -> Diagnosis:
    """Return why a start failed, in words: what the engine's log shows (``found``), and how its container ended."""
    reason = found.reason
    if exit_.oom:
        reason = f"its container reached its memory limit and was killed; give it more memory ({found.reason})"
    if _contained(hosted) and exit_.code is not None and (status := f"status {_status(exit_.code)}") not in reason:
        reason = f"{reason} (exit {status})"
    permanent = found.permanent and not exit_.oom
    return Diagnosis(
        f"{hosted.model} failed to start: {reason}",
        permanent,
        blameless=not permanent and (found.blameless or _ended_from_outside(hosted, exit_)),
    )


def _status(code: int) -> int:
    """Return an exit code as `docker ps` shows it."""
    return _SIGNALLED - code if code < 0 else code


def _contained(hosted: Hosted) -> bool:
    return hosted.running is not None and bool(hosted.running.container)
