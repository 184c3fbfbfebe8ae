"""Weights that lie in files and folders which the config names, as far as we see them.

What is read is a fact of each engine: llama.cpp and OpenVINO load GGUF files, vLLM and SGLang folders in the hub's
layout. ``custom`` commands keep it to themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from modelswap.engines import options, programs
from modelswap.engines.paths import is_file
from modelswap.spec.config import Model
from modelswap.spec.volumes import parse
from modelswap.weights import plan
from modelswap.weights.cache import names_in
from modelswap.weights.places import Seen
from modelswap.weights.repo import choose, shards

_LLAMACPP: Final = (("--mmproj", "-mm"), ("--model-draft", "-md"), ("--lora",), ("--control-vector",))


def files(spec: Model, env: Mapping[str, str], *, seen: Seen) -> list[Path]:
    """Return the files that a start of the model loads by their own paths, in the order in which they are read.

    ``env`` is our own environment. ``seen`` tells where we see folders and volumes that containers mount. None of a
    container that somebody else made: only its command would tell. Blocks for the reading of folders.
    """
    match spec.engine:
        case "llamacpp":
            more = (options.value(spec.args, *names) for names in _LLAMACPP)
            found = _gguf([spec.model or options.value(spec.args, "--model", "-m"), *more], spec, seen)
        case "openvino":
            found = _openvino(spec, env, seen)
        case "vllm" | "sglang":
            found = _hub_like(spec, seen)
        case _:
            found = iter(())
    return list(dict.fromkeys(found))


def _gguf(named: Iterable[str | None], spec: Model, seen: Seen) -> Iterator[Path]:
    for text in named:
        place = _place(text, spec, seen)
        if place is not None and is_file(place):
            yield from (place.with_name(name) for name in shards(place.name))


def _openvino(spec: Model, env: Mapping[str, str], seen: Seen) -> Iterator[Path]:
    place = _place(spec.model, spec, seen)
    if place is None:
        return
    if is_file(place):
        # Only who uses the embedded engine pays for its imports.
        from modelswap.engines.openvino import cache_folder
        from modelswap.engines.openvino_server.store import made_of

        cache = options.value(spec.args, "--cache-dir")
        # Once it was converted, the file itself is not read any more.
        kept = made_of(place, cache_folder(env) if cache is None else Path(cache).expanduser())
        if kept is None:
            yield place
            return
        place = kept
    for name in sorted(names_in(place)):
        yield place / name


def _hub_like(spec: Model, seen: Seen) -> Iterator[Path]:
    for repo in plan.repos(spec):
        place = _place(repo.repo, spec, seen)
        if place is None:
            continue
        if is_file(place):
            yield from (place.with_name(name) for name in shards(place.name))
        else:
            yield from (place / name for name in choose(repo, sorted(names_in(place))))


def _place(text: str | None, spec: Model, seen: Seen) -> Path | None:
    """Return where we see what the engine knows as ``text``; None if that is no path, or we don't see it."""
    if not text or spec.runtime == "adopted":
        return None
    if spec.runtime == "process":
        found = programs.local(text, spec)
        return None if found is None else (spec.cwd or Path()) / found
    inside = PurePosixPath(text)
    around = [volume for volume in map(parse, spec.volumes) if inside.is_relative_to(volume.target)]
    if not around:
        return None
    nearest = max(around, key=lambda volume: len(PurePosixPath(volume.target).parts))
    source = seen(nearest.source)
    return None if source is None else source / inside.relative_to(nearest.target)
