"""Runs the checks side by side; none of them can hurt another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from modelswap.cli.doctor.finding import Finding, Level, warning
from modelswap.cli.doctor.scene import Scene, ToldElsewhere

LIMIT: Final = 15.0
"""How long a check may take, in seconds."""


@dataclass(frozen=True, slots=True)
class Check:
    """A check of the subject ``group``; ``what`` it looks at, in words for when it can't."""

    group: str
    what: str
    look: Callable[[Scene], Awaitable[list[Finding]]]
    limit: float = LIMIT


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, by group in their order. ``hung``: something did not come back in time, and still blocks."""

    groups: dict[str, list[Finding]]
    hung: bool = False

    @property
    def findings(self) -> list[Finding]:
        """All of it, in order."""
        return [finding for findings in self.groups.values() for finding in findings]

    def count(self, level: Level) -> int:
        """Return how many findings are of ``level``."""
        return sum(finding.level is level for finding in self.findings)


async def examine(scene: Scene, checks: Iterable[Check]) -> Report:
    """Make all the checks at once, and return what they found, in their order."""
    checks = list(checks)
    results = await asyncio.gather(*(_one(scene, check) for check in checks))
    groups: dict[str, list[Finding]] = {}
    for check, (findings, _) in zip(checks, results, strict=True):
        groups.setdefault(check.group, []).extend(findings)
    return Report({group: found for group, found in groups.items() if found}, any(hung for _, hung in results))


async def _one(scene: Scene, check: Check) -> tuple[list[Finding], bool]:
    try:
        async with asyncio.timeout(check.limit):
            return await check.look(scene), False
    except ToldElsewhere:
        return [], False
    except TimeoutError:
        message = f"{check.what}: no answer within {check.limit:g} s"
        return [
            warning(message, "something it asks hangs; see whether `docker ps`, `nvidia-smi` and `df` answer")
        ], True
    except Exception as bug:  # noqa: BLE001 - the other checks are worth as much without this one
        message = f"{check.what} could not be looked at: {type(bug).__name__}: {bug}"
        return [warning(message, "if it isn't obvious why, this is a bug in modelswap: please report it")], False
