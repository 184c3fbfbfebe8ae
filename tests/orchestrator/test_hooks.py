"""Hooks: requests and commands around loads and unloads."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from modelswap.core import events
from modelswap.orchestrator.bringing_in import bring_in
from modelswap.orchestrator.hooks import HookFailed, run_hooks
from modelswap.orchestrator.putting_out import put_out
from tests.orchestrator.fakes import World


class Heard:
    """A server that notes what it is asked, and answers with ``status``."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any, str]] = []
        self.status = 200
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        """Note a request."""
        body = await request.json() if request.can_read_body else None
        self.requests.append((request.method, request.path_qs, body, request.headers.get("authorization", "")))
        return web.Response(status=self.status)


@pytest.fixture
async def heard() -> AsyncIterator[Heard]:
    """Listen."""
    made = Heard()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = runner.addresses[0] and f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


def script(folder: Path, body: str) -> list[str]:
    """Return the command that runs a line of Python."""
    file = folder / "hook.py"
    file.write_text(f"import os, time\n{body}\n")
    return [sys.executable, "-S", str(file)]


async def test_requests_are_sent_in_turn(world: World, heard: Heard) -> None:
    """With their methods and bodies."""
    hooks = [{"url": f"{heard.url}/one", "body": {"a": 1}}, {"url": f"{heard.url}/two?x=1", "method": "GET"}]
    hosted = world.host(hooks={"before_load": hooks})
    await run_hooks(world.outside, hosted, "before_load")
    assert heard.requests == [("POST", "/one", {"a": 1}, ""), ("GET", "/two?x=1", None, "")]
    await run_hooks(world.outside, hosted, "after_load")
    assert len(heard.requests) == 2


async def test_a_path_is_the_engines_own(world: World, heard: Heard) -> None:
    """It is asked where it listens, with its key; one that doesn't run can't be asked."""
    hook = {"url": "/slots/0?action=save", "on_failure": "fail"}
    hosted = world.host(hooks={"after_load": [hook]}, api_key="secret")
    with pytest.raises(HookFailed, match="doesn't run"):
        await run_hooks(world.outside, hosted, "after_load")
    port = int(heard.url.rpartition(":")[2])
    hosted.address = world.runtime.spawn("x", "a", "d").address.__class__("127.0.0.1", port)
    await run_hooks(world.outside, hosted, "after_load")
    assert heard.requests == [("POST", "/slots/0?action=save", None, "Bearer secret")]


async def test_a_command_hears_what_it_is_about(world: World, tmp_path: Path) -> None:
    """The model, the moment and the engine's address come in its environment."""
    out = tmp_path / "out"
    told = "[os.environ[k] for k in ('MODELSWAP_MODEL', 'MODELSWAP_HOOK', 'MODELSWAP_URL')]"
    command = script(tmp_path, f"open({str(out)!r}, 'w').write(' '.join({told}))")
    hosted = world.host_running(hooks={"after_load": [{"command": command, "on_failure": "fail"}]})
    await run_hooks(world.outside, hosted, "after_load")
    assert hosted.address is not None
    assert out.read_text() == f"a after_load {hosted.address.url}"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise SystemExit(3)", "exited with status 3$"),
        ("raise OSError('no such slot')", "exited with status 1: OSError: no such slot$"),
        ("time.sleep(60)", "longer than its timeout"),
    ],
)
async def test_a_command_that_fails(world: World, tmp_path: Path, body: str, reason: str) -> None:
    """It fails the load or not, as the config says; past its timeout it is killed, with all that it started."""
    hook = {"command": script(tmp_path, body), "timeout": 0.5}
    await run_hooks(world.outside, world.host(hooks={"before_load": [hook]}), "before_load")
    began = time.monotonic()
    hosted = world.host(hooks={"before_load": [{**hook, "on_failure": "fail"}]})
    with pytest.raises(HookFailed, match=reason):
        await run_hooks(world.outside, hosted, "before_load")
    assert time.monotonic() - began < 30


async def test_a_program_that_is_not_there_and_a_server_that_is_gone(world: World) -> None:
    """Both are failures like others."""
    for hook in ({"command": ["/nowhere/at/all"]}, {"url": "http://127.0.0.1:1/"}):
        hosted = world.host(hooks={"before_load": [{**hook, "on_failure": "fail"}]})
        with pytest.raises(HookFailed):
            await run_hooks(world.outside, hosted, "before_load")


async def test_a_failed_hook_fails_the_load(world: World, heard: Heard) -> None:
    """Before the engine is started, or after: then it is stopped, and its waiters hear why."""
    heard.status = 500
    for moment in ("before_load", "after_load"):
        hook = {"url": f"{heard.url}/{moment}", "on_failure": "fail"}
        hosted = world.host(f"a.1.{moment}", hooks={moment: [hook]})
        await bring_in(world.outside, hosted, adopted=False)
        failed = world.of(events.BringInFailed)[-1]
        assert f"hook {moment}[0] failed: it was answered with status 500" in failed.message
    assert not world.of(events.BroughtIn) and not world.runtime.living


async def test_hooks_run_around_a_life(world: World, heard: Heard) -> None:
    """Before and after the start, before and after the stop; a failure never holds up a stop."""
    hooks = {
        moment: [{"url": f"{heard.url}/{moment}"}]
        for moment in ("before_load", "after_load", "before_unload", "after_unload")
    }
    hosted = world.host(hooks=hooks)
    await bring_in(world.outside, hosted, adopted=False)
    heard.status = 500
    await put_out(world.outside, hosted.instance, kill=False)
    assert [path for _, path, _, _ in heard.requests] == [f"/{moment}" for moment in hooks]
    assert world.of(events.PutOut)


async def test_cancelling_kills_a_command(world: World, tmp_path: Path) -> None:
    """Nothing of it runs on."""
    marker = tmp_path / "began"
    command = script(tmp_path, f"open({str(marker)!r}, 'w').close(); time.sleep(60)")
    hosted = world.host(hooks={"before_load": [{"command": command}]})
    task = asyncio.create_task(run_hooks(world.outside, hosted, "before_load"))
    async with asyncio.timeout(30):
        while not marker.exists():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
