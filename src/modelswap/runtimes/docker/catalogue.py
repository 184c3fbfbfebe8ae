"""Which containers are of which configured model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import aiodocker
import msgspec
import structlog

from modelswap.runtimes.base import Known, StartFailed
from modelswap.runtimes.docker import body
from modelswap.runtimes.docker.client import Trouble, failure, persistently
from modelswap.runtimes.docker.compose import SERVICE
from modelswap.runtimes.docker.finding import Ambiguous, NoSuchContainer, find_adopted, forbid_restarts
from modelswap.runtimes.docker.inspected import Inspected, exposed_by, labels_of, name_of
from modelswap.runtimes.docker.sharing import shares_cache
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import EngineName, Model

_log = structlog.get_logger(__name__)


class Belonging(msgspec.Struct, frozen=True):
    """What a container is to us: ``port`` is where its engine listens in it.

    ``current``: the model is configured, and this is how. Otherwise it carries our labels and nobody wants it.
    """

    model: str
    definition: str
    port: int
    current: bool


class Catalogue:
    """The configured models, and how to tell their containers.

    ``owner`` is what ours are labelled with, ``project`` the config's compose project; ``port_of`` tells where an
    engine listens if nobody says otherwise.
    """

    def __init__(
        self,
        docker: aiodocker.Docker,
        around: Surroundings,
        *,
        owner: str,
        project: str | None,
        port_of: Callable[[EngineName], int],
    ) -> None:
        self._docker = docker
        self._around = around
        self._owner = owner
        self._project = project
        self._port_of = port_of
        self._forbidding = asyncio.Lock()
        self.models: Mapping[str, Known] | None = None
        """By name; None until the first `configure`."""
        self._sharing: dict[tuple[str | None, str | None], bool] = {}

    def configure(self, models: Mapping[str, Known]) -> None:
        """Learn which models there are."""
        self.models = dict(models)

    def adopted(self) -> list[str]:
        """Return the models whose containers somebody else makes."""
        return [name for name, known in (self.models or {}).items() if known.spec.runtime == "adopted"]

    async def find(self, name: str, spec: Model) -> Inspected:
        """Return an adopted model's container, which Docker doesn't start by itself from now on.

        Raises `NoSuchContainer`, `Ambiguous`, `DockerAway`, and `StartFailed` if Docker doesn't let us look.
        """
        async with self._forbidding:  # it is said once, whoever finds it first
            found = await self._find(name, spec)
            self._sharing[spec.container, spec.compose_service] = shares_cache(found, self._around.hf_cache)
            try:
                changed = await persistently(
                    lambda: forbid_restarts(self._docker, found), f"setting the restart policy of {name_of(found)}"
                )
            except aiodocker.DockerError as error:
                _log.error(
                    "restart policy can't be set to 'no': Docker may start this engine behind our back",
                    model=name,
                    container=name_of(found),
                    reason=str(error),
                )
                return found
        if changed:
            _log.warning(
                "restart policy set to 'no': Docker would have started this engine behind our back; say "
                '`restart: "no"` in its compose file',
                model=name,
                container=name_of(found),
                was=found["HostConfig"]["RestartPolicy"]["Name"],
            )
        return found

    def shares_cache(self, spec: Model) -> bool:
        """Return whether an adopted model's container loads its weights from our cache, as it was when last found."""
        return self._sharing.get((spec.container, spec.compose_service), False)

    async def forbid_restarts(self, names: list[str]) -> None:
        """Have Docker start none of these adopted models by itself; of those that it can't, tell the log."""
        for name in names:
            known = (self.models or {}).get(name)
            if known is None:
                continue
            try:
                await self.find(name, known.spec)
            except NoSuchContainer as missing:
                _log.info("not there yet", model=name, reason=str(missing))
            except (Ambiguous, StartFailed) as error:
                _log.warning("its container can't be told", model=name, reason=str(error))

    def candidates(self, container: str, names: list[str], labels: Mapping[str, str]) -> list[str]:
        """Return the models that a container may be of, by what an event or a list tells of it; quick."""
        if body.STANDBY in labels:
            return []  # only our records say whose it has become
        if labels.get(body.OWNER) == self._owner:
            return [labels.get(body.MODEL, "")]
        return [
            name
            for name, known in (self.models or {}).items()
            if known.spec.runtime == "adopted" and _may_be(known.spec, container, names, labels)
        ]

    async def belonging(self, inspected: Inspected) -> Belonging | None:
        """Return what a container is to us; None if nothing. Lets what calls raise through."""
        labels, models = labels_of(inspected), self.models or {}
        if body.STANDBY in labels:
            return None
        if labels.get(body.OWNER) == self._owner:
            model, definition = labels.get(body.MODEL, ""), labels.get(body.DEFINITION, "")
            known = models.get(model)
            current = known is not None and known.spec.runtime == "managed" and known.definition == definition
            port = self.port(known.spec, inspected) if known is not None else min(exposed_by(inspected), default=0)
            return Belonging(model, definition, port, current)
        for name in self.candidates(inspected["Id"], [name_of(inspected)], labels):
            known = models[name]
            try:
                found = await self._find(name, known.spec)
            except (NoSuchContainer, Ambiguous):
                continue
            if found["Id"] == inspected["Id"]:
                return Belonging(name, known.definition, self.port(known.spec, inspected), current=True)
        return None

    def port(self, spec: Model, inspected: Inspected) -> int:
        """Return where the engine in a container listens."""
        return body.container_port(spec, exposed_by(inspected), self._port_of(spec.engine))

    async def _find(self, name: str, spec: Model) -> Inspected:
        try:
            return await persistently(
                lambda: find_adopted(self._docker, name, spec, self._around, self._project),
                f"looking for the container of {name}",
            )
        except Trouble as error:
            raise failure(error, f"to look for the container of {name}") from error


def _may_be(spec: Model, container: str, names: list[str], labels: Mapping[str, str]) -> bool:
    if spec.container is None:
        return labels.get(SERVICE) == spec.compose_service
    wanted = spec.container.removeprefix("/")
    return wanted in (name.removeprefix("/") for name in names) or container.startswith(wanted)
