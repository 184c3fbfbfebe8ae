"""Containers on standby when Docker fails: against an engine that fails as it is told to."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiodocker
import msgspec
import pytest
import structlog
from aiohttp import web

from modelswap.engines.base import Launch, StandbyPlan
from modelswap.runtimes.base import Known, StandbyState, StartFailed, StartOrder
from modelswap.runtimes.docker import execs, standbys
from modelswap.runtimes.docker.body import STANDBY
from modelswap.runtimes.docker.opening import open_runtime
from modelswap.runtimes.docker.runtime import DockerRuntime
from modelswap.spec import config
from modelswap.spec.config import Model
from modelswap.testing.waiting import until
from tests.runtimes.docker_fake import FakeDocker, Handler, fake_docker

SPEC = Model(engine="custom", command=["serve"], image="img", port=8000)
PLAN = StandbyPlan("k", ("python3",), Path(__file__), {}, spec=SPEC)


class Bench:
    """A runtime over a fake engine; ``answers`` are what the one that waits says, in turn, the last one for good."""

    def __init__(self, fake: FakeDocker, runtime: DockerRuntime) -> None:
        self.fake = fake
        self.runtime = runtime
        self.answers: list[bytes | Exception] = [b'{"ready": true}']
        self.refused: dict[tuple[str, str], str] = {}
        """What Docker objects to, by method and the path's last part."""
        self.status = 500
        """As what it objects."""
        self.asked: list[tuple[str, str]] = []
        """What was asked for, in the same terms."""

    async def fault(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer in the engine's place."""
        last = request.path.rpartition("/")[2]
        self.asked.append((request.method, last))
        if (objection := self.refused.get((request.method, last))) is not None:
            return web.json_response({"message": objection}, status=self.status)
        if (request.method, last) == ("PUT", "archive"):
            assert b"modelswap_standby.py" in await request.read()
            return web.Response()
        if last in ("stats", "rename"):
            return web.json_response({"memory_stats": {"usage": 7}})
        return await handler(request)

    async def ask(self, *_: Any, **__: Any) -> bytes:
        """Answer in the place of a command in the container."""
        said = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(said, Exception):
            raise said
        return said

    async def settled(self) -> StandbyState:
        """Have one wait; returns once it is ready or known not to be made."""
        await self.runtime.stand_by([PLAN])
        await until(lambda: any(one.ready or one.problem for one in self.runtime.standbys()))
        return self.runtime.standbys()[0]

    def waiting(self) -> list[str]:
        """Return the containers that were made to wait."""
        return [each.id for each in self.fake.containers.values() if STANDBY in each.body["Labels"]]

    async def order(self) -> StartOrder:
        """Return an order that may spend what waits."""
        place = await self.runtime.allocate(SPEC)
        launch = Launch((*(place.program or ()), "--now"), {"KEY": "secret"})
        return StartOrder(
            instance="i1", model="m", definition="d", spec=SPEC, launch=launch, address=place.address, standby=PLAN
        )


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    async with contextlib.AsyncExitStack() as stack:
        fake = await stack.enter_async_context(fake_docker(tmp_path / "docker.sock"))
        opened = open_runtime(
            tmp_path / "state", config.Docker(host=fake.host), gpu=0, port_of=lambda _: 8000, kill_timeout=0.2
        )
        runtime = await stack.enter_async_context(opened)
        await runtime.configure({"m": Known(SPEC, "d")})
        await until(lambda: fake.streams > 0)
        bench = Bench(fake, runtime)
        fake.fault = bench.fault
        monkeypatch.setattr(execs, "ask", bench.ask)
        yield bench


async def test_it_is_asked_until_it_is_ready(bench: Bench) -> None:
    """Whatever the command says before that, or that it can't be run, is no reason to give up."""
    bench.answers = [b"", OSError("not now"), b"{}", b'{"ready": true}']
    state = await bench.settled()
    assert state == StandbyState(key="k", ready=True, host_bytes=7)


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (("POST", "create"), "no room"),
        (("PUT", "archive"), "no room"),
        (("POST", "start"), "no room"),
    ],
)
async def test_what_docker_refuses_is_the_problem(bench: Bench, refused: tuple[str, str], reason: str) -> None:
    """A standby that can't be made says why, and leaves no container."""
    bench.refused[refused] = "no room for this"
    state = await bench.settled()
    assert reason in state.problem and not state.ready
    await until(lambda: not bench.waiting())


FORBIDDEN = "<html><body><h1>403 Forbidden</h1>\nRequest forbidden by administrative rules.\n</body></html>"


