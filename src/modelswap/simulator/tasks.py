"""What the orchestrator's shell does in the background."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The effects that take time, and the news that come by themselves."""

    BRING_IN = "bring in"
    PUT_OUT = "put out"
    VERIFY = "verify released"
    PROBE = "probe"
    NOTICE_DEATH = "notice death"
    SLEEP = "sleep"
    WAKE = "wake"
    PREPARE = "prepare"
    TURN_AWAY = "turn away"


@dataclass(slots=True, eq=False)
class Task:
    """One of them. ``subject`` is an instance, a device for `Kind.VERIFY`, a model for `Kind.PREPARE`."""

    id: int
    kind: Kind
    subject: str
    model: str
    kill: bool = False
