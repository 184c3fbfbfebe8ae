"""From an engine's last words to a reason with a remedy: what the adapters share."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from modelswap.engines.base import Diagnosis

_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ALARM: Final = re.compile(r"error|exception|fatal|failed|cannot|can't|unable|denied|panic|abort", re.IGNORECASE)
_RAISED: Final = re.compile(r"^[\w.]*(?:Error|Exception|Exit|Interrupt)\b.*")


@dataclass(frozen=True, slots=True)
class Cause:
    """A known cause: where ``pattern`` is found, ``reason`` makes words for the user from the match.

    ``permanent`` and ``blameless``: see `Diagnosis`.
    """

    pattern: re.Pattern[str]
    reason: Callable[[re.Match[str]], str]
    permanent: bool = True
    blameless: bool = False


def cause(
    pattern: str, reason: str | Callable[[re.Match[str]], str], *, permanent: bool = True, blameless: bool = False
) -> Cause:
    """Return a `Cause`; in a ``reason`` that is text, ``{0}``, ``{1}``… are the groups of ``pattern``."""
    if isinstance(reason, str):
        template = reason
        return Cause(re.compile(pattern), lambda match: template.format(*match.groups()), permanent, blameless)
    return Cause(re.compile(pattern), reason, permanent, blameless)


COMMON: Final = (
    cause(
        r"No space left on device",
        "the disk is full; free some space (the folder of downloaded models is a good place to look)",
    ),
    cause(
        r"[Aa]ddress already in use|couldn't bind HTTP server socket",
        "its port was taken by another program; the next start uses another port",
        permanent=False,
        blameless=True,
    ),
    cause(
        r"error while loading shared libraries: (\S+): ",
        "the program lacks the shared library {0}; install it, or say where it is with env: {{LD_LIBRARY_PATH: …}}",
    ),
)


def explain(
    causes: Sequence[Cause], exit_code: int | None, log: Sequence[str], boring: re.Pattern[str] | None = None
) -> Diagnosis:
    """Return the first of ``causes`` that the log shows, else what the exit code and the last error line say.

    ``boring`` matches lines that name no cause ("see above").
    """
    lines = [clean(line) for line in log]
    text = "\n".join(lines)
    for known in (*causes, *COMMON):
        if match := known.pattern.search(text):
            return Diagnosis(known.reason(match), known.permanent, known.blameless)
    ended = _ended(exit_code)
    said = last_error([line for line in lines if not (boring and boring.search(line))])
    if exit_code == -signal.SIGILL:
        remedy = "the program was built for another processor; build or install it for this one"
        return Diagnosis(f"it {ended}: {remedy}", permanent=True)
    if exit_code == -signal.SIGKILL:
        remedy = "if `dmesg` shows 'Out of memory', the machine has too little host memory for this model"
        return Diagnosis(f"it {ended}; {remedy}" + (f" (last line: {said})" if said else ""), permanent=False)
    return Diagnosis(f"it {ended}" + (f": {said}" if said else " and said nothing"), permanent=False)


def clean(line: str) -> str:
    """Return ``line`` without colours and trailing space."""
    return _COLOUR.sub("", line).rstrip()


def last_error(lines: Sequence[str]) -> str:
    """Return the last exception, else the last line that sounds like an error, else the last line; one line, ≤ 300."""
    filled = [line.strip() for line in lines if line.strip()]
    for wanted in (_RAISED.match, _ALARM.search):
        for line in reversed(filled):
            if wanted(line):
                return line[:300]
    return filled[-1][:300] if filled else ""


def _ended(exit_code: int | None) -> str:
    if exit_code is None:
        return "did not become ready"
    if exit_code >= 0:
        return f"exited with status {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"
