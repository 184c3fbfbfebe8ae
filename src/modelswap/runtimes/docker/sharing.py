"""Whether a container that somebody else made loads its weights from the very folder that we download into; pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Final

from modelswap.runtimes.docker.inspected import Inspected

_ROOT: Final = frozenset({"", "0", "root", "0:0", "root:root"})
_ELSEWHERE: Final = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
_SOURCES: Final = {"volume": "Name", "bind": "Source"}


def shares_cache(inspected: Inspected, hf_cache: str) -> bool:
    """Return whether ``hf_cache``, a volume or a folder as Docker names it, is mounted where its engine's cache is."""
    place = _home(inspected)
    if place is None or not hf_cache:
        return False
    around = [
        mount for mount in inspected.get("Mounts") or () if place.is_relative_to(PurePosixPath(mount["Destination"]))
    ]
    mount = max(around, key=lambda each: len(each["Destination"]), default=None)
    if mount is None or mount.get("Type") not in _SOURCES:
        return False
    source, below = str(mount[_SOURCES[mount["Type"]]]), place.relative_to(PurePosixPath(mount["Destination"]))
    if below == PurePosixPath():
        return source == hf_cache
    return mount["Type"] == "bind" and str(PurePosixPath(source) / below) == hf_cache


def _home(inspected: Inspected) -> PurePosixPath | None:
    """Return where the engine's ``HF_HOME`` is in its container; None where that can't be told."""
    env = _env(inspected)
    if any(name in env for name in _ELSEWHERE):
        return None
    if found := env.get("HF_HOME"):
        return PurePosixPath(found)
    if found := env.get("XDG_CACHE_HOME"):
        return PurePosixPath(found) / "huggingface"
    home = env.get("HOME") or ("/root" if inspected["Config"].get("User", "") in _ROOT else "")
    return PurePosixPath(home) / ".cache" / "huggingface" if home else None


def _env(inspected: Inspected) -> Mapping[str, str]:
    pairs = (str(each).partition("=") for each in inspected["Config"].get("Env") or ())
    return {name: value for name, _, value in pairs}
