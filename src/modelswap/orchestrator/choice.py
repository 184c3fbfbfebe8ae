"""How a model is to be put out: stopped, or asleep at the level that promises the shortest way back. Pure decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

STOP: Final = 0


class Verdict(StrEnum):
    """What is known of a model's sleep at one level."""

    UNTRIED = "untried"
    """Nothing yet, or not yet a whole round."""
    GOOD = "good"
    OFF = "off"
    """It failed, or its answers were wrong: not used until it is calibrated anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepWay:
    """One level that a model may sleep at.

    ``seconds`` is what sleeping and waking again are expected to take together, None while that isn't measured.
    ``host`` and ``residue`` are the bytes of host and device memory that it would take beyond what is taken already.
    """

    level: int
    verdict: Verdict = Verdict.UNTRIED
    seconds: float | None = None
    host: int = 0
    residue: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The bytes that one more sleeper may take. ``device`` None: nobody can tell what the other models need there."""

    host: int
    device: int | None = None


def choose(stop_seconds: float | None, ways: Sequence[SleepWay], room: Room) -> int:
    """Return the level to sleep at, or `STOP`.

    ``stop_seconds`` is what stopping and starting again are expected to take together, by the fastest way in that there
    is (a standby's, where one waits); None while that isn't measured, and then it is stopped: there is no answer yet
    that a woken engine's could be compared with.

    Of the levels that are known to be good and fit, the fastest wins if it beats stopping. If none does, the lowest
    one that has not been measured yet is tried. The first sleep of an instance may take long (host memory is pinned
    then); it is not counted in ``seconds``, because it is paid once and for all later ones.
    """
    if stop_seconds is None:
        return STOP
    fitting = [way for way in ways if way.verdict is not Verdict.OFF and _fits(way, room)]
    known = [(way.seconds, way.level) for way in fitting if way.verdict is Verdict.GOOD and way.seconds is not None]
    if known:
        seconds, level = min(known)
        if seconds < stop_seconds:
            return level
    return min((way.level for way in fitting if way.verdict is Verdict.UNTRIED or way.seconds is None), default=STOP)


def _fits(way: SleepWay, room: Room) -> bool:
    return way.host <= room.host and (room.device is None or way.residue <= room.device)
