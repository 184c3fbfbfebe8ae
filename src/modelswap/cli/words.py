"""Numbers and states in words and colours for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from rich.text import Text

NONE: Final = "-"

_STATE_STYLES: Final = {
    "ready": "green",
    "starting": "yellow",
    "waking": "yellow",
    "draining": "yellow",
    "stopping": "yellow",
    "asleep": "blue",
    "failed": "bold red",
    "absent": "dim",
}
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def duration(seconds: float | None) -> str:
    """Return a duration with the precision that people care for."""
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"


def ago(seconds: float) -> str:
    """Return how long ago something was, roughly."""
    return f"{seconds:.0f} s" if seconds < 120 else duration(seconds)


def size(count: int | None) -> str:
    """Return a number of bytes in binary units."""
    if count is None:
        return NONE
    value = float(count)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError(value)


def state(name: str) -> Text:
    """Return an instance's state in its colour."""
    return Text(name, _STATE_STYLES.get(name, ""))


def way(level: int) -> str:
    """Return how a model is put out that sleeps at ``level``, 0 if it is stopped."""
    return f"sleep, level {level}" if level else "stop"


def off(measurements: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return which mechanisms were found to fail, and why, from the rows of a model's measurements."""
    return [f"{row.get('mechanism')} is off: {row.get('reason')}" for row in measurements if row.get("ok") is False]


def step(calibrating: dict[str, Any]) -> str:
    """Return in words what a calibration is doing."""
    number = f"{calibrating.get('step')} of {calibrating.get('steps')}"
    return f"{calibrating.get('model')}: {calibrating.get('doing')} ({number})"


def phase(swap: dict[str, Any]) -> str:
    """Return in words what a swap under way is doing."""
    source, target = swap.get("source"), swap.get("target")
    words = {
        "drain": f"waiting for running requests of {source}",
        "out": f"putting out {source}",
        "release": "waiting for the device's memory",
        "in": f"bringing in {target}",
    }
    now = str(swap.get("phase"))
    return words.get(now, now)
