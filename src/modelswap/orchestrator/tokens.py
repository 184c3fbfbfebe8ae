"""The secret that gateways show to their orchestrator."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from modelswap.orchestrator.state import StateDirUnusable

VARIABLE: Final = "MODELSWAP_TOKEN"


def token(state: Path, env: Mapping[str, str] = os.environ) -> str:
    """Return ``MODELSWAP_TOKEN``, else what ``state/token`` holds, made first if it is missing (mode 0600).

    Raises `StateDirUnusable`.
    """
    if given := env.get(VARIABLE, "").strip():
        return given
    path = state / "token"
    try:
        if path.exists() and (kept := path.read_text().strip()):
            path.chmod(0o600)
            return kept
        made = secrets.token_urlsafe(32)
        # Written aside and renamed: a gateway that looks meanwhile never reads half of it.
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(made + "\n")
        fresh.replace(path)
    except (OSError, UnicodeDecodeError) as error:
        raise StateDirUnusable(f"can't keep the gateways' token in {path}: {error}; or set {VARIABLE}") from error
    return made
