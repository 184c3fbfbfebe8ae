"""What decides how fast each model comes in: its ways, what was measured of them, its weights, the host's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from modelswap.cli.doctor import mechanisms, weights
from modelswap.cli.doctor.mechanisms import Around, NotHere, Row, Way
from modelswap.cli.doctor.scene import Scene, ToldElsewhere, in_thread
from modelswap.engines.base import Address, Place
from modelswap.engines.programs import local
from modelswap.orchestrator import hostmemory, sleepers
from modelswap.orchestrator.measurements import COLD, kept_in, table
from modelswap.orchestrator.state import DATABASE, state_dir
from modelswap.protocol.errors import ModelswapError
from modelswap.spec.config import Model
from modelswap.spec.digest import definition
from modelswap.weights import cache

_ADDRESS: Final = Address("0.0.0.0", 1)


@dataclass(frozen=True, slots=True)
class Kept:
    """Weights of ``size`` bytes, and the file or folder here that they lie in; None where that can't be seen."""

    size: int
    place: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model that takes turns on the device.

    ``args`` and ``env`` are its engine's: of somebody else's container as that was made. ``rows`` are its measurements.
    ``cpu``: its engine is known to be a build for CPUs.
    """

    name: str
    model: Model
    standby: Way
    sleep: Way
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    weights: tuple[Kept, ...] = ()
    cpu: bool = False

    @property
    def size(self) -> int | None:
        """The bytes of all its weights; None where nothing is known of them."""
        return sum(kept.size for kept in self.weights) or None

    def seconds(self, *ways: str) -> float | None:
        """Return the shortest measured time of these ways; None if none was measured."""
        times = {row["mechanism"]: row["steady_seconds"] or row["first_seconds"] for row in self.rows}
        return min((times[way] for way in ways if times.get(way) is not None), default=None)

    @property
    def cold(self) -> float | None:
        """The measured seconds of a cold start."""
        return self.seconds(COLD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subjects:
    """All of them. ``room`` is what sleepers and standbys may take of the host's memory of ``total`` bytes.

    ``readable``: the device's memory can be read.
    """

    models: Sequence[Subject]
    room: int
    total: int
    readable: bool


async def look(scene: Scene) -> Subjects:
    """Find it all out; raises `ToldElsewhere` where no model takes turns on a device."""
    models = scene.config.models
    if not any(model.device == "gpu" for model in models.values()):
        raise ToldElsewhere
    status = await scene.status() or {}
    measured = await _measured(scene)
    kept = await _weights(scene)
    readable = (await scene.gpu()).reading is not None
    room = _room(scene, status)
    found = []
    for name, model in models.items():
        if model.device != "gpu":
            continue
        rows = [row for row in measured if row["model"] == name]
        told = await _container(scene, name, model) if model.runtime == "adopted" else None
        seen = told or model
        standbys = status.get("standbys") or ()
        size = sum(each.size for each in kept.get(name, ())) or None
        cpu = await in_thread(lambda name=name, model=model: mechanisms.cpu_build(name, model))  # type: ignore[misc]
        around = Around(room=room, readable=readable, weights=size, cpu=cpu)
        found.append(
            Subject(
                name=name,
                model=model,
                standby=await mechanisms.standby(name, models, Images(scene), standbys, room),
                sleep=mechanisms.sleep(name, model, told, around, rows),
                args=seen.args,
                env=seen.env,
                rows=rows,
                weights=tuple(kept.get(name, ())),
                cpu=cpu,
            )
        )
    return Subjects(models=found, room=room, total=int(psutil.virtual_memory().total), readable=readable)


async def _measured(scene: Scene) -> list[Row]:
    """Return what a running orchestrator says that it measured, else what one has left in its database."""
    status = await scene.status()
    if status is not None:
        return list(status.get("measurements") or ())
    database = state_dir(scene.config, scene.env) / DATABASE
    definitions = [(name, definition(name, model)) for name, model in scene.config.models.items()]
    return await in_thread(lambda: list(table(kept_in(database), definitions)))


def _room(scene: Scene, status: Mapping[str, Any]) -> int:
    """Return what may be spent on being quick, as the orchestrator reckons it; what is spent already is in it."""
    told = status.get("host_memory")
    if told is not None:
        return int(told["spare"]) + int(told["spent"])
    given = scene.config.device.host_memory
    total = int(psutil.virtual_memory().total)
    return hostmemory.spare(None if given is None else int(given), 0, hostmemory.available(), total)


async def _container(scene: Scene, name: str, model: Model) -> Model | None:
    try:
        return mechanisms.as_ours(model, await scene.container(name, model))
    except (ToldElsewhere, ModelswapError):  # its own check tells
        return None


class Images:
    """Where containers would be made (`standing_by.Places`)."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    async def allocate(self, spec: Model) -> Place:
        """Return what the image starts by itself; raises `NotHere`."""
        try:
            image = await self._scene.image(spec.image or "")
        except ToldElsewhere:
            raise NotHere("Docker can't be asked for its image") from None
        if image is None:
            raise NotHere("its image is not here yet")
        return Place(_ADDRESS, image.entrypoint if spec.entrypoint is None else tuple(spec.entrypoint))


async def _weights(scene: Scene) -> dict[str, list[Kept]]:
    """Return the weights of each model, as far as their size is known or can be guessed from a name."""
    found: dict[str, list[Kept]] = {}
    for wanted in await weights.wanted_repos(scene):
        if not wanted.repo.weights:
            continue
        kept, hub = weights.Kept(0, missing=True), wanted.hub
        if hub is not None:
            kept = await in_thread(lambda hub=hub, wanted=wanted: weights.kept_in(hub, wanted.repo))  # type: ignore[misc]
        if not kept.missing and hub is not None:
            found.setdefault(wanted.model, []).append(Kept(kept.bytes, cache.folder_of(wanted.repo.repo, hub)))
        elif (guessed := weights.guess(wanted.repo.repo)) is not None:
            found.setdefault(wanted.model, []).append(Kept(guessed))
    for name, model in scene.models("process").items():
        with contextlib.suppress(OSError):
            size = await in_thread(lambda model=model: sleepers.weights_on_disk(model))  # type: ignore[misc]
            if size is not None and (path := local(model.model or "", model)) is not None:
                found[name] = [Kept(size, (model.cwd or Path()) / path)]
    return found
