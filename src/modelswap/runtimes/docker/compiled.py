"""Has managed containers keep what their engines compile, so that it is compiled once and not per container; pure.

One volume (or folder) for all of them, always at the same place: what is in it may name its own path (Triton's does).
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final

import msgspec

from modelswap.engines.compiling import Cache
from modelswap.engines.registry import engine_for
from modelswap.runtimes.docker.images import Image
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import Model
from modelswap.spec.volumes import Volume, parse

PLACE: Final = PurePosixPath("/var/cache/modelswap")
"""Where it is mounted. A model that mounts something else there has its engine compile into that."""


class Kept(msgspec.Struct, frozen=True):
    """What a container is given for it: a mount as ``volumes`` has them, empty if it needs none, and variables."""

    mount: str = ""
    env: dict[str, str] = {}


def kept(spec: Model, image: Image, around: Surroundings) -> Kept:
    """Return what the container of a model is given so that compiled code is kept where it isn't already.

    What the model's own ``env`` names, or its volumes cover, stays where it is. An image that doesn't run as root gets
    no volume of ours: a new one is root's, and an engine that may not write to its cache doesn't start.
    """
    left = _left(spec) if around.compile_cache else []
    own = next((volume for volume in map(parse, spec.volumes) if PLACE.is_relative_to(volume.target)), None)
    writable = image.is_root if own is None else not own.read_only
    if not (left and writable):
        return Kept()
    env = {cache.variable: str(PLACE / cache.folder) for cache in left}
    return Kept("" if own is not None else f"{around.compile_cache}:{PLACE}", env)


def barred(spec: Model, image: Image, around: Surroundings) -> bool:
    """Return whether a model's compiled code would be kept if its image ran as root, and isn't."""
    return kept(spec, image, around) != kept(spec, msgspec.structs.replace(image, user=""), around)


def _left(spec: Model) -> list[Cache]:
    """Return the caches of the model's engine that neither its variables nor its volumes see to."""
    volumes = list(map(parse, spec.volumes))
    return [
        cache
        for cache in engine_for(spec.engine).caches()
        if not any(name in spec.env for name in (cache.variable, *cache.also)) and not _covers(volumes, cache.usual)
    ]


def _covers(volumes: list[Volume], place: str) -> bool:
    return any(PurePosixPath(place).is_relative_to(volume.target) for volume in volumes)
