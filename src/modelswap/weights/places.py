"""Where the Hugging Face cache is, and the environment of a download."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import unquote, urlsplit

from modelswap.engines import options
from modelswap.spec import config
from modelswap.spec.config import Model
from modelswap.spec.volumes import Volume, parse

HUB: Final = "https://huggingface.co"

Seen = Callable[[str], Path | None]
"""Tells where we see a folder of Docker's machine or a volume; None: we don't."""


class Unseen(Enum):
    """Stands for a cache that containers have and we don't."""

    CACHE = "unseen"


Cache = Path | Unseen | None
"""The folder, as we see it, that is mounted as ``HF_HOME`` into containers; None: our own ``HF_HOME``."""

_HOME: Final = PurePosixPath("/root/.cache/huggingface")
"""Where the cache is in a container, unless its variables say otherwise."""
_CACHES: Final = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "HF_ASSETS_CACHE")
_HUBS: Final = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
_PLACES: Final = (
    *_CACHES, "HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME", "HOME",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip
_TOKENS: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_ENDPOINT: Final = "HF_ENDPOINT"
_OURS_ALONE: Final = ("MODELSWAP_TOKEN",)
_OF_THE_HUB: Final = re.compile(
    r"HF_\w+|HUGGING_?FACE_\w+|TRANSFORMERS_OFFLINE|(?:https?|all|no)_proxy|(?:HTTPS?|ALL|NO)_PROXY"
)
_ADDRESS: Final = re.compile(r"HF_ENDPOINT|(?:https?|all)_proxy", re.IGNORECASE)
_VARIABLE: Final = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def on_host(root: Path = Path("/")) -> bool:
    """Return whether Docker's folders are ours, as far as can be seen without asking it.

    They are unless we are in a container; and also there if the Docker daemon runs beside us in the same one.
    """
    if not any((root / mark).exists() for mark in (".dockerenv", "run/.containerenv")):
        return True
    proc = root / "proc"
    return any(_is_dockerd(process) and _same_mounts(process, proc / "self") for process in proc.glob("[0-9]*"))


def as_on_host(source: str) -> Path | None:
    """`Seen` on Docker's machine: its folders are ours, its volumes aren't; in a container neither is."""
    return Path(source) if source.startswith("/") and on_host() else None


def environment(
    spec: Model, env: Mapping[str, str] = os.environ, cache: Cache = None, *, seen: Seen = as_on_host
) -> dict[str, str] | None:
    """Return the environment in which a model's weights are downloaded; it holds secrets.

    It is ``env``, and on top of it what the model's own ``env`` says about the hub: token, endpoint, offline mode,
    proxies, and its folders if the engine is a process of ours. A token in the engine's arguments goes first.

    ``cache`` is that of containers, unless one mounts its own (`Seen`). Of ours they see what lies in ``HF_HOME``,
    whatever ``HF_HUB_CACHE`` says. Returns None if we can't see it.
    """
    found = {name: value for name, value in env.items() if name not in _OURS_ALONE}
    own = {name: value for name, value in spec.env.items() if _OF_THE_HUB.fullmatch(name) or name in _PLACES}
    if spec.runtime != "process":
        own = {name: value for name, value in own.items() if name not in _PLACES}
        mounted = _mounted(spec, seen)
        if mounted is None or (not mounted and isinstance(cache, Unseen)):
            return None
        own["HF_TOKEN_PATH"] = found.get("HF_TOKEN_PATH") or str(_home(found) / "token")
        found = {name: value for name, value in found.items() if name not in _CACHES}
        if mounted:
            own["HF_HUB_CACHE"] = str(mounted[0])
        elif cache is not None:
            own["HF_HOME"] = str(cache)
    token = options.value(spec.args, "--hf-token")
    if token and not token.startswith("-"):
        own["HF_TOKEN"] = token
    if any(own.get(name) for name in _TOKENS):
        found = {name: value for name, value in found.items() if name not in _TOKENS}
    found |= own
    if not found.get(_ENDPOINT):
        # What compose makes of a variable that is set to nothing; the library would ask nobody's address.
        found.pop(_ENDPOINT, None)
    if not is_public(found):
        # Others need not speak Xet; and a plain download can be taken up again in the middle of a file.
        found.setdefault("HF_HUB_DISABLE_XET", "1")
    return found


def shared_home(docker: config.Docker, env: Mapping[str, str] = os.environ, *, seen: Seen = as_on_host) -> Cache:
    """Return the cache that is mounted into containers.

    On Docker's machine that is the folder that ``docker.hf_cache`` names, else our own; a volume we don't see. In a
    container it is our own ``HF_HOME`` if something is mounted there, or over it: the same is then taken for engines.
    """
    named = docker.hf_cache and _expanded(docker.hf_cache, env)
    if named is not None and (found := seen(str(named))) is not None:
        return found
    if on_host():
        return None if docker.hf_cache is None else Unseen.CACHE
    home = _home(env).absolute()
    return None if any(map(_is_mount, (home, *home.parents[:-1]))) else Unseen.CACHE


def behind(spec: Model, path: str, seen: Seen) -> Path | None:
    """Return where we see an absolute ``path`` of a managed model's container; None if we don't."""
    place = PurePosixPath(path)
    volume = _nearest(spec, place)
    source = None if volume is None else seen(volume.source)
    return None if volume is None or source is None else source / place.relative_to(volume.target)


def hub_cache(env: Mapping[str, str]) -> Path:
    """Return the folder of repositories, as huggingface_hub 2.4 finds it (its `constants.py`)."""
    for name in _HUBS:
        if name in env:
            return _expanded(env[name], env)
    return _home(env) / "hub"


def is_public(env: Mapping[str, str]) -> bool:
    """Return whether huggingface.co itself is asked, and not another server that ``HF_ENDPOINT`` names."""
    return (env.get(_ENDPOINT) or HUB).rstrip("/") == HUB


def has_token(env: Mapping[str, str]) -> bool:
    """Return whether a token was given by its variable."""
    return any(env.get(name) for name in _TOKENS)


def secrets(env: Mapping[str, str]) -> list[str]:
    """Return what must not be told to anybody, as it may be written: tokens, and the passwords in addresses."""
    found = [env[name] for name in _TOKENS if env.get(name)]
    for name in filter(_ADDRESS.fullmatch, env):
        with contextlib.suppress(ValueError):
            password = urlsplit(env[name]).password or ""
            found += [password, unquote(password)]
    # The library cleans tokens, and Python escapes what it can't print.
    spelled = {form for each in found for form in (each, each.strip(), repr(each.strip())[1:-1])}
    return sorted(spelled - {""}, key=len, reverse=True)


def _is_mount(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return folder.is_mount()
    return False


def _is_dockerd(process: Path) -> bool:
    with contextlib.suppress(OSError):
        return (process / "comm").read_text().strip() == "dockerd"
    return False


def _same_mounts(process: Path, us: Path) -> bool:
    with contextlib.suppress(OSError):
        return (process / "ns" / "mnt").readlink() == (us / "ns" / "mnt").readlink()
    return False


def _home(env: Mapping[str, str]) -> Path:
    default = str(Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return _expanded(env.get("HF_HOME", default), env)


def _expanded(text: str, env: Mapping[str, str]) -> Path:
    if text == "~" or text.startswith("~/"):
        text = env.get("HOME", str(Path("~").expanduser())) + text[1:]
    return Path(_VARIABLE.sub(lambda match: env.get(match[1] or match[2], match[0]), text))


def _mounted(spec: Model, seen: Seen) -> tuple[Path, ...] | None:
    """Return where a container has a cache of its own: nothing if it has none, None if we can't see it."""
    home = PurePosixPath(spec.env.get("HF_HOME", str(_HOME)))
    hub = next((PurePosixPath(spec.env[name]) for name in _HUBS if name in spec.env), home / "hub")
    if _nearest(spec, hub) is not None:
        found = behind(spec, str(hub), seen)
        return None if found is None else (found,)
    named = any(name in spec.env for name in (*_HUBS, "HF_HOME"))
    return None if named and spec.runtime == "managed" else ()


def _nearest(spec: Model, place: PurePosixPath) -> Volume | None:
    """Return the mount of a container in which ``place`` is."""
    around = [volume for volume in map(parse, spec.volumes) if place.is_relative_to(volume.target)]
    return max(around, key=lambda volume: len(PurePosixPath(volume.target).parts), default=None)