@pytest.mark.parametrize("call", ["create", "archive", "start", "exec"])
async def test_what_a_filter_refuses_is_not_tried_again(
    bench: Bench, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket proxy goes on refusing: one line says what to do about it, and that's that until the config changes."""
    monkeypatch.setattr(standbys, "_RETRY_AFTER", 0.0)
    monkeypatch.setattr(standbys, "_RETRY_SOON", 0.0)
    bench.status = 403
    if call == "exec":
        bench.answers = [aiodocker.DockerError(403, FORBIDDEN)]
    else:
        bench.refused["PUT" if call == "archive" else "POST", call] = FORBIDDEN
    with structlog.testing.capture_logs() as logs:
        state = await bench.settled()
        assert "standby: false" in state.problem and "forbidden by administrative rules" in state.problem
        await until(lambda: not bench.waiting())
        bench.asked.clear()
        await bench.runtime.stand_by([])
        await bench.runtime.stand_by([PLAN, msgspec.structs.replace(PLAN, key="other")])
        await bench.runtime.configure({"m": Known(SPEC, "d")})
        await bench.runtime.stand_by([PLAN])
        assert [one.key for one in bench.runtime.standbys() if one.problem == state.problem] == ["k", "other"]
        running = await bench.runtime.start(await bench.order()) if call in ("archive", "exec") else None
    [told] = [entry for entry in logs if entry["log_level"] == "warning"]
    assert "standby: false" in told["event"] and "<" not in told["reason"]
    assert running is None or running.mechanism == "cold"
    assert bench.asked.count(("POST", "create")) == (running is not None)
    bench.refused.clear()
    bench.answers = [b'{"ready": true}']
    await bench.runtime.configure({"m": Known(SPEC, "changed")})
    await bench.runtime.stand_by([PLAN])
    await until(lambda: any(one.ready for one in bench.runtime.standbys()))


async def test_without_its_image_there_is_none(bench: Bench) -> None:
    """An image that hasn't come yet is the problem."""
    bench.fake.images.clear()
    assert "img isn't here" in (await bench.settled()).problem


@pytest.mark.parametrize("lost", [b"", TimeoutError(), ConnectionResetError("gone")])
async def test_if_the_answer_is_lost_it_is_removed_first(bench: Bench, lost: bytes | Exception) -> None:
    """It may have become the engine: it has gone before a cold start holds the same device."""
    await bench.settled()
    bench.answers = [lost]
    running = await bench.runtime.start(await bench.order())
    assert running.mechanism == "cold" and bench.waiting() == []
    assert await bench.runtime.instances() == [running]


async def test_without_being_able_to_remove_it_nothing_is_started(bench: Bench) -> None:
    """As long as it may have become the engine, a second one must not start."""
    await bench.settled()
    [container] = bench.waiting()
    bench.answers = [TimeoutError()]
    bench.refused["DELETE", container] = "it hurts"
    with pytest.raises(StartFailed, match="it hurts"):
        await bench.runtime.start(await bench.order())
    assert [each.id for each in bench.fake.containers.values() if each.running] == [container]
    bench.refused.clear()
    assert len(await bench.runtime.sweep(set())) == 1
    assert bench.waiting() == []


async def test_one_that_was_not_told_yet_is_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If we are killed before the order is given, the one after us doesn't take what still waits for an engine."""
    state, docker = tmp_path / "state", config.Docker(host=f"unix://{tmp_path}/docker.sock")
    noted: dict[Path, bytes] = {}
    async with fake_docker(tmp_path / "docker.sock") as fake:
        async with open_runtime(state, docker, gpu=0, port_of=lambda _: 8000, kill_timeout=0.2) as runtime:
            await runtime.configure({"m": Known(SPEC, "d")})
            bench = Bench(fake, runtime)
            fake.fault = bench.fault

            async def ask(*arguments: Any, **options: Any) -> bytes:
                if b"argv" not in arguments[3]:
                    return b'{"ready": true}'
                noted.update({path: path.read_bytes() for path in (state / "docker" / "starts").glob("*.json")})
                return b'{"taken": true}'

            monkeypatch.setattr(execs, "ask", ask)
            await bench.settled()
            running = await runtime.start(await bench.order())
            assert running.mechanism == "standby" and await runtime.instances() == [running]
        assert noted
        for path, content in noted.items():
            path.write_bytes(content)
        async with open_runtime(state, docker, gpu=0, port_of=lambda _: 8000, kill_timeout=0.2) as runtime:
            await runtime.configure({"m": Known(SPEC, "d")})
            assert await runtime.instances() == []
            assert len(await runtime.sweep(set())) == 1
            assert bench.waiting() == []


async def test_an_image_that_has_moved_makes_it_useless(bench: Bench) -> None:
    """A start is of the image that is here now, not of the one that was."""
    await bench.settled()
    bench.fake.images["img"] = {"Id": "sha256:2", "Config": {"Entrypoint": ["serve"]}}
    running = await bench.runtime.start(await bench.order())
    assert running.mechanism == "cold" and bench.waiting() == []
