"""Which of the quick ways in and out a model can use, and why not the others.

The conditions are the orchestrator's own: `standing_by.plan` and the engines' ``sleep_levels`` are asked, with what is
in the way taken away, to find out what that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from modelswap.cli.words import off, size
from modelswap.engines import options
from modelswap.engines.base import Address, Engine
from modelswap.engines.registry import engine_for
from modelswap.orchestrator import abilities, sleepers, standing_by
from modelswap.orchestrator.measurements import COLD, sleeping
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.docker import sharing
from modelswap.runtimes.docker.inspected import command_of
from modelswap.spec.config import EngineName, Model

Row = Mapping[str, Any]
"""A row of `modelswap.orchestrator.measurements.table`."""

SAY_SLEEP: Final = "say sleep: on"
MAKE_IT_OURS: Final = "have modelswap make the container (image: in its place)"
_ADDRESS: Final = Address("127.0.0.1", 1)
_OFF: Final = ("", "0")


class Verdict(StrEnum):
    """Whether a mechanism is used for a model, and if not, who could change that."""

    USED = "used"
    SETTLED = "settled"
    """Not: the user has said so, the engine has no such thing, or there is nothing to gain."""
    MISSED = "missed"
    """Not: something is missing that could be there."""
    BROKEN = "broken"
    """Not, although the config says so: it will fail."""


@dataclass(frozen=True, slots=True)
class Way:
    """What is known of one mechanism of one model: ``why`` it isn't used, and what would ``help``.

    ``common``: that is likely to be the same for other models, and told of all together.
    """

    verdict: Verdict
    why: str = ""
    help: str = ""
    levels: tuple[int, ...] = ()
    common: bool = False

    @property
    def used(self) -> bool:
        """Whether it is."""
        return self.verdict is Verdict.USED


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What sleep depends on beside the model itself.

    ``room`` is the bytes of host memory that sleepers may take in all, ``weights`` the model's bytes, None where that
    isn't known. ``readable``: the device's memory can be read. ``cpu``: its engine is a build for CPUs.
    """

    room: int
    readable: bool
    weights: int | None = None
    cpu: bool = False


def as_ours(model: Model, inspected: Mapping[str, Any]) -> Model:
    """Return somebody else's container as a model that we would start with the same command and environment."""
    return abilities.as_ours(model, command_of(inspected), sharing.environment(inspected))


class NotHere(ModelswapError):
    """Raised by `standing_by.Places` for an image that isn't here, or that nobody can be asked for; it says which."""


async def standby(
    name: str,
    models: Mapping[str, Model],
    places: standing_by.Places,
    states: Sequence[Mapping[str, Any]],
    room: int,
) -> Way:
    """Judge whether a standby is kept for a model.

    ``places`` raises `NotHere`; ``states`` are the running orchestrator's standbys (`runtimes.base.StandbyState` as
    plain data), ``room`` the bytes of host memory that sleepers and standbys may take.
    """
    model = models[name]
    engine = engine_for(model.engine)
    if model.engine not in standing_by.CAN_STAND_BY:
        return Way(Verdict.SETTLED, f"{model.engine} has none")
    if not standing_by.take_turns(models):
        return Way(Verdict.SETTLED, "there is no other model to take turns with")
    if not model.standby:
        return Way(Verdict.SETTLED, "standby: false")
    if model.runtime == "adopted":
        return Way(Verdict.MISSED, "its command is fixed", MAKE_IT_OURS, common=True)
    try:
        plan = await standing_by.plan(name, model, engine, places)
    except NotHere as unseen:
        return Way(Verdict.SETTLED, str(unseen))
    except ModelswapError:  # the config's own check tells
        return Way(Verdict.SETTLED, "it can't be started here")
    if plan is None:
        help_ = "say which Python that is: program: [/path/to/venv/bin/python, -m, vllm.entrypoints.openai.api_server]"
        return Way(Verdict.MISSED, "its command doesn't tell which Python it runs in", help_)
    state = next((state for state in states if state.get("key") == plan.key), None)
    if state is not None and state.get("problem"):
        return Way(Verdict.MISSED, str(state["problem"]), "see the orchestrator's log")
    if state is None and room < standing_by.USUAL_BYTES:
        told = f"it takes about {size(standing_by.USUAL_BYTES)} of host memory, and {size(max(room, 0))} may be spent"
        return Way(Verdict.MISSED, told, "raise device.host_memory, or free host memory")
    return Way(Verdict.USED)


def sleep(name: str, model: Model, told: Model | None, around: Around, rows: Sequence[Row]) -> Way:
    """Judge whether a model can sleep.

    ``told`` is an adopted container `as_ours`, None if it can't be looked at; ``rows`` are the model's measurements.
    """
    engine = engine_for(model.engine)
    if not levels_if_willing(Model(engine=model.engine, model="x", image="x")):
        return Way(Verdict.SETTLED, f"{model.engine} has none")
    if model.sleep == "off":
        return Way(Verdict.SETTLED, "sleep: off")
    if model.sleep != "on" and options.given((told or model).args, "--no-enable-sleep-mode"):
        return Way(Verdict.SETTLED, "its command says --no-enable-sleep-mode")
    if not (levels := levels_if_willing(told or model)):
        return Way(Verdict.SETTLED, "it makes no text by which its answers could be compared after waking")
    if (lacking := _lacking(name, engine, model, told, around)) is not None:
        return lacking
    return _measured(levels, around, rows)


