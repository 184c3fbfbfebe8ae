"""Where a container that somebody else made keeps what it loads, and whether we download to there; pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Final

from modelswap.runtimes.docker.inspected import Inspected

_ROOT: Final = frozenset({"", "0", "root", "0:0", "root:root"})
_HUBS: Final = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
_SOURCES: Final = {"volume": "Name", "bind": "Source"}


def shares_cache(inspected: Inspected, hf_cache: str) -> bool:
    """Return whether ``hf_cache``, a volume or a folder as Docker names it, is mounted where its engine's cache is."""
    hub = hub_of(inspected)
    return bool(hf_cache) and hub is not None and behind(inspected, hub) == PurePosixPath(hf_cache) / "hub"


def hub_of(inspected: Inspected) -> PurePosixPath | None:
    """Return its engine's folder of repositories, as it sees it itself; None where that can't be told."""
    env = environment(inspected)
    if found := next((env[name] for name in _HUBS if env.get(name)), None):
        return PurePosixPath(found)
    if found := env.get("HF_HOME"):
        return PurePosixPath(found) / "hub"
    caches = caches_of(inspected)
    return caches / "huggingface" / "hub" if caches is not None else None


def caches_of(inspected: Inspected) -> PurePosixPath | None:
    """Return its folder for caches, as it sees it itself; None where that can't be told."""
    env = environment(inspected)
    if found := env.get("XDG_CACHE_HOME"):
        return PurePosixPath(found)
    home = env.get("HOME") or ("/root" if inspected["Config"].get("User", "") in _ROOT else "")
    return PurePosixPath(home) / ".cache" if home else None


def behind(inspected: Inspected, place: PurePosixPath) -> PurePosixPath | None:
    """Return what a folder of its own is as Docker names it, ``/folder/…`` or ``volume/…``; None if it isn't kept."""
    around = [
        mount for mount in inspected.get("Mounts") or () if place.is_relative_to(PurePosixPath(mount["Destination"]))
    ]
    mount = max(around, key=lambda each: len(each["Destination"]), default=None)
    if mount is None or mount.get("Type") not in _SOURCES:
        return None
    return PurePosixPath(mount[_SOURCES[mount["Type"]]]) / place.relative_to(PurePosixPath(mount["Destination"]))


def environment(inspected: Inspected) -> Mapping[str, str]:
    """Return its variables."""
    pairs = (str(each).partition("=") for each in inspected["Config"].get("Env") or ())
    return {name: value for name, _, value in pairs}
