"""Weights: are they here already, and can they be kept."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from modelswap.cli.doctor import adopted
from modelswap.cli.doctor.finding import Finding, fine, note, problem, warning
from modelswap.cli.doctor.scene import Scene, ToldElsewhere, in_thread
from modelswap.cli.words import size
from modelswap.engines.paths import is_there
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.docker import sharing
from modelswap.runtimes.docker.inspected import command_of
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import Model
from modelswap.weights import cache, places, plan
from modelswap.weights.repo import Repo

_BILLIONS: Final = re.compile(r"(?:^|[^a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)b(?:$|[^a-z0-9])")
_QUANTISED: Final = re.compile(r"awq|gptq|int4|w4a16|4bit|nf4|q4|fp4")
_EIGHT_BITS: Final = re.compile(r"fp8|int8|w8a8|8bit|q8")


@dataclass(frozen=True, slots=True)
class Kept:
    """What of a repository is in a cache. ``missing``: some of its weights are not."""

    bytes: int
    missing: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """A repository that a model loads, and the cache folder it is loaded from; None where that can't be seen."""

    model: str
    repo: Repo
    hub: Path | None


async def here(scene: Scene) -> list[Finding]:
    """Whether each model's weights are in the cache that its engine will look into."""
    found = []
    token = any(scene.env.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    for wanted in await wanted_repos(scene):
        kept = None
        if wanted.hub is not None:
            hub = wanted.hub
            kept = await in_thread(lambda hub=hub, repo=wanted.repo: kept_in(hub, repo))  # type: ignore[misc]
        found.append(of_weights(wanted, kept, token=token or _has_token(scene.config.models[wanted.model])))
    if not found:
        raise ToldElsewhere
    return found


def of_weights(wanted: Wanted, kept: Kept | None, *, token: bool) -> Finding:
    """Judge what is kept of what a model loads."""
    name, repo = wanted.model, wanted.repo.repo
    if wanted.hub is None or kept is None:
        return note(f"{name}: whether {repo} is downloaded can't be seen from here (a volume, or another machine)")
    if not kept.missing:
        return fine(f"{name}: {repo} is downloaded ({size(kept.bytes)})")
    ahead = f"fetch it ahead of time: modelswap pull {name}"
    if not token:
        ahead += " (if its licence must be accepted, set HF_TOKEN first)"
    part = f" only in part ({size(kept.bytes)})" if kept.bytes else ""
    return note(f"{name}: {repo} is{part or ' not'} downloaded yet", ahead)


async def wanted_repos(scene: Scene) -> list[Wanted]:
    """Return every repository that models load from the hub."""
    return await scene.once("repositories", lambda: _wanted_repos(scene))


async def _wanted_repos(scene: Scene) -> list[Wanted]:
    around: Surroundings | None = None
    with contextlib.suppress(ToldElsewhere):  # nothing is known of containers then
        around = await scene.around()
    found = []
    for name, model in scene.config.models.items():
        if model.runtime == "adopted":
            with contextlib.suppress(ToldElsewhere, ModelswapError):  # its own check tells
                found += of_adopted(name, model, await scene.container(name, model), around, scene.env)
            continue
        wanted = plan.wanted(name, model)
        for repo in wanted.repos if wanted is not None else ():
            hub = hub_of(model, around, scene.env)
            found.append(Wanted(name, repo, hub if repo.folder is None else Path(repo.folder)))
    return found


def of_adopted(
    name: str,
    model: Model,
    inspected: Mapping[str, Any],
    around: Surroundings | None,
    env: Mapping[str, str] = os.environ,
) -> list[Wanted]:
    """Return what a container that somebody else made loads into a cache that is mounted into it."""
    inside = sharing.hub_of(inspected)
    source = sharing.behind(inspected, inside) if inside is not None else None
    if source is None or around is None:
        return []
    # Its command says what it loads; 'model' is only what it calls that.
    told = {"model": adopted.weights_of(inspected), "args": command_of(inspected)}
    wanted = plan.wanted(name, model.model_copy(update=told), mounted=True)
    hub = Path(source) if source.is_absolute() and not around.container else None
    if around.container and sharing.shares_cache(inspected, around.hf_cache):
        hub = _of_containers(model, around, env)
    return [Wanted(name, repo, hub) for repo in (wanted.repos if wanted is not None else ())]


def hub_of(model: Model, around: Surroundings | None, env: Mapping[str, str]) -> Path | None:
    """Return the folder of repositories that the engine will look into, None if it can't be seen from here."""
    if model.runtime == "process":
        own = places.environment(model, env)
        return None if own is None else places.hub_cache(own)
    return None if around is None else _of_containers(model, around, env)


def _of_containers(model: Model, around: Surroundings, env: Mapping[str, str]) -> Path | None:
    def seen(source: str) -> Path | None:
        return Path(source) if source.startswith("/") and not around.container else None

    # In a container the same volume or folder is mounted as our own cache: that is how its name was found.
    ours = None if around.container and around.hf_cache else places.Unseen.CACHE
    own = places.environment(model, env, seen(around.hf_cache) or ours, seen=seen)
    return None if own is None else places.hub_cache(own)


def kept_in(hub: Path, repo: Repo) -> Kept:
    """Look into a cache folder, asking nobody."""
    found = cache.complete(repo, hub)
    if found is not None:
        return Kept(found.size, missing=False)
    held = 0
    with contextlib.suppress(OSError):
        for blob in (cache.folder_of(repo.repo, hub) / "blobs").iterdir():
            # What is still being downloaded may be sparse.
            held += blob.stat().st_blocks * 512
    return Kept(held, missing=True)


def guess(repo: str) -> int | None:
    """Return about how many bytes a model of such a name has: its billions of parameters, and how they are stored."""
    name = repo.lower()
    match = _BILLIONS.search(name)
    if match is None:
        return None
    width = 0.6 if _QUANTISED.search(name) else 1.0 if _EIGHT_BITS.search(name) else 2.0
    return int(float(match[2]) * int(match[1] or 1) * width * 1e9)


async def caches(scene: Scene) -> list[Finding]:
    """Whether the cache folders that downloads go to may be written."""
    folders: dict[Path, list[str]] = {}
    for wanted in await wanted_repos(scene):
        if wanted.hub is not None:
            for folder in (wanted.hub, *_closed(cache.folder_of(wanted.repo.repo, wanted.hub))):
                models = folders.setdefault(folder, [])
                models += [wanted.model] if wanted.model not in models else []
    base = Path(scene.env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for name, model in scene.models("process").items():
        if model.engine == "openvino":
            folders.setdefault(base / "modelswap", []).append(name)
        elif model.engine == "vllm":
            root = model.env.get("VLLM_CACHE_ROOT") or scene.env.get("VLLM_CACHE_ROOT")
            folders.setdefault(Path(root) if root else base / "vllm", []).append(name)
    if not folders:
        raise ToldElsewhere
    return [of_folder(folder, models) for folder, models in folders.items()]


def _closed(repo: Path) -> Iterator[Path]:
    """Yield what of a repository's folder somebody else made: an engine that ran as root, say."""
    for folder in (repo, repo / "blobs"):
        if is_there(folder) and not os.access(folder, os.W_OK | os.X_OK):
            yield folder


def of_folder(folder: Path, models: list[str]) -> Finding:
    """Judge whether we may write to a folder, or make it."""
    nearest = next(filter(is_there, (folder, *folder.parents)))
    names = ", ".join(models)
    if not nearest.is_dir():
        return problem(f"{nearest} is in the way of the cache folder {folder} ({names})", "move it away")
    if not os.access(nearest, os.W_OK | os.X_OK):
        message = f"the cache folder {folder} can't be written by this user ({names})"
        # Never what is above it, which may be all of a machine.
        own = f"sudo chown -R $USER {folder}" if nearest == folder else f"sudo install -d -o $USER {folder}"
        return warning(message, f"{own}, or name another with HF_HOME or VLLM_CACHE_ROOT")
    return fine(f"the cache folder {folder} can be written")


def _has_token(model: Model) -> bool:
    return bool(model.env.get("HF_TOKEN") or model.env.get("HUGGING_FACE_HUB_TOKEN"))
