"""``modelswap up``: everything under one supervisor, until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import modelswap
from modelswap.cli.failure import ExitCode
from modelswap.cli.running import run_stack
from modelswap.cli.settings import load_config
from modelswap.cli.stack import Stack
from modelswap.spec.config import Config


def up(path: Path) -> ExitCode:
    """Run the services of the config file at ``path`` until a signal; raises `Failure`."""
    config = load_config(path)
    console = Console(stderr=True, highlight=False)

    def say(line: str) -> None:
        say_to(console, line)

    async def stay(stack: Stack) -> None:
        with contextlib.suppress(OSError):
            console.print(banner(config, stack.gateway_url, stack.orchestrator_url))
        await asyncio.Event().wait()

    code = asyncio.run(run_stack(config, path, say, stay))
    say("stopped")
    return code


def say_to(console: Console, line: str) -> None:
    """Tell the user something in one line; a terminal that has gone is no reason to fail."""
    with contextlib.suppress(OSError):
        console.print(Text.assemble(("modelswap: ", "bold cyan"), line), soft_wrap=True)


def banner(config: Config, gateway_url: str, orchestrator_url: str) -> Table:
    """Return what is running and where, in a few lines."""
    table = Table.grid(padding=(0, 2))
    table.add_row(Text(f"modelswap {modelswap.__version__}", "bold cyan"), "is up; Ctrl-C stops it")
    table.add_row("  OpenAI API", Text(f"{gateway_url}/v1", "bold"))
    table.add_row("  orchestrator", Text(f"{orchestrator_url}/status"))
    taking_turns = [name for name, model in config.models.items() if model.device != "none"]
    beside = [name for name, model in config.models.items() if model.device == "none"]
    if taking_turns:
        table.add_row("  models", ", ".join(taking_turns))
    if beside:
        table.add_row("  beside them", ", ".join(beside))
    return table
