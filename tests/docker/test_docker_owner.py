"""One orchestrator per Docker: several on a real one, in this process and in others that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import aiodocker
import pytest
from aiohttp import ClientTimeout, web

from modelswap.runtimes.docker import api
from modelswap.runtimes.docker.owner import PATIENCE, OtherOwner, sole_owner
from tests.docker.scratch import URL, Scratch, needs_root, private_daemon, scratch, short_folder

pytestmark = pytest.mark.docker

DEADLINE: Final = 60.0
SCRIPT: Final = Path(__file__).with_name("owning.py")


@pytest.fixture
async def box() -> AsyncIterator[Scratch]:
    async with scratch() as made:
        yield made


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as made:
        yield made


async def volumes(docker: aiodocker.Docker, prefix: str) -> list[str]:
    answer = await api.call(docker, "GET", "volumes")
    return sorted(each["Name"] for each in answer["Volumes"] or () if each["Name"].startswith(prefix))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not await condition():  # noqa: ASYNC110 - Docker's state
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def contender(box: Scratch, state_id: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start another process that wants to be owner."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.docker.owning", URL, state_id, box.prefix),
        cwd=SCRIPT.parents[2],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def says(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), DEADLINE)).decode().strip()


async def test_a_second_one_is_refused_at_once_and_told_who_is_there(box: Scratch) -> None:
    """It waits for no patience to run out: the first one answers."""
    async with contender(box, "first") as first:
        assert await says(first) == "owner"
        begin = time.monotonic()
        with pytest.raises(OtherOwner, match=rf"pid {first.pid} on .*stop that one first"):
            async with sole_owner(box.docker, "second", box.prefix):
                pytest.fail("two owners")
        assert time.monotonic() - begin < PATIENCE
    assert not any("knock" in name for name in await volumes(box.docker, box.prefix))


async def test_who_leaves_makes_room_at_once_and_leaves_nothing(box: Scratch) -> None:
    """Neither a volume nor a wait."""
    begin = time.monotonic()
    for state_id in ("one", "two", "one"):
        async with sole_owner(box.docker, state_id, box.prefix):
            assert len(await volumes(box.docker, box.prefix)) == 1
        assert await volumes(box.docker, box.prefix) == []
    assert time.monotonic() - begin < PATIENCE


async def test_one_that_was_killed_is_succeeded_after_a_knock(box: Scratch) -> None:
    """By another state folder's, which can't know but by asking."""
    async with contender(box, "first") as first:
        assert await says(first) == "owner"
        first.kill()
        await first.wait()
        left = await volumes(box.docker, box.prefix)
        async with sole_owner(box.docker, "second", box.prefix):
            now = await volumes(box.docker, box.prefix)
            assert len(now) == 1
            assert now != left
            with pytest.raises(OtherOwner):
                async with sole_owner(box.docker, "third", box.prefix):
                    pytest.fail("two owners")
    assert await volumes(box.docker, box.prefix) == []


async def test_one_that_stood_still_learns_that_it_was_succeeded(box: Scratch) -> None:
    """It doesn't take its place back when it goes on."""
    async with contender(box, "first") as first:
        assert await says(first) == "owner"
        first.send_signal(signal.SIGSTOP)
        async with sole_owner(box.docker, "second", box.prefix) as second:
            [ours] = await volumes(box.docker, box.prefix)
            first.send_signal(signal.SIGCONT)
            assert re.match(rf"lost: another modelswap .* pid {os.getpid()} on ", await says(first))
            assert await volumes(box.docker, box.prefix) == [ours]
            second.ensure()


async def test_our_own_predecessor_is_succeeded_at_once(box: Scratch) -> None:
    """Two can't hold one state folder's lock, so it is dead: a restart after kill -9 waits for nothing."""
    async with contender(box, "ours") as first:
        assert await says(first) == "owner"
        first.kill()
        await first.wait()
        begin = time.monotonic()
        async with sole_owner(box.docker, "ours", box.prefix):
            assert time.monotonic() - begin < PATIENCE / 2
            assert len(await volumes(box.docker, box.prefix)) == 1


@pytest.mark.parametrize("dead", [False, True], ids=["nobody was there", "somebody was killed"])
async def test_of_several_at_once_exactly_one_wins(box: Scratch, dead: bool) -> None:
    """Round after round, and the losers are told of a winner."""
    for attempt in range(2 if dead else 15):
        if dead:
            async with contender(box, f"dead-{attempt}") as first:
                assert await says(first) == "owner"
        won: list[str] = []
        refused: list[str] = []
        over = asyncio.Event()

        async def contend(state_id: str, won: list[str], refused: list[str], over: asyncio.Event) -> None:
            async with aiodocker.Docker(url=URL) as docker:
                try:
                    async with sole_owner(docker, state_id, box.prefix):
                        won.append(state_id)
                        await over.wait()
                except OtherOwner:
                    refused.append(state_id)

        async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(contend(f"{attempt}-{number}", won, refused, over))
            while len(won) + len(refused) < 5:  # noqa: ASYNC110 - five others' state
                await asyncio.sleep(0.02)
            assert len(won) == 1
            over.set()
        assert await volumes(box.docker, box.prefix) == []


