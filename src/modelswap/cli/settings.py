"""The config file, as the commands read it."""

from __future__ import annotations

import os
from pathlib import Path

from modelswap.cli import addresses
from modelswap.cli.failure import ExitCode, Failure
from modelswap.spec.config import Config
from modelswap.spec.errors import ConfigError
from modelswap.spec.load import load


def load_config(path: Path) -> Config:
    """Read the config file; raises `Failure` with every problem found."""
    try:
        return load(path)
    except ConfigError as error:
        raise config_failure(error) from error


def config_failure(error: ConfigError) -> Failure:
    """Return the failure that tells every problem."""
    problems = [str(problem) for problem in error.problems]
    if len(problems) == 1:
        return Failure(problems[0], code=ExitCode.USAGE)
    listed = "".join(f"\n  {problem}" for problem in problems)
    return Failure(f"{len(problems)} problems in the config file{listed}", code=ExitCode.USAGE)


def orchestrator_url(path: Path, url: str | None, *, default: Path) -> str:
    """Return where the orchestrator is: ``url``, else what the config file says, else the usual address.

    A missing config file is an error only if it isn't the ``default`` one; raises `Failure`.
    """
    if url:
        return url if "://" in url else f"http://{url}"
    if path == default and not os.path.lexists(path):
        return "http://127.0.0.1:8888"
    try:
        config = load_config(path)
    except Failure as failure:
        raise Failure(str(failure), "mend it, or say with --url where the orchestrator is", ExitCode.USAGE) from failure
    return addresses.url(config.orchestrator.host, config.orchestrator.port)
