"""Runs the whole stack around something: what `up` and `demo` share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import IO, Any

from modelswap.cli.failure import ExitCode, Failure
from modelswap.cli.signals import stop_signals
from modelswap.cli.stack import Say, Stack, check_addresses
from modelswap.cli.supervisor import Supervisor
from modelswap.cli.waiting import first
from modelswap.orchestrator import tokens
from modelswap.orchestrator.state import StateDirUnusable, prepare, state_dir
from modelswap.spec.config import Config


async def run_stack(
    config: Config,
    path: Path,
    say: Say,
    act: Callable[[Stack], Coroutine[Any, Any, None]],
    *,
    output: IO[bytes] | None = None,
) -> ExitCode:
    """Start everything, do ``act`` when it is ready, and stop everything when that returns or a signal comes.

    ``output`` is where the services log to (None: our stderr). Raises `Failure`.
    """
    async with Supervisor(say, output=output) as supervisor:
        stack = Stack(config, path, supervisor, say)
        with stop_signals(stack.reload) as stopping:
            if await first(stopping.asked.wait(), check_addresses(config, say)) == 0:
                return ExitCode.INTERRUPTED
            _make_token(config)
            stack.start()

            async def use() -> None:
                await stack.ready()
                await first(act(stack), stack.watch())

            try:
                ended = await first(stopping.asked.wait(), supervisor.misconfigured.wait(), use())
            except BaseException:
                await stack.stop(stopping.hurry)
                raise
            if ended == 1:
                await stack.end_services()
                raise Failure("a service can't work with this config", "see what it said above", ExitCode.USAGE)
            if ended == 0:
                if stopping.interrupted and sys.stderr.isatty():
                    sys.stderr.write("\n")  # the terminal has just shown ^C
                say("stopping: running requests may finish; press Ctrl-C again to stop at once")
            await stack.stop(stopping.hurry)
            return ExitCode.INTERRUPTED if stopping.hurry.is_set() else ExitCode.OK


def _make_token(config: Config) -> None:
    """Make the gateways' token, so that they needn't wait for the orchestrator to do it."""
    try:
        folder = state_dir(config)
        prepare(folder)
        tokens.token(folder)
    except StateDirUnusable as error:
        raise Failure(str(error), code=ExitCode.USAGE) from error
