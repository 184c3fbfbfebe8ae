"""Puts what the containers said into the report of a test that failed on a stack it shares with others."""

from __future__ import annotations

import subprocess
from collections.abc import Generator

import pytest

from tests.docker.stack import ComposeStack, environment


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the logs of every stack that a failed test was given."""
    report = yield
    if report.failed and report.when == "call" and isinstance(item, pytest.Function):
        for stack in item.funcargs.values():
            if isinstance(stack, ComposeStack):
                report.sections.append((f"docker compose logs of {stack.project}", _logs(stack)))
    return report


def _logs(stack: ComposeStack) -> str:
    ran = subprocess.run(
        ["docker", "compose", "--profile", "models", "logs", "--timestamps", "--no-color", "--tail", "100"],
        cwd=stack.folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.stdout + ran.stderr
