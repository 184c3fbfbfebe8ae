"""``modelswap status``, ``models`` and ``logs``: what the orchestrator knows, for people and for programs."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from rich.console import Console

from modelswap.cli import views
from modelswap.cli.client import AdminClient


def status(url: str, *, as_json: bool) -> None:
    """Print the whole state; raises `Failure`."""
    found = asyncio.run(_status(url))
    if as_json:
        print_json(found)
        return
    console = Console(highlight=False)
    for part in views.status(found, url):
        console.print(part)


def models(url: str, *, as_json: bool) -> None:
    """Print the configured models; raises `Failure`."""
    found = asyncio.run(_get(url, "/models"))
    if as_json:
        print_json(found)
        return
    console = Console(highlight=False)
    for part in views.models(found):
        console.print(part)


def logs(url: str, model: str, lines: int, *, follow: bool) -> None:
    """Print the last lines of a model's engine log, and the new ones if ``follow``; raises `Failure`."""
    asyncio.run(_logs(url, model, lines, follow=follow))


def print_json(value: Any) -> None:
    """Print ``value`` as JSON."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


async def _status(url: str) -> dict[str, Any]:
    async with AdminClient(url) as admin:
        return await admin.status()


async def _get(url: str, path: str) -> Any:
    async with AdminClient(url) as admin:
        return await admin.get(path)


async def _logs(url: str, model: str, lines: int, *, follow: bool) -> None:
    async with AdminClient(url) as admin:
        async for line in admin.logs(model, lines, follow=follow):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
