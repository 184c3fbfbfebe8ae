"""Taking in orphans."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from modelswap.runtimes import reaper


async def test_orphans_are_collected_and_our_children_are_not() -> None:
    """A subreaper collects a grandchild whose parent has died, and leaves its own children to who waits for them."""
    script = Path(__file__).with_name("reaping.py")
    process = await asyncio.create_subprocess_exec(sys.executable, script, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    assert (process.returncode, said) == (0, b"ok\n")


def test_other_systems_have_no_subreapers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no subreapers, nothing is taken in, and nothing breaks."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not reaper.become_subreaper()
    assert reaper.reap_orphans([]) == []
