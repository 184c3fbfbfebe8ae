"""Finding an engine's program, and models that are files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from modelswap.engines.base import Address
from modelswap.engines.paths import is_there
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.spec.config import Model

# What begins an image's entrypoint without being the program: inits, and NVIDIA's greeting.
_WRAPPERS: Final = frozenset({"tini", "dumb-init", "catatonit", "docker-init", "nvidia_entrypoint.sh", "env"})


class NotInstalled(ModelswapError):
    """Raised when an engine's program can't be found; the message says how to get it."""

    code = Code.MODEL_BROKEN


class NoSuchModel(ModelswapError):
    """Raised when a model that can only be a file isn't there."""

    code = Code.MODEL_BROKEN


def on_path(program: str, model: Model) -> str | None:
    """Return where ``program`` lies on the PATH that the engine will see; None if it doesn't."""
    return shutil.which(program, path=model.env.get("PATH") or os.environ.get("PATH"))


def placed(text: str, address: Address) -> str:
    """Return ``text`` with ``{host}`` and ``{port}`` replaced; all other braces stay."""
    return text.replace("{host}", address.host).replace("{port}", str(address.port))


def folder(model: Model) -> str | None:
    """Return the working folder for a `Launch`."""
    return str(model.cwd) if model.cwd else None


def local(text: str, model: Model) -> Path | None:
    """Return ``text`` as the file or folder it names, seen from the engine's working folder; None if it names none."""
    path = Path(text).expanduser() if text.startswith("~/") else Path(text)
    return path if is_there((model.cwd or Path()) / path) else None


def only_wraps(entrypoint: Sequence[str]) -> bool:
    """Return whether an image's ``entrypoint`` (``tini --``, say) runs whatever it is given."""
    if not entrypoint:
        return True
    if PurePosixPath(entrypoint[0]).name not in _WRAPPERS:
        return False
    return all(word.startswith("-") for word in entrypoint[1:])
