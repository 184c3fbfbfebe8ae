"""Paths that may lie where we can't look."""

from __future__ import annotations

import os
from pathlib import Path


def is_there(path: Path) -> bool:
    """Return whether ``path`` leads to something that we may see.

    `Path.exists` raises where it can't look (until Python 3.14): in others' folders, for names that are too long.
    """
    return os.path.exists(path)  # noqa: PTH110 - see above


def is_file(path: Path) -> bool:
    """Return whether ``path`` leads to a file that we may see; `Path.is_file` raises as `Path.exists` does."""
    return os.path.isfile(path)  # noqa: PTH113 - see above
