"""``modelswap doctor``: everything that models need, looked at side by side."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rich.console import Console

from modelswap.cli.doctor import (
    adopted,
    configured,
    disk,
    engine,
    files,
    gpu,
    images,
    printing,
    services,
    speed,
    weights,
)
from modelswap.cli.doctor.finding import Level
from modelswap.cli.doctor.outside import real_scene
from modelswap.cli.doctor.run import Check, Report, examine
from modelswap.cli.failure import ExitCode
from modelswap.spec.config import Config
from modelswap.spec.errors import ConfigError
from modelswap.spec.load import load

_DEEP: Final = 120.0

CHECKS: Final = (
    Check("Config", "the config file", configured.usable),
    Check("Config", "who may read the config file", files.config_file),
    Check("Config", "the state folder", files.state),
    Check("Services", "the orchestrator", services.running),
    Check("Services", "the addresses to listen at", services.can_listen),
    Check("Services", "the engines' ports", services.engine_ports),
    Check("GPU", "the device", gpu.seen),
    Check("GPU", "whether models fit on the device", gpu.fits),
    Check("Docker", "Docker", engine.reached),
    Check("Docker", "whether Docker can give GPUs", engine.gives_gpus),
    Check("Containers", "images", images.here),
    Check("Containers", "what images are given", images.settings),
    Check("Containers", "containers of adopted models", adopted.made_right),
    Check("Containers", "GPUs in containers", images.see_gpus, _DEEP),
    Check("Weights", "weights", weights.here),
    Check("Weights", "cache folders", weights.caches),
    Check("Speed", "how fast models come in", speed.ways),
    Check("Room", "disks", disk.room),
    Check("Room", "host memory", disk.memory),
)


def doctor(
    path: Path, *, default: Path, as_json: bool, deep: bool, leave: Callable[[int], None] = os._exit
) -> ExitCode:
    """Look, print what was found, and return 1 if something will not work.

    There need not be a config file at ``path`` if it is the ``default``: then the machine is looked at. ``leave`` ends
    the process where something hangs that Python would wait for (a GPU driver, a network disk).
    """
    config, error = _config(path, default)
    report = asyncio.run(_report(path, config, error, deep=deep))
    if as_json:
        sys.stdout.write(printing.as_json(report) + "\n")
    else:
        printing.show(report, Console(highlight=False))
    code = ExitCode.FAILED if report.count(Level.PROBLEM) else ExitCode.OK
    if report.hung:
        sys.stdout.flush()
        leave(code)
    return code


async def _report(path: Path, config: Config, error: str | None, *, deep: bool) -> Report:
    async with real_scene(path, config, config_error=error, deep=deep) as scene:
        return await examine(scene, CHECKS)


def _config(path: Path, default: Path) -> tuple[Config, str | None]:
    """Return the config, or one with nothing but defaults and why; none at the usual place is no error."""
    try:
        return load(path), None
    except ConfigError as error:
        nobody_asked = path == default and not os.path.lexists(path)
        return Config(models={}), None if nobody_asked else str(error)
