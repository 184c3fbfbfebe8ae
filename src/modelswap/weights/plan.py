"""What a model loads from the Hugging Face hub; pure.

vLLM and SGLang load what we download: llama.cpp's ``-hf`` has a cache of its own, and ``custom`` commands and the
embedded engine see to their own weights. The same files are taken as by vLLM (read in its sources of 2026,
`model_executor/model_loader/default_loader.py` and `weight_utils.py`, from which SGLang's were made):

- of ``consolidated*.safetensors`` (Mistral's own format; vLLM only), ``*.safetensors``, ``*.bin``, ``*.pt`` the first
  that the repository has at its top, and all files of that kind; ``--load-format`` and ``--ignore-patterns`` narrow
  that;
- configuration and tokenizer: everything small that is no weights;
- all of a LoRA adapter's repository; a draft model's (``--speculative-config``, SGLang's
  ``--speculative-draft-model-path``) like the model's own.

Not seen: what a file given with ``--config`` says, and LoRA modules that are loaded at run time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from modelswap.engines import options, programs
from modelswap.engines.registry import FROM_HUB
from modelswap.spec.config import Model
from modelswap.weights.repo import ALL, IGNORED, Repo

_SAFETENSORS: Final = ("*.safetensors",)
_AUTO: Final = ("consolidated*.safetensors", "*.safetensors", "*.bin", "*.pt")
_FORMATS: Final[dict[str, tuple[str, ...]]] = {
    "auto": _AUTO,
    "hf": _AUTO[1:],
    "safetensors": _SAFETENSORS,
    "fastsafetensors": _SAFETENSORS,
    "instanttensor": _SAFETENSORS,
    "runai_streamer": _SAFETENSORS,
    "sharded_state": _SAFETENSORS,
    "bitsandbytes": _AUTO[1:],
    "mistral": _AUTO[:1],
    "pt": ("*.pt",),
    "npcache": ("*.bin",),
}
# They read weights from elsewhere, or need none.
_ELSEWHERE: Final = frozenset({"dummy", "tensorizer", "runai_streamer_sharded"})

# huggingface_hub's rule (`utils/_validators.py`), and what looks like a path is none.
_ID: Final = re.compile(r"(?=.{1,96}$)(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_GGUF: Final = re.compile(r"(?P<repo>[^/:]+/[^/:]+)(?:/(?P<file>.+\.gguf)|:(?P<quant>\w+))")


class Wanted(msgspec.Struct, frozen=True):
    """All that a model loads from the hub; the model's own repository comes first."""

    model: str
    repos: tuple[Repo, ...]


def wanted(
    name: str,
    spec: Model,
    *,
    mounted: bool = False,
    local: Callable[[str, Model], object] = programs.local,
) -> Wanted | None:
    """Return what is to be downloaded ahead of a start of the model; None if nothing is for us to download.

    ``mounted`` says that the container that somebody else made (``container``, ``compose_service``) shares our cache.
    ``local`` finds a text as a file or folder, for engines that are our processes.
    """
    if spec.engine not in FROM_HUB or (spec.runtime == "adopted" and not mounted) or _from_modelscope(spec):
        return None
    folder = options.value(spec.args, "--download-dir")
    if folder is not None and spec.runtime != "process":
        return None  # it is a folder of the container's own
    here = local if spec.runtime == "process" else _nothing_here
    found = [repo for repo in repos(spec) if hub_id(repo.repo) and not here(repo.repo, spec)]
    return Wanted(name, tuple(dict.fromkeys(found))) if found else None


def hub_id(text: str) -> bool:
    """Return whether ``text`` can be the id of a repository, ``org/name`` or ``name``."""
    return _ID.fullmatch(text) is not None


def _nothing_here(text: str, spec: Model) -> object:
    return None


def _from_modelscope(spec: Model) -> bool:
    said = (spec.env.get(f"{engine.upper()}_USE_MODELSCOPE", "") for engine in FROM_HUB)
    return any(text.lower() in ("1", "true") for text in said)


def repos(spec: Model) -> Iterator[Repo]:
    """Yield all that vLLM or SGLang are told to load, be it of the hub or a file or folder by its path."""
    args = spec.args
    revision, folder = options.value(args, "--revision"), options.value(args, "--download-dir")
    ignore = tuple(_listed(args, "--ignore-patterns")) or IGNORED
    text, weights = _gguf(spec.model or options.value(args, "--model") or "")
    model = Repo(repo=text, revision=revision, weights=weights or _format(spec), ignore=ignore)
    if folder is not None and model.weights:
        # vLLM keeps weights, and the index and configuration that it reads with them, in that folder.
        yield msgspec.structs.replace(model, extra=("*.json",), folder=folder)
        model = msgspec.structs.replace(model, weights=())
    yield model
    if (tokenizer := options.value(args, "--tokenizer")) is not None:
        yield Repo(repo=tokenizer, revision=options.value(args, "--tokenizer-revision") or revision)
    if (config := options.value(args, "--hf-config-path")) is not None:
        yield Repo(repo=config)
    if (draft := _draft(args)) is not None:
        yield draft
    for module in _listed(args, "--lora-modules"):
        path = _json(module).get("path") if module.startswith("{") else module.partition("=")[2]
        if isinstance(path, str):
            yield Repo(repo=path, extra=ALL)
    for adapter in _listed(args, "--lora-paths"):
        yield Repo(repo=adapter.rpartition("=")[2], extra=ALL)


def _gguf(text: str) -> tuple[str, tuple[str, ...]]:
    """Return the repository and the patterns of ``org/name:QUANT`` and ``org/name/file.gguf``; else no patterns."""
    match = _GGUF.fullmatch(text)
    if match is None:
        return text, ()
    quant = match["quant"]
    return match["repo"], (match["file"],) if match["file"] else (f"*-{quant}.gguf", f"*-{quant}-*.gguf")


def _format(spec: Model) -> tuple[str, ...]:
    given = (options.value(spec.args, "--load-format") or "auto").lower()
    if given == "auto" and spec.engine == "sglang":
        given = "hf"
    return () if given in _ELSEWHERE else _FORMATS.get(given, _AUTO)


def _draft(args: Sequence[str]) -> Repo | None:
    if (path := options.value(args, "--speculative-draft-model-path")) is not None:
        return Repo(repo=path, revision=options.value(args, "--speculative-draft-model-revision"), weights=_AUTO[1:])
    settings = _json(options.value(args, "--speculative-config", "-sc") or "")
    repo = settings.get("model") or options.value(args, "--speculative-config.model")
    revision = settings.get("revision") or options.value(args, "--speculative-config.revision")
    # Methods without a draft model are named in the model's place.
    if not isinstance(repo, str) or repo in ("ngram", "mtp", "suffix"):
        return None
    return Repo(repo=repo, revision=revision if isinstance(revision, str) else None, weights=_AUTO[1:])


def _listed(args: Sequence[str], wanted: str) -> Iterator[str]:
    """Yield the values of an option that takes several."""
    listed = False
    for argument in args:
        if not argument.startswith("-"):
            if listed:
                yield argument
            continue
        name, equals, value = argument.partition("=")
        listed = name.replace("_", "-") == wanted
        if listed and equals:
            yield value


def _json(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
