"""``python -m modelswap.weights.fetcher``: the process that downloads.

Reads a `wire.Job` from standard input, tells `wire.Progress` on standard output and at last `Done` or `Failed`. It ends
at once when its standard input does: then nobody waits for it any more. Killing it loses nothing but the part of a file
that came by Xet.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final

import msgspec
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.hf_api import RepoFile

from modelswap.engines.paths import is_there
from modelswap.weights import cache, resuming, wire
from modelswap.weights.cache import Entry, folder_of
from modelswap.weights.faults import NoRoom, NoWeights, kind
from modelswap.weights.repo import Repo, choose, is_weights

_AT_ONCE: Final = 8
_STEP: Final = 1 << 20
_TELL_EVERY: Final = 0.2
_BLOCK: Final = 512


class Part:
    """One repository's share of a download: the commit meant, and the files that are loaded."""

    def __init__(self, repo: Repo, hub: Path) -> None:
        self.repo = repo
        self.hub = Path(repo.folder) if repo.folder else hub
        api = HfApi()
        self.revision = api.resolve_revision(repo.repo, revision=repo.revision, cache_dir=self.hub)
        self.commit = self.revision.resolved
        tree = cache.listing(repo.repo, self.commit, self.hub)
        if tree is None:
            listed = api.list_repo_tree(repo.repo, recursive=True, revision=self.commit)
            tree = {file.path: _entry(file) for file in listed if isinstance(file, RepoFile)}
        self.files = {name: tree[name] for name in choose(repo, tree)}
        if repo.weights and not any(is_weights(repo, name) for name in self.files):
            raise NoWeights(", ".join(sorted({Path(name).suffix or name for name in tree})))
        self._folder = folder_of(repo.repo, self.hub)

    @property
    def total(self) -> int:
        """The bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def here(self) -> int:
        """Return how many bytes of them are in the cache, the beginnings of files included."""
        return sum(min(entry.size, self._bytes(name, entry)) for name, entry in self.files.items())

    def missing(self) -> list[str]:
        """Return the files whose contents are not in the cache yet."""
        blobs = self._folder / "blobs"
        return [
            name
            for name, entry in self.files.items()
            if not self._linked(name).exists() and not (blobs / entry.blob).exists()
        ]

    def link(self) -> str:
        """Download the rest with the library, and return the snapshot's folder."""
        allowed = [glob.escape(name) for name in self.files]
        return snapshot_download(self.repo.repo, revision=self.revision, cache_dir=self.hub, allow_patterns=allowed)

    def _linked(self, name: str) -> Path:
        return self._folder / "snapshots" / self.commit / name

    def _bytes(self, name: str, entry: Entry) -> int:
        if self._linked(name).exists():
            return entry.size
        blobs = self._folder / "blobs"
        if (blobs / entry.blob).exists():
            return entry.size
        return max((_written(path) for path in blobs.glob(f"{entry.blob}*.incomplete")), default=0)


class Teller:
    """Tells how far the parts are, from a thread of its own, and at last how it ended."""

    def __init__(self, out: int) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._parts: Sequence[Part] = ()
        self._began_with = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="teller", daemon=True)

    def begin(self, parts: Sequence[Part]) -> None:
        """Begin to tell about ``parts``."""
        self._parts = parts
        self._began_with = sum(part.here() for part in parts)
        self._thread.start()

    def end(self, path: str) -> None:
        """Tell that everything is there."""
        self._stop.set()
        self._thread.join()
        total = sum(part.total for part in self._parts)
        self.say(wire.Progress(total, total, total - self._began_with))
        self.say(wire.Done(path, total, total - self._began_with))

    def say(self, what: wire.Said) -> None:
        """Write a line."""
        line = msgspec.json.encode(what) + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._out, line) :]

    def _tell(self) -> None:
        total = sum(part.total for part in self._parts)
        while not self._stop.wait(_TELL_EVERY):
            done = sum(part.here() for part in self._parts)
            self.say(wire.Progress(done, total, max(0, done - self._began_with)))


def main() -> int:
    """Download what standard input says; returns the process's exit status."""
    # The library's own steps of 10 MB are what a kill would cost per file, and as coarse would progress be.
    constants.DOWNLOAD_CHUNK_SIZE = _STEP
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is none of the protocol
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=wire.Job)
    threading.Thread(target=_end_with_input, name="input", daemon=True).start()
    teller = Teller(out)
    hub = Path(job.hub)
    at = job.repos[0]
    parts = []
    try:
        for at in job.repos:
            _make(Path(at.folder or hub))
            part = Part(at, hub)
            parts.append(part)
            resuming.clear_leftovers(at.repo, part.hub)
        _need_room(parts)
        teller.begin(parts)
        folders = []
        for part in parts:
            at = part.repo
            _prefetch(part)
            folders.append(part.link())
    except Exception as error:  # noqa: BLE001 - whatever it is, the other process has to hear of it
        teller.say(_failure(error, at, Path(at.folder or hub), parts))
        return 1
    teller.end(folders[0])
    return 0


def _end_with_input() -> None:
    # Not through sys.stdin, whose lock would be held while the interpreter ends.
    while os.read(0, 1024):
        pass
    os._exit(3)


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _need_room(parts: Sequence[Part]) -> None:
    """Raise `NoRoom` if what is still to come can't be kept."""
    for hub in {part.hub for part in parts}:
        needed, free = _room(hub, parts)
        if needed > free:
            raise NoRoom(str(hub))


def _room(hub: Path, parts: Sequence[Part]) -> tuple[int, int]:
    """Return how many bytes are still to come into a cache folder, and how many are free there."""
    there = next(filter(is_there, (hub, *hub.parents)))
    return sum(part.total - part.here() for part in parts if part.hub == hub), shutil.disk_usage(there).free


def _prefetch(part: Part) -> None:
    names = [name for name in part.missing() if resuming.resumable(part.files[name])]
    if not names:
        return
    pool = ThreadPoolExecutor(_AT_ONCE)
    futures = [pool.submit(resuming.prefetch, part.repo.repo, name, part.commit, part.hub) for name in names]
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    # If one has failed the others end with this process.
    pool.shutdown(wait=False, cancel_futures=True)
    for future in done:
        future.result()


def _entry(file: RepoFile) -> Entry:
    return Entry(file.size, file.blob_id, file.lfs.sha256 if file.lfs is not None else None, file.xet_hash)


def _written(path: Path) -> int:
    try:
        stat = path.stat()
    except OSError:
        return 0
    # Xet may write a file from several ends.
    return stat.st_size if path.name.endswith(resuming.PART) else min(stat.st_size, stat.st_blocks * _BLOCK)


def _failure(error: Exception, repo: Repo, hub: Path, parts: Sequence[Part]) -> wire.Failed:
    failed = wire.Failed(
        kind=kind(error),
        repo=repo.repo,
        revision=repo.revision,
        detail=str(error) if isinstance(error, NoWeights) else f"{type(error).__name__}: {error}",
        folder=str(hub),
    )
    if failed.kind == "disk_full":
        needed, free = _room(hub, parts)
        return msgspec.structs.replace(failed, needed=needed, free=free)
    return failed


if __name__ == "__main__":
    code = main()
    # Threads that still download must not keep the process.
    os._exit(code)
