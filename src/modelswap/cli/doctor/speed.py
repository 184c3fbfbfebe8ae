"""How fast models come in: which ways each can use, what the others would need, and what their lack costs."""

from __future__ import annotations

from collections.abc import Iterator

from modelswap.cli.check import host_of
from modelswap.cli.doctor import hints
from modelswap.cli.doctor.finding import Finding, fine, note, problem, warning
from modelswap.cli.doctor.mechanisms import Verdict, Way
from modelswap.cli.doctor.scene import Scene
from modelswap.cli.doctor.subjects import Subject, look
from modelswap.cli.words import duration
from modelswap.orchestrator.measurements import STANDBY, waking


async def ways(scene: Scene) -> list[Finding]:
    """Tell each model's ways in, then what would help several of them."""
    subjects = await look(scene)
    told = [of_model(subject) for subject in subjects.models]
    return told + await hints.of(subjects)


def of_model(subject: Subject) -> Finding:
    """Tell in a line how a model comes in, and why not otherwise."""
    model = f"{subject.name} ({host_of(subject.model)})"
    message = "; ".join((f"{model}: {', else '.join(_ways(subject))}", *_reasons(subject)))
    if subject.sleep.verdict is Verdict.BROKEN:
        # A CPU build ends at once when it is to sleep; another one that can't is stopped instead.
        return (problem if subject.cpu else warning)(f"{message}, but sleep: on is said", subject.sleep.help)
    missed = [way for way in (subject.standby, subject.sleep) if way.verdict is Verdict.MISSED]
    remedies = [way.help for way in missed if not way.common]
    if remedies or (missed and not (subject.standby.used or subject.sleep.used)):
        return note(message, "; ".join(remedies) or None)
    return fine(message)


def _ways(subject: Subject) -> Iterator[str]:
    if subject.sleep.used:
        levels = subject.sleep.levels
        told = " or ".join(map(str, levels))
        yield f"woken from sleep, level {told}{figure(subject.seconds(*map(waking, levels)))}"
    if subject.standby.used:
        yield f"from a standby{figure(subject.seconds(STANDBY))}"
    alone = not (subject.sleep.used or subject.standby.used)
    yield f"cold{' each time' if alone else ''}{figure(subject.cold)}"


def _reasons(subject: Subject) -> Iterator[str]:
    none = f"{subject.model.engine} has none"
    if subject.standby.why == subject.sleep.why == none:
        yield f"{subject.model.engine} has neither standby nor sleep"
        return
    yield from _reason("standby", subject.standby)
    yield from _reason("sleep", subject.sleep)


def _reason(what: str, way: Way) -> Iterator[str]:
    if not way.used:
        yield f"no {what}: {way.why}"


def figure(seconds: float | None) -> str:
    """Return a measured time in brackets; nothing where there is none, which is told of once for all models."""
    return "" if seconds is None else f" (measured {duration(seconds)})"
