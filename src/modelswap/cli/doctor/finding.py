"""What a check has found."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Level(StrEnum):
    """How bad it is: as it should be; worth knowing; likely to hurt; will not work."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(msgspec.Struct, frozen=True):
    """One thing that is so, and what to do about it; ``remedy`` is None where nothing is to be done."""

    level: Level
    message: str
    remedy: str | None = None


def fine(message: str) -> Finding:
    """Return that something is as it should be."""
    return Finding(Level.OK, message)


def note(message: str, remedy: str | None = None) -> Finding:
    """Return something worth knowing: nothing breaks by it."""
    return Finding(Level.NOTE, message, remedy)


def warning(message: str, remedy: str) -> Finding:
    """Return something that works now or here, and is likely to hurt."""
    return Finding(Level.WARNING, message, remedy)


def problem(message: str, remedy: str) -> Finding:
    """Return something that will not work."""
    return Finding(Level.PROBLEM, message, remedy)
