"""Downloads of large files that can be taken up again where an earlier one was ended.

huggingface_hub 2.4 goes on after a broken connection, but a file that its process didn't finish it begins anew
(`file_download._download_to_tmp_and_move`). So large files are fetched here, with the library's own `http_get`, to
where the library looks for finished ones; all the rest, and what comes by Xet, is left to the library.

Imports huggingface_hub: only for the process that downloads.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx2
from filelock import FileLock, Timeout
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not marked as exported
    WeakFileLock,
    build_hf_headers,
)

from modelswap.weights.cache import Entry, folder_of

LARGE: Final = 8 << 20
"""Files from this size on (bytes) are worth it."""
PART: Final = ".modelswap.incomplete"
"""What a blob's name ends with until it is complete."""

_HAS_XET: Final = not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet") is not None
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_LEFTOVER: Final = re.compile(r"(?P<blob>.+)\.[0-9a-f]{8}\.incomplete")
_ABANDONED_AFTER: Final = 60.0
_TRIES: Final = 5
_CHUNK: Final = 1 << 20


class Damaged(Exception):
    """What came is not what the hub says it has; the message tells how it differs. It has been thrown away."""


def resumable(entry: Entry) -> bool:
    """Return whether a file of this kind is for us to fetch."""
    if entry.xet_hash is not None and _HAS_XET:
        return False
    return LARGE <= entry.size <= constants.MAX_HTTP_DOWNLOAD_SIZE


def prefetch(repo: str, name: str, commit: str, hub: Path) -> None:
    """Have the blob of a file in the cache, for the library to link to.

    Does nothing if the file comes by Xet. Raises what the library raises, and `Damaged`.
    """
    url = hf_hub_url(repo, name, revision=commit)
    metadata = get_hf_file_metadata(url)
    if metadata.etag is None or metadata.size is None or (metadata.xet_file_data is not None and _HAS_XET):
        return
    blobs = folder_of(repo, hub) / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    lock = _lock(repo, metadata.etag, hub)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        blob = blobs / metadata.etag
        if blob.exists():
            return
        part = blobs / (metadata.etag + PART)
        resumed = _fetch(url, part, metadata.size)
        if resumed and _SHA256.fullmatch(metadata.etag) and _sha256(part) != metadata.etag:
            part.unlink()
            raise Damaged(f"{name} has another checksum than the hub says")
        part.replace(blob)


def clear_leftovers(repo: str, hub: Path) -> None:
    """Remove what downloads left behind that were killed and can't be taken up again."""
    for path in _incomplete(folder_of(repo, hub) / "blobs"):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        # Who is downloading holds the lock; where locks don't work, it has written lately.
        with contextlib.suppress(OSError, Timeout, NotImplementedError):
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                with FileLock(_lock(repo, match["blob"], hub), timeout=0):
                    path.unlink()


def _fetch(url: str, part: Path, size: int) -> bool:
    """Fill ``part``; returns whether it was begun earlier."""
    tries = _TRIES
    with part.open("a+b") as out:
        begun = out.tell()
        if begun > size:
            begun = 0
            out.truncate(0)
        while True:
            had = out.seek(0, 2)
            try:
                http_get(url, out, resume_size=had, headers=build_hf_headers(), expected_size=size)
            except httpx2.TransportError:
                out.flush()
                tries = _TRIES if out.tell() > had else tries - 1
                if tries == 0:
                    raise
                time.sleep(1.0)
            except OSError as error:
                # It has no number where it is the library's own: the connection ended well, at the wrong length.
                if error.errno is not None or out.tell() <= size:
                    raise
                out.truncate(0)
                raise Damaged(str(error)) from error
            else:
                return begun > 0


def _lock(repo: str, blob: str, hub: Path) -> Path:
    """Return the lock that the library takes, too."""
    return hub / ".locks" / folder_of(repo, hub).name / f"{blob}.lock"


def _incomplete(blobs: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from blobs.glob("*.incomplete")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
