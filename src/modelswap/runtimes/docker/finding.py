"""Finding the containers that somebody else made (adopted models)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import aiodocker

from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.compose import NUMBER, ONE_OFF, PROJECT, SERVICE
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import Model

_TRIES: Final = 5


class NoSuchContainer(ModelswapError):
    """The container of an adopted model isn't there; the message says how to make it. Somebody may do so any time."""

    code = Code.MODEL_START_FAILED


class Ambiguous(ModelswapError):
    """Several containers fit what an adopted model's config says."""

    code = Code.MODEL_BROKEN


async def find_adopted(
    docker: aiodocker.Docker, name: str, spec: Model, around: Surroundings, project: str | None
) -> dict[str, Any]:
    """Return how Docker describes (inspect) the container of the adopted model ``name``.

    ``project`` is the compose project to look in; by default our own, else the only one that has such a service. A
    service's container that compose replaces just now is found by its running one, else by the newer one. Raises
    `NoSuchContainer`, `Ambiguous`; lets `aiodocker.DockerError` through.
    """
    if spec.container is not None:
        if (found := await api.inspect(docker, spec.container)) is not None:
            return found
        raise NoSuchContainer(
            f"model {name}: there is no container {spec.container}; make it (docker compose --profile models create,"
            " or docker create), or mend 'container' in the config"
        )
    service = spec.compose_service or ""
    # Compose may remove what was just listed, and make another.
    for _ in range(_TRIES):
        listed = await _of_service(docker, service, project or around.project)
        if not listed:
            break
        if (found := await api.inspect(docker, _choose(name, service, listed)["Id"])) is not None:
            return found
    where = f" in project {project or around.project}" if project or around.project else ""
    raise NoSuchContainer(
        f"model {name}: there is no container of compose service {service}{where}; make it with:"
        f" docker compose --profile models create {service}"
    )


async def forbid_restarts(docker: aiodocker.Docker, inspected: Mapping[str, Any]) -> bool:
    """Set a container's restart policy to ``no`` unless it is already; return whether it was changed.

    Docker would start the engine behind our back otherwise, when it crashes or the machine boots. The caller says it
    aloud. Lets `aiodocker.DockerError` through.
    """
    policy = (inspected.get("HostConfig", {}).get("RestartPolicy") or {}).get("Name") or "no"
    if policy == "no":
        return False
    await api.call(docker, "POST", f"containers/{inspected['Id']}/update", body={"RestartPolicy": {"Name": "no"}})
    return True


async def _of_service(docker: aiodocker.Docker, service: str, project: str) -> list[dict[str, Any]]:
    labels = [f"{SERVICE}={service}", *([f"{PROJECT}={project}"] if project else [])]
    listed: list[dict[str, Any]] = await api.call(
        docker, "GET", "containers/json", params={"all": "1", "filters": api.filters(label=labels)}
    )
    # `docker compose run` makes containers of the service, too.
    return [each for each in listed if each["Labels"].get(ONE_OFF, "False").lower() != "true"]


def _choose(name: str, service: str, listed: list[dict[str, Any]]) -> dict[str, Any]:
    projects = sorted({each["Labels"].get(PROJECT, "") for each in listed})
    if len(projects) > 1:
        raise Ambiguous(
            f"model {name}: several compose projects have a service {service}: {', '.join(projects)}; say which with"
            " docker.project in the config"
        )
    if len({each["Labels"].get(NUMBER, "1") for each in listed}) > 1:
        names = ", ".join(sorted(each["Names"][0].lstrip("/") for each in listed))
        raise Ambiguous(
            f"model {name}: compose service {service} has several containers: {names}; scale it to 1, or name one with"
            " 'container' instead"
        )
    return max(listed, key=lambda each: (each["State"] == "running", each["Created"]))
