"""How a command ends: exit codes, and failures told in one line with their remedy."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the shell sees; every command's ``--help`` lists them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_READY = 4
    INTERRUPTED = 130


class Failure(Exception):
    """Ends a command with ``code``; ``str(failure)`` says what happened, ``remedy`` what to do about it."""

    def __init__(self, message: str, remedy: str | None = None, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.code = code
