"""What went wrong with a download, told from the library's and the system's exceptions.

Imports huggingface_hub: only for the process that downloads.
"""

from __future__ import annotations

import errno
from typing import Final

import httpx2
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from modelswap.weights.resuming import Damaged
from modelswap.weights.wire import Kind

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_ALLOWED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class NoWeights(Exception):
    """The repository has none of the files that the engine loads; the message names what kinds it has."""


class NoRoom(Exception):
    """What is still to come doesn't fit into the folder that the message names."""


def kind(error: BaseException) -> Kind:
    """Return what went wrong; where the library wraps an error, the one that caused it counts."""
    match error:
        case NoRoom():
            return "disk_full"
        case NoWeights():
            return "no_weights"
        case Damaged():
            return "damaged"
        case OfflineModeIsEnabled():
            return "offline"
        case GatedRepoError():
            return "gated"
        case RepositoryNotFoundError():
            return "not_found"
        case RevisionNotFoundError():
            return "no_revision"
        case HfHubHTTPError():
            return _status(error.response.status_code)
        case LocalEntryNotFoundError() | RevisionResolutionError() if error.__cause__ is not None:
            return kind(error.__cause__)
        case LocalEntryNotFoundError() | RevisionResolutionError() | httpx2.TransportError():
            return "unreachable"
        case EntryNotFoundError():
            return "damaged"
        case OSError(errno=number) if number in _FULL:
            return "disk_full"
        case OSError(errno=number) if number in _NOT_ALLOWED:
            return "not_writable"
        # The library's own, without a number (`file_download.http_get`).
        case OSError() if str(error).startswith("Consistency check failed"):
            return "damaged"
        case _:
            return "unexpected"


def _status(status: int) -> Kind:
    if status == 401:
        return "unauthorized"
    if status == 403:
        return "forbidden"
    return "unreachable" if status >= 500 or status in (408, 429) else "refused"
