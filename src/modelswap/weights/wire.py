"""What `weights.download` and the process that downloads say to each other: one line of JSON each."""

from __future__ import annotations

from typing import Literal

import msgspec

from modelswap.weights.repo import Repo

Kind = Literal[
    "not_found",
    "no_revision",
    "no_weights",
    "gated",
    "unauthorized",
    "forbidden",
    "offline",
    "unreachable",
    "refused",
    "damaged",
    "disk_full",
    "not_writable",
    "unexpected",
]


class Job(msgspec.Struct, frozen=True):
    """The first line on standard input; its end of file means that nobody wants the download any more.

    ``hub`` is the cache folder. Holds no secrets: those are in the environment.
    """

    repos: list[Repo]
    hub: str


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Bytes that are here, of all that are wanted; ``came`` are those that this process fetched."""

    done: int
    total: int
    came: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """The end: where the first repository's files are, the bytes of all files, and those that were fetched."""

    path: str
    total: int
    came: int


class Failed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The other end. ``detail`` is what a library or the system said; it may hold secrets.

    ``needed`` and ``free`` are bytes, for ``disk_full``.
    """

    kind: Kind
    repo: str
    revision: str | None = None
    detail: str = ""
    folder: str = ""
    needed: int = 0
    free: int = 0


Said = Progress | Done | Failed
