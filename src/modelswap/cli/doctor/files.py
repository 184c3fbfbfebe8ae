"""Files of ours: who may read and write them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from modelswap.cli.doctor.finding import Finding, fine, problem, warning
from modelswap.cli.doctor.scene import Scene, ToldElsewhere
from modelswap.engines.paths import is_there
from modelswap.orchestrator.state import state_dir
from modelswap.spec.config import Config

_SECRET_NAME: Final = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_IN_A_CONTAINER: Final = Path("/.dockerenv")
_FEW: Final = 8
"""Shorter values than this aren't searched for in the file: they would be found by chance."""


async def config_file(scene: Scene) -> list[Finding]:
    """Whether others can read secrets that stand in the config file."""
    if scene.config_error is not None or not scene.path.is_file():
        raise ToldElsewhere
    return of_config_file(scene.path, scene.config)


def of_config_file(path: Path, config: Config) -> list[Finding]:
    """Judge the file's mode, and what it holds."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & 0o044:
        return [fine(f"{path} can be read by its owner only")]
    text = path.read_text(encoding="utf-8", errors="replace")
    held = sorted({place for place, value in _secrets(config) if len(value) >= _FEW and value in text})
    if not held:
        return [fine(f"{path} holds no secrets")]
    message = f"{path} holds secrets ({', '.join(held)}), and every user of this machine can read it"
    return [warning(message, f'chmod 600 {path}, or take them from the environment: "${{NAME}}"')]


def _secrets(config: Config) -> Iterator[tuple[str, str]]:
    for name, model in config.models.items():
        if model.api_key is not None:
            yield f"models.{name}.api_key", model.api_key.get_secret_value()
        for variable, value in model.env.items():
            if _SECRET_NAME.search(variable):
                yield f"models.{name}.env.{variable}", value


async def state(scene: Scene) -> list[Finding]:
    """Whether the state folder is ours, ours alone, and can be written."""
    return of_state(state_dir(scene.config, scene.env), inside=_IN_A_CONTAINER.exists())


def of_state(folder: Path, *, inside: bool = False) -> list[Finding]:
    """Judge the state folder and the token in it.

    ``inside`` a container the folder is a volume that belongs to modelswap's containers, whatever user they run as.
    """
    if not is_there(folder):
        above = next(filter(is_there, folder.parents))
        if not os.access(above, os.W_OK | os.X_OK):
            message = f"the state folder {folder} can't be made: {above} can't be written by this user"
            return [problem(message, "name another in orchestrator.state_dir")]
        return [fine(f"the state folder {folder} will be made when it is needed")]
    if not folder.is_dir():
        return [problem(f"{folder} is no folder", "move it away, or name another in orchestrator.state_dir")]
    found = list(_state_faults(folder, inside=inside))
    return found or [fine(f"the state folder {folder} is ours alone")]


def _state_faults(folder: Path, *, inside: bool) -> Iterator[Finding]:
    seen = folder.stat()
    if seen.st_uid != os.geteuid() and not inside:
        message = f"the state folder {folder} belongs to uid {seen.st_uid}, and we are uid {os.geteuid()}"
        yield problem(message, f"run modelswap as that user, or: sudo chown -R {os.geteuid()} {folder}")
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield problem(f"the state folder {folder} can't be written", f"chmod 700 {folder}")
    if stat.S_IMODE(seen.st_mode) & 0o077 and not inside:
        yield warning(f"the state folder {folder} can be entered by others", f"chmod 700 {folder}")
    token = folder / "token"
    try:
        mode = stat.S_IMODE(token.stat().st_mode)
    except OSError:  # not made yet, or what was said above keeps us out
        return
    if mode & 0o077:
        message = f"the gateways' token {token} can be read by others, who could pass for a gateway"
        yield warning(message, f"chmod 600 {token}; to be sure, remove it and restart both services")