def _lacking(name: str, engine: Engine, model: Model, told: Model | None, around: Around) -> Way | None:
    """Return why a model can't sleep as it is started; None if it can."""
    if around.cpu:
        verdict = Verdict.BROKEN if model.sleep == "on" else Verdict.SETTLED
        return Way(verdict, "its vLLM is a build for CPUs, which has none", f"leave out models.{name}.sleep")
    theirs = model.runtime == "adopted"
    if theirs and told is None:
        return Way(Verdict.SETTLED, "its container can't be looked at")
    missing = _missing(model.engine, told or model)
    if theirs and missing and model.sleep == "on":
        help_ = f"add {missing}, and make the container anew; or leave out models.{name}.sleep"
        return Way(Verdict.BROKEN, f"its command lacks {missing}", help_)
    if not around.readable:
        return Way(Verdict.SETTLED, "the device's memory can't be read, so nobody could see it come back")
    if theirs and missing:
        help_ = f"add {missing}, and make the container anew"
        return Way(Verdict.MISSED, f"its command lacks {missing}", help_, common=True)
    if theirs or engine.sleep_levels(model):
        return None
    return Way(Verdict.MISSED, f"it is started without {missing}", SAY_SLEEP, common=True)


def _measured(levels: tuple[int, ...], around: Around, rows: Sequence[Row]) -> Way:
    """Judge by what was measured, and by the host memory that there is."""
    known = {row["mechanism"]: row for row in rows}
    # What `measurements.answered` notes when two cold starts disagree; a reference takes it back.
    if (cold := known.get(COLD)) and cold["reason"] and not cold["reference_tokens"]:
        return Way(Verdict.SETTLED, str(cold["reason"]))
    good = tuple(level for level in levels if known.get(sleeping(level), {}).get("ok") is not False)
    if not good:
        return Way(Verdict.MISSED, "; ".join(off(rows)), "see why in its log, then modelswap calibrate")
    host = {level: _host_bytes(level, around, known) for level in good}
    fitting = tuple(level for level in good if host[level] <= around.room)
    if fitting:
        return Way(Verdict.USED, levels=fitting)
    least = size(min(host.values()))
    return Way(
        Verdict.MISSED,
        f"asleep it takes about {least} of host memory, and {size(max(around.room, 0))} may be spent",
        "raise device.host_memory, or free host memory",
    )


def pinned(weights: int | None) -> int | None:
    """Return about what host memory a model takes asleep at level 1 before that is measured."""
    return None if weights is None else int(weights * sleepers.PINNED) + sleepers.USUAL_PROCESS


def _host_bytes(level: int, around: Around, known: Mapping[str, Row]) -> int:
    measured = known.get(sleeping(level), {}).get("host_bytes")
    if measured is not None:
        return int(measured)
    return (pinned(around.weights) or 0) if level == 1 else 0


def needs(engine: EngineName) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the flags and variables that an engine is started with so that it can sleep."""
    plain = Model(engine=engine, model="x", image="x")
    without, willing = (engine_for(engine).launch("x", each, _ADDRESS, ()) for each in (plain, _willing(plain)))
    flags = tuple(word for word in willing.argv if word not in without.argv)
    return flags, {key: value for key, value in willing.env.items() if key not in without.env}


def _missing(engine: EngineName, told: Model) -> str:
    """Return what a container's command and environment lack for it to sleep; empty if that is nothing."""
    flags, env = needs(engine)
    missing = [flag for flag in flags if not options.given(told.args, flag)]
    missing += [f"{key}={value}" for key, value in env.items() if told.env.get(key, "").strip() in _OFF]
    return " and ".join(missing)


def levels_if_willing(model: Model) -> tuple[int, ...]:
    """Return at which levels a model could sleep if it were started so that it can."""
    return engine_for(model.engine).sleep_levels(_willing(model))


def _willing(model: Model) -> Model:
    return model.model_copy(update={"sleep": "on", "device": "gpu"})


def cpu_build(name: str, model: Model) -> bool:
    """Return whether a process of this model runs vLLM's CPU build, which ends at once when it is to sleep.

    As vLLM 0.32 finds it out (`platforms/__init__.py`): by its version, or by the name of its distribution. Blocks.
    """
    if model.runtime != "process":
        return False
    engine = engine_for(model.engine)
    try:
        plan = engine.standby(model, engine.launch(name, model, _ADDRESS))
    except ModelswapError:
        return False
    python = plan.python if plan is not None else ()
    prefixes = [Path(word).parent.parent for word in python if Path(word).name.startswith("python")]
    found = (lib for prefix in prefixes for lib in prefix.glob("lib/python3*/site-packages/vllm*.dist-info"))
    return any("cpu" in folder.name for folder in found)