async def test_processes_at_once_are_no_different(box: Scratch) -> None:
    """As two services that a boot starts."""
    async with contender(box, "one") as one, contender(box, "two") as two:
        said = sorted([(await says(one)).partition(":")[0], (await says(two)).partition(":")[0]])
        assert said == ["owner", "refused"]


async def test_a_knock_that_nobody_waits_for_is_tidied_away(box: Scratch) -> None:
    """Its sender was killed, and so was whom it was for."""
    async with contender(box, "dead") as dead:
        assert await says(dead) == "owner"
    async with contender(box, "knocking") as knocking:
        await until(lambda: has_knock(box))
        knocking.kill()
        await knocking.wait()
    assert await has_knock(box)
    async with sole_owner(box.docker, "living", box.prefix):
        await until(lambda: has_no_knock(box))
    assert await volumes(box.docker, box.prefix) == []


async def has_knock(box: Scratch) -> bool:
    return any("knock" in name for name in await volumes(box.docker, box.prefix))


async def has_no_knock(box: Scratch) -> bool:
    return not await has_knock(box)


async def test_an_owner_whose_volume_is_pruned_makes_it_again(box: Scratch) -> None:
    """No container uses it, so `docker volume prune` takes it."""
    async with sole_owner(box.docker, "first", box.prefix):
        (name,) = await volumes(box.docker, box.prefix)
        before = (await api.call(box.docker, "GET", f"volumes/{name}"))["CreatedAt"]
        await api.call(box.docker, "DELETE", f"volumes/{name}")
        await until(lambda: there_again(box, name))
        assert (await api.call(box.docker, "GET", f"volumes/{name}"))["CreatedAt"] >= before
        with pytest.raises(OtherOwner):
            async with sole_owner(box.docker, "second", box.prefix):
                pytest.fail("two owners")


async def there_again(box: Scratch, name: str) -> bool:
    return name in await volumes(box.docker, box.prefix)


@contextlib.asynccontextmanager
async def deaf(folder: Path) -> AsyncIterator[str]:
    """Serve Docker's API without its events, as a proxy that forbids or cuts them does; yields its URL."""
    async with aiodocker.Docker(url=URL) as docker:

        async def relay(request: web.Request) -> web.StreamResponse:
            if request.path.endswith("/events"):
                return web.json_response({"message": "not here"}, status=403)
            async with docker.session.request(
                request.method,
                f"{docker.docker_host}{request.path_qs}",
                data=await request.read(),
                headers={"content-type": "application/json"},
                timeout=ClientTimeout(30),
            ) as answer:
                return web.Response(
                    status=answer.status, body=await answer.read(), content_type=answer.content_type or None
                )

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", relay)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(folder / "deaf.sock")).start()
        try:
            yield f"unix://{folder}/deaf.sock"
        finally:
            await runner.cleanup()


async def test_an_owner_that_hears_no_events_answers_all_the_same(box: Scratch, folder: Path) -> None:
    """It looks every second then, well within the patience."""
    async with (
        deaf(folder) as url,
        aiodocker.Docker(url=url) as docker,
        sole_owner(docker, "deaf", box.prefix),
    ):
        for state_id in ("second", "third"):
            with pytest.raises(OtherOwner):
                async with sole_owner(box.docker, state_id, box.prefix):
                    pytest.fail("two owners")


@needs_root
async def test_an_owner_stays_owner_when_docker_is_restarted(folder: Path) -> None:
    """The volume is still there, and it hears of others again."""
    prefix = f"msw-{uuid.uuid4().hex[:8]}"
    async with (
        private_daemon(folder) as daemon,
        aiodocker.Docker(url=daemon.url) as ours,
        aiodocker.Docker(url=daemon.url) as theirs,
    ):
        async with sole_owner(ours, "first", prefix):
            await daemon.stop()
            await daemon.start()
            with pytest.raises(OtherOwner):
                async with sole_owner(theirs, "second", prefix):
                    pytest.fail("two owners")
        async with sole_owner(theirs, "second", prefix):
            assert len(await volumes(theirs, prefix)) == 1
            await daemon.stop()
        await daemon.start()
        # Away when it left, so its volume is still there: nobody answers for it.
        async with sole_owner(ours, "first", prefix):
            assert len(await volumes(ours, prefix)) == 1
