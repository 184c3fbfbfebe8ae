"""What the Hugging Face cache holds, found without asking anybody.

Its layout is documented ("Understand caching", huggingface_hub); read in 2.4: ``models--org--name/`` has
``refs/REVISION`` (a commit), ``snapshots/COMMIT/`` with links into ``blobs/``, and since 2.x ``trees/COMMIT.json`` with
all files there are. Files get their names only once they are complete.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from modelswap.engines.paths import is_there
from modelswap.weights.repo import ALL, MAIN, Repo, choose, is_weights, shards

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_CONFIGS: Final = ("config.json", "params.json")
_FORMAT: Final = 1


class Found(msgspec.Struct, frozen=True):
    """A snapshot: its folder, what of it was asked for, and how many bytes that is."""

    path: Path
    names: tuple[str, ...]
    size: int

    @property
    def files(self) -> list[Path]:
        """What was asked for, as paths."""
        return [self.path / name for name in self.names]


class Entry(msgspec.Struct, frozen=True):
    """A file of a repository, as its cached listing has it; ``lfs_sha256`` names the blob of a large one.

    ``xet_hash``: it can come by Xet.
    """

    size: int
    blob_id: str
    lfs_sha256: str | None = None
    xet_hash: str | None = None

    @property
    def blob(self) -> str:
        """The name of its blob."""
        return self.lfs_sha256 or self.blob_id


class _Tree(msgspec.Struct, frozen=True):
    format_version: int
    files: dict[str, Entry]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def folder_of(repo: str, hub: Path) -> Path:
    """Return the folder of a repository."""
    return hub / ("models--" + repo.replace("/", "--"))


def complete(repo: Repo, hub: Path) -> Found | None:
    """Return the snapshot if all that was asked for is there; None if it isn't.

    By the cached listing of the repository; where an older program has left none, by its looks (`usable`).
    """
    commit = _commit(repo, hub)
    if commit is None:
        return None
    tree = listing(repo.repo, commit, hub)
    if tree is None:
        return usable(repo, hub)
    snapshot = folder_of(repo.repo, hub) / "snapshots" / commit
    expected = choose(repo, tree)
    return _found(snapshot, expected) if expected else None


def usable(repo: Repo, hub: Path) -> Found | None:
    """Return the snapshot if it looks as if an engine could load it: a configuration, and weights without a gap."""
    commit = _commit(repo, hub)
    if commit is None:
        return None
    snapshot = folder_of(repo.repo, hub) / "snapshots" / commit
    names = choose(repo, sorted(names_in(snapshot)))
    return _found(snapshot, names) if _looks_right(repo, snapshot, names) else None


def listing(repo: str, commit: str, hub: Path) -> dict[str, Entry] | None:
    """Return all files that a repository has at a commit; None if that was never cached."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        tree = msgspec.json.decode((folder_of(repo, hub) / "trees" / f"{commit}.json").read_bytes(), type=_Tree)
        if tree.format_version == _FORMAT:
            return tree.files
    return None


def names_in(folder: Path) -> Iterator[str]:
    """Yield all files in a folder and below, by their paths from there."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if is_there(path):
                yield path.relative_to(folder).as_posix()


def _commit(repo: Repo, hub: Path) -> str | None:
    revision = repo.revision or MAIN
    if _COMMIT.fullmatch(revision):
        return revision
    with contextlib.suppress(OSError, ValueError):
        return (folder_of(repo.repo, hub) / "refs" / revision).read_text().strip() or None
    return None


def _found(snapshot: Path, names: list[str]) -> Found | None:
    size = 0
    for name in names:
        try:
            size += (snapshot / name).stat().st_size
        except OSError:  # no file, or a link to a blob that has gone
            return None
    return Found(snapshot, tuple(names), size)


def _looks_right(repo: Repo, snapshot: Path, names: list[str]) -> bool:
    if repo.extra == ALL:
        return "adapter_config.json" in names and any(name.startswith("adapter_model.") for name in names)
    if not repo.weights:
        return bool(names)
    weights = {name for name in names if is_weights(repo, name)}
    whole = all(name.endswith(".gguf") for name in weights) or any(config in names for config in _CONFIGS)
    return bool(weights) and whole and _unbroken(snapshot, weights)


def _unbroken(snapshot: Path, weights: set[str]) -> bool:
    """Return whether no shard is missing, by the index and by the shards' own names."""
    for index in snapshot.glob("*.index.json"):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            named = set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
            # There may be an index of another format besides, of which nothing was asked for.
            if named & weights and not named <= weights:
                return False
    return all(weights.issuperset(shards(name)) for name in weights)
