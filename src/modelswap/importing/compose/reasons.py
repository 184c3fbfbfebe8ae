"""Why a key of a service has no counterpart in a container of ours."""

from __future__ import annotations

from typing import Final

_REASONS: Final = {
    "container_name": "containers of ours are called modelswap-MODEL",
    "restart": "modelswap starts and stops it, and nobody else",
    "deploy.restart_policy": "modelswap starts and stops it, and nobody else",
    "deploy.replicas": "a model has one container",
    "scale": "a model has one container",
    "deploy.resources": "limits of memory and CPU can't be said here",
    "mem_limit": "limits of memory can't be said here",
    "cpus": "limits of CPU can't be said here",
    "cpuset": "limits of CPU can't be said here",
    "depends_on": "a model starts by itself; what it needs must be up already",
    "healthcheck": "modelswap asks the engine itself",
    "labels": "containers of ours have labels of ours",
    "logging": "Docker's own default is used",
    "profiles": "compose no longer starts it",
    "secrets": "mount the file with volumes, or say the value in env",
    "configs": "mount the file with volumes",
    "stop_signal": "it is stopped with SIGTERM",
    "init": "there is an init always",
    "tty": "there is no terminal",
    "stdin_open": "there is no terminal",
    "hostname": "it is reached by its address",
    "user": "it runs as the image's user",
    "links": "put both on one network",
}
_OTHER: Final = "there is no such setting for containers of ours"


def why_lost(key: str) -> str:
    """Return why the service's ``key`` (dotted) is not carried over."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if reason := _REASONS.get(".".join(parts[:length])):
            return reason
    return _OTHER
