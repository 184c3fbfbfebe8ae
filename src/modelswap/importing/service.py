"""What a container is made from, whoever says so: a compose service, or a ``docker run``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, Literal

_UNITS: Final = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_NAMES: Final = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


@dataclass(frozen=True, slots=True)
class Volume:
    """A mount; ``source`` is a host folder, or a volume (``named``)."""

    source: str
    target: str
    read_only: bool = False
    named: bool = False


@dataclass(frozen=True, slots=True)
class Port:
    """A container's port, and where the host publishes it, if it does."""

    target: int
    published: str = ""
    address: str = ""


@dataclass(slots=True)
class Service:
    """What a service or a ``docker run`` says of its container. ``gpus``: None if it asks for none.

    ``lost`` are the keys (within the service) that a container of ours can't have, each with why.
    """

    name: str
    image: str = ""
    built: bool = False
    entrypoint: list[str] | None = None
    command: list[str] = field(default_factory=list)
    env: dict[str, str | None] = field(default_factory=dict)
    volumes: list[Volume] = field(default_factory=list)
    ports: list[Port] = field(default_factory=list)
    exposed: list[int] = field(default_factory=list)
    gpus: Literal["all"] | int | list[str] | None = None
    devices: list[str] = field(default_factory=list)
    shm_size: str | None = None
    ipc: str | None = None
    ulimits: dict[str, int] = field(default_factory=dict)
    network: str | None = None
    extra_hosts: list[str] = field(default_factory=list)
    pull: Literal["missing", "always", "never"] | None = None
    folder: str | None = None
    grace: float | None = None
    lost: list[tuple[str, str]] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        """The command line, as far as it is said."""
        return [*(self.entrypoint or []), *self.command]

    @property
    def chosen(self) -> list[str] | None:
        """The GPUs of those it is given that ``CUDA_VISIBLE_DEVICES`` leaves it; None if that isn't said."""
        said = self.env.get("CUDA_VISIBLE_DEVICES") or ""
        return said.split(",") if re.fullmatch(r"\d+(,\d+)*|(GPU|MIG)-[\w/,-]+", said) else None

    @property
    def sees_no_gpu(self) -> bool:
        """Whether ``CUDA_VISIBLE_DEVICES`` hides all of them."""
        return self.env.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")


def size(text: str | None) -> str | None:
    """Return a size in Docker's units (binary, ``g`` and ``gb`` alike) as ours; None if it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", (text or "").lower())
    if match is None:
        return None
    count = int(float(match[1]) * _UNITS[match[2]])
    for unit, suffix in _NAMES:
        if count and count % unit == 0:
            return f"{count // unit}{suffix}"
    return str(count)
