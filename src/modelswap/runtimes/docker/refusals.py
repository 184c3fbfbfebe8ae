"""Why Docker didn't start a container, in words for the user."""

from __future__ import annotations

import re
from typing import Final

import aiodocker

from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.base import NotPrepared, StartFailed
from modelswap.runtimes.docker.client import failure, says

_DENIED: Final = 403
_TAG: Final = re.compile(r"<[^<>]*>")
_PORT: Final = ("port is already allocated", "address already in use", "ports are not available")
_NO_GPUS: Final = ("could not select device driver", "unresolvable cdi devices", "unknown or invalid runtime name")
_GPU: Final = ("nvidia-container-cli", "nvidia-container-runtime", "libnvidia-ml")
_NO_FILE: Final = ("error gathering device information", "adding custom device")
_NO_PROGRAM: Final = ("executable file not found", "exec format error")
_MOUNT: Final = ("bind source path does not exist", "error mounting", "not a directory: unknown")


def port_is_taken(error: aiodocker.DockerError) -> bool:
    """Return whether a start failed because a port that the container publishes is another's."""
    return says(error, *_PORT)


def network_has_gone(error: aiodocker.DockerError) -> bool:
    """Return whether a start failed because a network isn't there; one of the same name may be."""
    return error.status == 404 and says(error, "network")


def has_gone(error: aiodocker.DockerError) -> bool:
    """Return whether a start failed because there is no such container (any more)."""
    return error.status == 404 and says(error, "no such container")


def denied(error: BaseException) -> str | None:
    """Return the words with which a call was denied (403) by what stands before Docker; None if it wasn't.

    Docker itself denies nothing: a proxy that lets only some calls through does, or an authorization plugin.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, aiodocker.DockerError) and seen.status == _DENIED:
            # Of a proxy it is a page.
            return " ".join(_TAG.sub(" ", str(seen.message)).split())
        seen = seen.__cause__
    return None


def refused(error: aiodocker.DockerError, name: str) -> ModelswapError:
    """Return what it means that Docker didn't start container ``name``.

    `StartFailed`, with `Code.MODEL_BROKEN` where the same start would fail again; `NotPrepared`; `DockerAway`.
    """
    said = error.message.strip()
    if says(error, *_NO_GPUS):
        return StartFailed(
            f"Docker can't give container {name} a GPU ({said}): install nvidia-container-toolkit, then run "
            "`nvidia-ctk runtime configure --runtime=docker` and restart Docker; without a GPU, say gpus: none",
            code=Code.MODEL_BROKEN,
        )
    if says(error, *_GPU):
        return StartFailed(f"the GPU could not be given to container {name} ({said}); does `nvidia-smi` work here?")
    if says(error, *_NO_FILE):
        return StartFailed(
            f"Docker has no device file that container {name} is to see ({said}); load its driver (AMD: `sudo modprobe "
            "amdgpu`), or mend the model's 'devices' and 'gpus'",
            code=Code.MODEL_BROKEN,
        )
    if says(error, *_PORT):
        return StartFailed(
            f"a port that container {name} publishes is taken ({said}); see what listens there with: ss -ltnp"
        )
    if says(error, "no such image"):
        return NotPrepared(f"the image of container {name} isn't here any more")
    if network_has_gone(error):
        return StartFailed(
            f"a network of container {name} is gone ({said}); make it again, or create the container anew "
            f"(docker rm {name}; for compose: docker compose --profile models create)",
            code=Code.MODEL_BROKEN,
        )
    if says(error, *_NO_PROGRAM) or (says(error, "exec:") and says(error, "no such file", "permission denied")):
        return StartFailed(
            f"container {name} has no program to start ({said}); mend its entrypoint or command",
            code=Code.MODEL_BROKEN,
        )
    if says(error, *_MOUNT):
        return StartFailed(
            f"container {name} can't mount what it should ({said}); mend its volumes", code=Code.MODEL_BROKEN
        )
    return failure(error, f"to start container {name}")
