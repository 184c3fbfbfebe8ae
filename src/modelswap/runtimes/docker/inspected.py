"""What ``GET /containers/ID/json`` says, read; pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from modelswap.runtimes.docker.reach import started_at

Inspected = Mapping[str, Any]


def is_running(inspected: Inspected) -> bool:
    """Return whether it runs now (a paused one does)."""
    return bool(inspected["State"]["Running"])


def finished_at(inspected: Inspected) -> float:
    """Return when the container last ended, in Unix seconds; 0.0 if it never did. A running one has ended before."""
    return started_at({"State": {"StartedAt": inspected["State"].get("FinishedAt", "")}})


def name_of(inspected: Inspected) -> str:
    """Return a container's name."""
    return str(inspected["Name"]).removeprefix("/")


def command_of(inspected: Inspected) -> list[str]:
    """Return the words that a container's process is started with; a shell's line is taken apart."""
    config = inspected.get("Config", {})
    taken: list[str] = []
    for word in (*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ())):
        try:
            taken += shlex.split(word) if " " in word else [word]
        except ValueError:
            taken.append(word)
    return taken


def labels_of(inspected: Inspected) -> Mapping[str, str]:
    """Return a container's labels."""
    return inspected["Config"].get("Labels") or {}


def exposed_by(inspected: Inspected) -> tuple[int, ...]:
    """Return the TCP ports that a container says it listens at."""
    ports = [port.partition("/") for port in inspected["Config"].get("ExposedPorts") or {}]
    return tuple(sorted(int(number) for number, _, kind in ports if kind in ("", "tcp") and number.isdigit()))


def is_limited(inspected: Inspected) -> bool:
    """Return whether a container has a memory limit of its own."""
    return bool(inspected["HostConfig"].get("Memory"))


def was_oom_killed(inspected: Inspected) -> bool:
    """Return whether something in it was killed at the container's memory limit.

    With cgroups v2 Docker says so (``OOMKilled``) also when the machine's memory ran out.
    """
    return is_limited(inspected) and bool(inspected["State"].get("OOMKilled"))
