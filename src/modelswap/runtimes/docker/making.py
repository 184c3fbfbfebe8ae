"""Managed containers: made ahead of a start, used again while they are what would be made now, removed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import aiodocker
import structlog

from modelswap.devices.amdcards import Nodes
from modelswap.engines.base import Address, Place, StandbyPlan
from modelswap.protocol.errors import Code
from modelswap.runtimes.base import Known, NotPrepared, StartFailed, StartOrder
from modelswap.runtimes.docker import api, body, compiled
from modelswap.runtimes.docker.client import SLOW, START_SECONDS, failure, persistently, says
from modelswap.runtimes.docker.images import Image, local_image
from modelswap.runtimes.docker.inspected import Inspected, is_running, labels_of, name_of
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.runtimes.ports import Ports
from modelswap.spec.config import EngineName, Model

ANYWHERE: Final = "0.0.0.0"
"""Where engines listen in their containers."""
_ENDED: Final = ("created", "exited", "dead")

_log = structlog.get_logger(__name__)


class Maker:
    """Makes, finds and removes the containers of one state folder (``owner``).

    ``gpu`` is the index of the config's device; ``amd`` are all AMD GPUs if it is one; ``port_of`` tells where an
    engine listens if nobody says otherwise.
    """

    def __init__(
        self,
        docker: aiodocker.Docker,
        around: Surroundings,
        ports: Ports,
        *,
        gpu: int,
        amd: Sequence[Nodes] = (),
        owner: str,
        port_of: Callable[[EngineName], int],
    ) -> None:
        self._docker = docker
        self._around = around
        self._ports = ports
        self._gpu = gpu
        self._amd = amd
        self._owner = owner
        self._port_of = port_of
        self._told: set[str] = set()

    async def place(self, spec: Model) -> Place:
        """Return where an engine is to listen in its container, and what its image starts; raises `NotPrepared`."""
        image = await self._image(spec)
        program = image.entrypoint if spec.entrypoint is None else tuple(spec.entrypoint)
        port = body.container_port(spec, image.ports, self._port_of(spec.engine))
        return Place(Address(ANYWHERE, port), program)

    async def find(self, order: StartOrder) -> tuple[Inspected | None, bool]:
        """Return a model's container, if there is one, and whether it is what `make` would make.

        Raises `NotPrepared` without its image, `StartFailed` if a stranger has its name.
        """
        image = await self._image(order.spec)
        name = body.container_name(order.model)
        found = await persistently(lambda: api.inspect(self._docker, name), f"looking for container {name}")
        if found is None:
            return None, False
        labels = labels_of(found)
        owner = labels.get(body.OWNER)
        if owner != self._owner and (owner is None or is_running(found)):
            # Another state folder's that doesn't run is nobody's: only one orchestrator works with a Docker.
            whose = "isn't made by modelswap" if owner is None else "belongs to a modelswap with another state folder"
            raise StartFailed(
                f"there is a container {name} already, and it {whose}; remove it (docker rm -f {name}), or give it "
                f"another name (docker rename {name} NAME)"
            )
        return found, _alike(labels, self._body(order, image, published=1)["Labels"])

    async def make(self, order: StartOrder) -> Inspected:
        """Make a model's container, and return it; raises `NotPrepared` and `StartFailed`."""
        image = await self._image(order.spec)
        name = body.container_name(order.model)
        # Reached by its address where we share a network with it.
        published = None if self._around.network else self._ports.take()
        wanted = self._body(order, image, published)
        self._tell_if_barred(order.spec, image)
        try:
            made = await persistently(
                lambda: api.call(
                    self._docker, "POST", "containers/create", params={"name": name}, body=wanted, timeout=SLOW
                ),
                f"making container {name}",
                limit=START_SECONDS,
            )
        except aiodocker.DockerError as error:
            if error.status == 409 and (raced := await self._just_made(name, wanted["Labels"])) is not None:
                return raced
            raise _not_made(error, name, order.spec) from error
        found = await persistently(lambda: api.inspect(self._docker, made["Id"]), f"looking at container {name}")
        if found is None:
            raise StartFailed(f"container {name} was removed just after it had been made")
        _log.info("container made", model=order.model, container=name)
        return found

    async def standby_body(self, plan: StandbyPlan, spec: Model, *, published: bool) -> dict[str, Any]:
        """Return what a container is made of in which ``plan`` waits, ``published`` at a port taken now.

        Raises `NotPrepared` without its image, `StartFailed` without a port.
        """
        image = await self._image(spec)
        port = body.container_port(spec, image.ports, self._port_of(spec.engine))
        number = None if self._around.network else self._ports.take() if published else 1
        return body.standby_body(
            plan,
            spec,
            image,
            self._around,
            port=port,
            published=number,
            gpu=self._gpu,
            amd=self._amd,
            owner=self._owner,
        )

    async def remove(self, inspected: Inspected) -> None:
        """Remove a container of ours that doesn't run; raises `ModelswapError`."""
        name = name_of(inspected)
        try:
            await persistently(
                lambda: api.call(
                    self._docker, "DELETE", f"containers/{inspected['Id']}", params={"v": "1"}, timeout=SLOW
                ),
                f"removing container {name}",
                limit=START_SECONDS,
            )
        except aiodocker.DockerError as error:
            if error.status == 404 or says(error, "is already in progress"):
                await self._gone(inspected["Id"])
                return
            raise failure(error, f"to remove container {name}") from error
        _log.info("container removed", container=name)

    async def remove_outdated(self, models: Mapping[str, Known]) -> None:
        """Remove our containers that don't run and whose model is gone or another; raises as calls do."""
        listed = await persistently(
            lambda: api.call(
                self._docker,
                "GET",
                "containers/json",
                params={"all": "1", "filters": api.filters(label=[f"{body.OWNER}={self._owner}"])},
            ),
            "listing containers",
        )
        for each in listed:
            labels = each["Labels"]
            if body.STANDBY in labels:
                continue
            known = models.get(labels.get(body.MODEL, ""))
            current = known is not None and known.spec.runtime == "managed"
            if current and known is not None and known.definition == labels.get(body.DEFINITION):
                continue
            if each["State"] in _ENDED:
                await self.remove({"Id": each["Id"], "Name": (each["Names"] or [each["Id"][:12]])[0]})

    def _body(self, order: StartOrder, image: Image, published: int | None) -> dict[str, Any]:
        return body.create_body(
            order,
            image,
            self._around,
            port=order.address.port,
            published=None if self._around.network else published,
            gpu=self._gpu,
            amd=self._amd,
            owner=self._owner,
        )

    def _tell_if_barred(self, spec: Model, image: Image) -> None:
        if image.id not in self._told and compiled.barred(spec, image, self._around):
            self._told.add(image.id)
            _log.warning(
                "what this image's engine compiles is lost with its container: our cache is root's, and it isn't root;"
                f" mount a folder that its user may write at {compiled.PLACE} (volumes)",
                image=spec.image,
                user=image.user,
            )

    async def _image(self, spec: Model) -> Image:
        ref = spec.image or ""
        image = await persistently(lambda: local_image(self._docker, ref), f"looking for image {ref}")
        if image is None:
            raise NotPrepared(f"the image {ref} isn't here (any more)")
        return image

    async def _just_made(self, name: str, labels: Mapping[str, str]) -> Inspected | None:
        """Return a container that we made just now, though Docker's answer was lost on its way."""
        found = await persistently(lambda: api.inspect(self._docker, name), f"looking for container {name}")
        return found if found is not None and _alike(labels_of(found), labels) else None

    async def _gone(self, container: str) -> None:
        """Return when a container that somebody removes has gone; its name is free then."""
        for _ in range(50):
            if await persistently(lambda: api.inspect(self._docker, container), "removing a container") is None:
                return
            await asyncio.sleep(0.1)
        raise StartFailed(f"container {container[:12]} is being removed, but doesn't go; see: docker ps -a")


def _alike(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    # The image's own labels are a container's, too.
    return all(labels.get(label) == wanted[label] for label in (body.OWNER, body.DEFINITION, body.BODY))


def _not_made(error: aiodocker.DockerError, name: str, spec: Model) -> Exception:
    if says(error, "no such image"):
        return NotPrepared(f"the image {spec.image} isn't here any more")
    if error.status == 409:
        return StartFailed(f"container {name} can't be made: {error.message}; remove it with: docker rm -f {name}")
    if error.status == 400:
        return StartFailed(f"Docker refuses container {name} as configured: {error.message}", code=Code.MODEL_BROKEN)
    return failure(error, f"to make container {name}")
