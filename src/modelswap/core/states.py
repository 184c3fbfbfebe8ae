"""The states of an instance, the one table of transitions between them, and whether a model is prepared."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Final

import msgspec


class InstanceState(StrEnum):
    """Where an instance is in its life (the picture is in docs/architecture.md)."""

    ABSENT = "absent"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    ASLEEP = "asleep"
    WAKING = "waking"
    STOPPING = "stopping"
    FAILED = "failed"


_S = InstanceState

TRANSITIONS: Final[dict[InstanceState, frozenset[InstanceState]]] = {
    _S.ABSENT: frozenset({_S.STARTING, _S.READY, _S.ASLEEP}),  # the latter two: adopted from an earlier orchestrator
    _S.STARTING: frozenset({_S.READY, _S.STOPPING, _S.FAILED}),
    _S.READY: frozenset({_S.DRAINING, _S.STOPPING}),
    _S.DRAINING: frozenset({_S.READY, _S.ASLEEP, _S.STOPPING}),
    _S.ASLEEP: frozenset({_S.WAKING, _S.STOPPING}),
    _S.WAKING: frozenset({_S.READY, _S.STOPPING, _S.FAILED}),
    _S.STOPPING: frozenset({_S.ABSENT, _S.FAILED}),
    _S.FAILED: frozenset({_S.ABSENT}),
}

HOLDING: Final = frozenset({_S.STARTING, _S.READY, _S.DRAINING, _S.WAKING, _S.STOPPING})
"""States in which an instance counts in full against its device's memory (except one that is stopped asleep)."""


class Preparedness(StrEnum):
    """Whether what a model's start needs without a device (image, weights, container) has been made ready."""

    NEEDED = "needed"
    UNDER_WAY = "under way"
    DONE = "done"


class Transition(msgspec.Struct, frozen=True):
    """One step in an instance's story."""

    at: float
    before: InstanceState
    after: InstanceState
    cause: str

    def __str__(self) -> str:
        return f"{self.at:.3f}: {self.before} -> {self.after} ({self.cause})"


class ForbiddenTransitionError(Exception):
    """A transition that the table doesn't have; carries the instance's story, because this is always our bug."""

    def __init__(self, instance: str, before: InstanceState, after: InstanceState, story: Sequence[Transition]) -> None:
        told = "\n  ".join(map(str, story)) or "(no transitions yet)"
        super().__init__(f"{instance}: {before} -> {after} is not allowed; its story:\n  {told}")
        self.instance = instance
        self.before = before
        self.after = after
        self.story = tuple(story)
