"""A repository of the Hugging Face hub, and which of its files a model loads; pure.

Apart from `plan`, since the process that downloads needs no more than this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Final

import msgspec

MAIN: Final = "main"
"""The revision that is meant if none is named."""
ALL: Final = ("*",)
"""A repository's every file."""

IGNORED: Final = ("original/**/*",)
"""What is left out unless something else is said."""

_SHARD: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<kind>\.\w+)")

# Never read, however small.
_ASIDE: Final = ("original/*", "onnx/*", "openvino/*", "coreml/*", "metal/*")
_SMALL: Final = (
    "*.json", "*.jinja", "*.txt", "*.py", "*.yaml", "*.model", "*tokenizer.model*", "*.tiktoken", "*.spm", "*.vocab",
)  # fmt: skip


class Repo(msgspec.Struct, frozen=True, kw_only=True):
    """A repository, and which of its files are loaded.

    ``weights`` are patterns of which the first that matches a file at the top counts, or all of them if none does;
    empty if its weights aren't loaded. Those that match ``ignore`` are left out. ``extra`` is taken besides. ``folder``
    is the cache folder that the engine was told to keep it in, None for the usual one.
    """

    repo: str
    revision: str | None = None
    weights: tuple[str, ...] = ()
    ignore: tuple[str, ...] = IGNORED
    extra: tuple[str, ...] = _SMALL
    folder: str | None = None


def shards(name: str) -> list[str]:
    """Return all files of one that was split (``name-00001-of-00003.gguf``), in their order; else the one itself."""
    match = _SHARD.fullmatch(name)
    if match is None:
        return [name]
    stem, count, kind = match["stem"], match["count"], match["kind"]
    return [f"{stem}-{number:05}-of-{count}{kind}" for number in range(1, int(count) + 1)]


def choose(repo: Repo, names: Iterable[str]) -> list[str]:
    """Return which of a repository's files are loaded, in their order."""
    names = list(names)
    top = [name for name in names if "/" not in name]
    first = next((each for each in repo.weights if any(_matches(name, (each,)) for name in top)), None)
    weights = repo.weights if first is None else (first,)
    aside = () if repo.extra == ALL else _ASIDE
    return [
        name
        for name in names
        if (_matches(name, weights) and not _matches(name, repo.ignore))
        or (_matches(name, repo.extra) and not _matches(name, aside))
    ]


def is_weights(repo: Repo, name: str) -> bool:
    """Return whether a file that was chosen is one of the weights."""
    return _matches(name, repo.weights)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
