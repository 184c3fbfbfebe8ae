"""What the Docker runtime does when Docker fails: against an engine that fails as it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import web

from modelswap.engines.base import Launch
from modelswap.protocol.errors import Code
from modelswap.runtimes.base import Exit, Known, NotPrepared, Running, StartFailed, StartOrder, Told, Unkillable
from modelswap.runtimes.docker import client
from modelswap.runtimes.docker.client import DockerAway
from modelswap.runtimes.docker.opening import open_runtime
from modelswap.runtimes.docker.records import Start, Starts
from modelswap.runtimes.docker.runtime import DockerRuntime
from modelswap.spec import config
from modelswap.spec.config import Model
from modelswap.testing.waiting import until
from tests.runtimes.docker_fake import Container, FakeDocker, Fault, Handler, fake_docker

SPEC = Model(engine="custom", command=["serve"], image="img", port=8000)
OWN = Model(engine="custom", container="own", port=8000)
GRACE = 20.0


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeDocker]:
    async with fake_docker(tmp_path / "docker.sock") as fake:
        yield fake


@contextlib.asynccontextmanager
async def opened(fake: FakeDocker, state_dir: Path, patience: float = 10.0) -> AsyncIterator[DockerRuntime]:
    docker = config.Docker(host=fake.host)
    async with open_runtime(
        state_dir, docker, gpu=0, port_of=lambda _: 8000, patience=patience, kill_timeout=0.2
    ) as runtime:
        await runtime.configure({"m": Known(SPEC, "d"), "own": Known(OWN, "o")})
        await until(lambda: fake.streams > 0)
        yield runtime


@pytest.fixture
async def runtime(fake: FakeDocker, tmp_path: Path) -> AsyncIterator[DockerRuntime]:
    async with opened(fake, tmp_path / "state") as runtime:
        yield runtime


async def order(runtime: DockerRuntime, instance: str = "i1") -> StartOrder:
    place = await runtime.allocate(SPEC)
    return StartOrder(
        instance=instance,
        model="m",
        definition="d",
        spec=SPEC,
        launch=Launch((*(place.program or ()), "--now"), {}),
        address=place.address,
    )


async def started(runtime: DockerRuntime, instance: str = "i1") -> Running:
    return await runtime.start(await order(runtime, instance))


async def waiting_for(fake: FakeDocker, runtime: DockerRuntime, running: Running) -> asyncio.Task[Exit]:
    """Begin to wait; returns when Docker has said that it still runs."""
    before = fake.inspections
    waiting = asyncio.create_task(runtime.wait(running))
    await until(lambda: fake.inspections > before)
    return waiting


def failing(path: str, times: int, status: int = 500, message: str = "it hurts") -> Fault:
    """Return a fault: requests whose path ends so are refused a few times."""
    left = times

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        nonlocal left
        if request.path.endswith(path) and left:
            left -= 1
            return web.json_response({"message": message}, status=status)
        return await handler(request)

    return fault


async def test_an_end_is_told_by_its_event(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """A container's end reaches whoever waits without another question to Docker."""
    running = await started(runtime)
    waiting = await waiting_for(fake, runtime, running)
    fake.fault = failing("/json", times=1000)
    fake.die(fake.only(), 3)
    assert await waiting == Exit(3)


async def test_an_end_that_nobody_saw_is_found_after_reconnecting(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """If a container ends while the stream of events is broken, that is noticed when it is back."""
    running = await started(runtime)
    waiting = await waiting_for(fake, runtime, running)
    fake.mute = True
    fake.die(fake.only(), 3)
    await asyncio.sleep(0.05)
    assert not waiting.done()
    fake.cut()
    assert await waiting == Exit(3)


async def test_an_end_that_nobody_saw_is_found_by_housekeeping(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """Even if Docker loses an event, an end is noticed."""
    running = await started(runtime)
    waiting = await waiting_for(fake, runtime, running)
    fake.mute = True
    fake.die(fake.only(), 3)
    await runtime.rotate()
    assert await waiting == Exit(3)


async def test_a_container_outlives_docker(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """While Docker is away (live-restore), what runs goes on, and its later end is noticed."""
    running = await started(runtime)
    waiting = await waiting_for(fake, runtime, running)
    streams = fake.streams
    await fake.go()
    await fake.come()
    await until(lambda: fake.streams > streams)
    assert await runtime.instances() == [running]
    assert not waiting.done()
    fake.die(fake.only(), 137)
    assert await waiting == Exit(-9)


async def test_a_wait_outlasts_docker(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """Who begins to wait while Docker is away is told when it is back."""
    running = await started(runtime)
    await fake.go()
    waiting = asyncio.create_task(runtime.wait(running))
    fake.only().running = False
    fake.only().exit_code = 5
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await fake.come()
    assert await waiting == Exit(5)


async def test_a_stop_waits_for_docker(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """A stop while Docker is away for a moment is done when it is back."""
    running = await started(runtime)
    await fake.go()
    stopping = asyncio.create_task(runtime.stop(running, GRACE))
    await asyncio.sleep(0.2)
    assert not stopping.done()
    await fake.come()
    assert await stopping == Exit(-15)
    assert fake.only().signals == ["SIGTERM"]


async def test_a_lost_answer_starts_nothing_twice(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """If Docker goes away while it starts a container, that start is found, not repeated."""
    broken = False

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        nonlocal broken
        answer = await handler(request)
        if request.path.endswith("/start") and not broken:
            broken = True
            assert request.transport is not None
            request.transport.close()
        return answer

    fake.fault = fault
    running = await started(runtime)
    assert broken and fake.only().starts == 1
    assert await runtime.instances() == [running]


async def test_a_lost_answer_makes_nothing_twice(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """If Docker goes away while it makes a container, the one it made is taken."""
    broken = False

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        nonlocal broken
        answer = await handler(request)
        if request.path.endswith("/create") and "containers" in request.path and not broken:
            broken = True
            assert request.transport is not None
            request.transport.close()
        return answer

    fake.fault = fault
    await runtime.create(await order(runtime))
    assert broken and len(fake.containers) == 1


async def test_a_refused_start_leaves_no_trace(fake: FakeDocker, runtime: DockerRuntime, tmp_path: Path) -> None:
    """Docker's own words are passed on, and no record is left."""
    fake.fault = failing("/start", times=1)
    with pytest.raises(StartFailed, match="it hurts"):
        await started(runtime)
    records = tmp_path / "state" / "docker" / "starts"
    assert not list(records.glob("*.json"))
    assert await runtime.instances() == []
    await started(runtime, "i2")
    assert [path.stem for path in records.glob("*.json")] == ["i2"]


@pytest.mark.parametrize(
    ("status", "said", "told", "code"),
    [
        (500, 'could not select device driver "" with capabilities: [[gpu]]', "nvidia-ctk", Code.MODEL_BROKEN),
        (500, "nvidia-container-cli: initialization error: nvml error", "nvidia-smi", Code.MODEL_START_FAILED),
        (
            *(
                500,
                'error gathering device information while adding custom device "/dev/kfd": no such file or directory',
            ),
            *("modprobe amdgpu", Code.MODEL_BROKEN),
        ),
        (400, 'exec: "no-such": executable file not found in $PATH', "no-such", Code.MODEL_BROKEN),
        (404, "network modelswap not found", "docker rm", Code.MODEL_BROKEN),
        (500, "mkdir: no space left on device", "docker system df", Code.MODEL_START_FAILED),
        (400, "invalid mount config: bind source path does not exist: /x", "volumes", Code.MODEL_BROKEN),
    ],
)
async def test_refusals_come_with_a_remedy(
    fake: FakeDocker, runtime: DockerRuntime, status: int, said: str, told: str, code: Code
) -> None:
    """What Docker says is explained, and it is told whether another try is of any use."""
    fake.fault = failing("/start", times=100, status=status, message=said)
    with pytest.raises(Exception, match=told) as failed:
        await started(runtime)
    assert getattr(failed.value, "code", None) is code


async def test_a_vanished_container_is_made_again(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """If somebody removes a container just before it is started, it is made anew."""
    fake.fault = failing("/start", times=1, status=404, message="No such container: x")
    running = await started(runtime)
    assert await runtime.instances() == [running]


async def test_a_container_of_a_network_that_was_made_anew_is_made_anew(
    fake: FakeDocker, runtime: DockerRuntime
) -> None:
    """After ``docker compose down`` and ``up`` a container still means the network that was, by its id."""
    await runtime.create(await order(runtime))
    before = fake.only()
    fake.fault = failing("/start", times=1, status=404, message="network 5f2c5c1bd1ab not found")
    running = await started(runtime)
    assert running.container == fake.only().id != before.id
    assert await runtime.instances() == [running]


async def test_a_port_that_is_always_taken_is_told(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """Other ports are tried a few times, then Docker's words are passed on."""
    fake.fault = failing("/start", times=100, message="Bind for 127.0.0.1:1 failed: port is already allocated")
    with pytest.raises(StartFailed, match="ss -ltnp"):
        await started(runtime)
    await runtime.rotate()
    assert len(fake.containers) == 1


async def test_an_image_that_went_away_has_to_be_prepared(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """A model whose image is gone since is told to be prepared again."""
    ordered = await order(runtime)
    fake.images.clear()
    with pytest.raises(NotPrepared):
        await runtime.create(ordered)
    with pytest.raises(NotPrepared):
        await runtime.start(ordered)


async def test_an_end_at_once_is_not_missed(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """A container that ends while we are still looking at its start has ended."""

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        answer = await handler(request)
        if request.path.endswith("/json") and fake.containers and fake.only().running:
            container = fake.only()
            fake.die(container, 1)  # after the answer was made up: it says that it runs
        return answer

    ordered = await order(runtime)
    await runtime.create(ordered)
    fake.fault = fault
    running = await runtime.start(ordered)
    fake.fault = failing("/json", times=1000)
    async with asyncio.timeout(5):
        assert await runtime.wait(running) == Exit(1)


async def test_an_old_end_is_not_a_later_starts(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """An event that comes late, or twice, ends nothing that was started after it."""
    first = await started(runtime)
    fake.die(fake.only(), 3)
    assert await runtime.wait(first) == Exit(3)
    second = await started(runtime, "i2")
    waiting = asyncio.create_task(runtime.wait(second))
    fake.tell("die", fake.only(), at=first.born + 0.0001, exitCode="3")
    await runtime.rotate()
    assert not waiting.done()
    fake.die(fake.only(), 4)
    assert await waiting == Exit(4)
    assert await runtime.wait(first) == Exit(3)


async def test_memory_limits_are_told(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """That the kernel killed something at a container's limit is known from its event, or what Docker says later."""
    await runtime.create(await order(runtime))
    fake.only().body["HostConfig"]["Memory"] = 1000
    first = await started(runtime)
    fake.tell("oom", fake.only())
    fake.die(fake.only(), 1)
    assert await runtime.wait(first) == Exit(1, oom=True)
    second = await started(runtime, "i2")
    fake.only().oom = True
    fake.die(fake.only(), 137)
    assert await runtime.wait(second) == Exit(-9, oom=True)


async def test_without_a_limit_a_kill_is_told_at_once(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """If the machine's memory ran out (which Docker tells alike), it wasn't the container's limit; nobody is asked."""
    running = await started(runtime)
    waiting = await waiting_for(fake, runtime, running)
    fake.fault = failing("/json", times=1000)
    fake.only().oom = True
    fake.tell("oom", fake.only())
    fake.die(fake.only(), 137)
    assert await waiting == Exit(-9)


async def test_a_stop_is_asked_for_once(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """Several stops send one SIGTERM; a harder one cuts short the grace of the others."""
    running = await started(runtime)
    fake.only().deaf_to = {"SIGTERM"}
    patient = [asyncio.create_task(runtime.stop(running, 1000)) for _ in range(3)]
    await until(lambda: fake.only().signals)
    assert await runtime.stop(running, 0) == Exit(-9, killed=True)
    assert {await task for task in patient} == {Exit(-9, killed=True)}
    assert fake.only().signals == ["SIGTERM", "SIGKILL"]


async def test_a_container_that_survives_sigkill_is_told(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """What can't be killed within the time limit is `Unkillable`, also when sweeping; it may end later after all."""
    running = await started(runtime)
    fake.only().deaf_to = {"SIGTERM", "SIGKILL"}
    with pytest.raises(Unkillable, match="survived SIGKILL"):
        await runtime.stop(running, 0.01)
    with pytest.raises(Unkillable):
        await runtime.sweep(set())
    fake.die(fake.only(), 137)
    assert await runtime.stop(running, 0) == Exit(-9, killed=True)


async def test_a_kill_that_docker_is_slow_to_confirm_is_told_by_its_event(
    fake: FakeDocker, runtime: DockerRuntime
) -> None:
    """Docker answers a kill only when it has cleaned up; the event comes earlier."""
    running = await started(runtime)
    release = asyncio.Event()

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        answer = await handler(request)
        if request.path.endswith("/kill"):
            await release.wait()
        return answer

    fake.fault = fault
    assert await runtime.stop(running, 0) == Exit(-9, killed=True)
    release.set()


async def test_the_next_start_waits_for_the_cleaning_up(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """As long as Docker cleans up after a container, its port and address are taken: nothing is started."""
    first = await started(runtime)
    cleaned = asyncio.Event()

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.endswith(f"{fake.only().id}/json"):
            await cleaned.wait()
        return await handler(request)

    waiting = await waiting_for(fake, runtime, first)
    fake.fault = fault
    fake.die(fake.only(), 0)
    assert await waiting == Exit(0)
    starting = asyncio.create_task(started(runtime, "i2"))
    await asyncio.sleep(0.05)
    assert fake.only().starts == 1
    cleaned.set()
    await starting
    assert fake.only().starts == 2


async def test_starts_that_nobody_saw_are_found(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """What others start while the stream of events is broken appears when it is back, once."""
    own = fake.containers["a" * 64] = Container("a" * 64, "own", {})
    appearing = asyncio.create_task(runtime.appeared())
    fake.mute = True
    fake.begin(own)
    await asyncio.sleep(0.05)
    assert not appearing.done()
    fake.mute = False
    fake.cut()
    running = await appearing
    assert running.model == "own" and runtime.foreign(running)
    again = asyncio.create_task(runtime.appeared())
    await runtime.rotate()
    fake.tell("start", own)
    await asyncio.sleep(0.05)
    assert not again.done()
    again.cancel()


async def test_events_are_watched_whatever_docker_says_on_reconnecting(
    fake: FakeDocker, runtime: DockerRuntime
) -> None:
    """A Docker that can't answer yet when its events are back doesn't end the watching of events."""
    running = await started(runtime)
    own = fake.containers["a" * 64] = Container("a" * 64, "own", {})
    fake.mute = True
    fake.begin(own)
    fake.mute = False
    streams = fake.streams
    fake.fault = failing("/own/json", times=1)
    fake.cut()
    await until(lambda: fake.streams > streams + 1)
    assert (await runtime.appeared()).model == "own"
    waiting = await waiting_for(fake, runtime, running)
    fake.die(next(each for each in fake.containers.values() if each is not own), 3)
    assert await waiting == Exit(3)


async def test_a_start_by_hand_during_a_sweep_appears(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """What others start after it was looked at what runs, and before the rest was swept, is told of."""
    own = fake.containers["a" * 64] = Container("a" * 64, "own", {})
    assert await runtime.instances() == []
    fake.mute = True
    fake.begin(own)
    assert await runtime.sweep(set()) == []
    async with asyncio.timeout(5):
        assert (await runtime.appeared()).model == "own"


async def test_a_start_that_was_never_made_claims_no_later_one(fake: FakeDocker, tmp_path: Path) -> None:
    """If we are killed between a start's record and the start itself, what somebody starts later is that one's."""
    async with opened(fake, tmp_path / "state") as runtime:
        await runtime.create(await order(runtime))
        lost = Start(instance="lost", model="m", definition="d", container=fake.only().id, port=8000, written=1.0)
        Starts(tmp_path / "state" / "docker" / "starts").write(lost)
    async with opened(fake, tmp_path / "state") as runtime:
        assert await runtime.instances() == []
        await runtime.sweep(set())
        fake.begin(fake.only())
        async with asyncio.timeout(5):
            running = await runtime.appeared()
        assert running.instance != "lost" and runtime.foreign(running)


async def test_what_ended_while_nobody_looked_is_over(fake: FakeDocker, tmp_path: Path) -> None:
    """The record of a start that ended while we were away is kept no longer than any other's."""
    records = tmp_path / "state" / "docker" / "starts"
    async with opened(fake, tmp_path / "state") as runtime:
        await started(runtime)
    fake.die(fake.only(), 0)
    async with opened(fake, tmp_path / "state") as runtime:
        assert await runtime.instances() == [] and await runtime.sweep(set()) == []
        running = await started(runtime, "i2")
        await runtime.rotate()
        assert [path.stem for path in records.glob("*.json")] == ["i2"]
        assert await runtime.instances() == [running]


async def test_a_start_that_outlives_us_is_found_by_its_record(fake: FakeDocker, tmp_path: Path) -> None:
    """If we are killed while Docker carries out a start, the one after us knows it by its id."""
    async with opened(fake, tmp_path / "state") as runtime:
        await runtime.create(await order(runtime))
        lost = Start(instance="lost", model="m", definition="d", container=fake.only().id, port=8000, written=1.0)
        Starts(tmp_path / "state" / "docker" / "starts").write(lost)
        fake.mute = True
        fake.begin(fake.only())
    fake.mute = False
    async with opened(fake, tmp_path / "state") as runtime:
        [running] = await runtime.instances()
        assert running.instance == "lost" and not runtime.foreign(running)
        assert await runtime.sweep({"lost"}) == []
        assert await runtime.instances() == [running]


@pytest.mark.parametrize("slow", ["/containers/create", "/start"])
async def test_docker_may_take_its_time_to_make_and_start(
    fake: FakeDocker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """A start may take longer than other calls: a cold disk, a GPU driver that wakes up."""
    monkeypatch.setattr(client, "CALL_SECONDS", 0.3)

    async def fault(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.endswith(slow):
            await asyncio.sleep(0.6)
        return await handler(request)

    async with opened(fake, tmp_path / "state") as runtime:
        fake.fault = fault
        running = await started(runtime)
        assert await runtime.instances() == [running]


async def test_a_config_that_is_not_taken_changes_nothing(fake: FakeDocker, tmp_path: Path) -> None:
    """If Docker can't be told of new models, containers are judged by the ones before."""
    async with opened(fake, tmp_path / "state") as runtime:
        await runtime.create(await order(runtime))
        fake.fault = failing("/containers/json", times=1)
        with pytest.raises(StartFailed):
            await runtime.configure({})
        fake.begin(fake.only())
        async with asyncio.timeout(5):
            assert (await runtime.appeared()).definition == "d"


async def test_something_that_ended_before_it_was_told_of_does_not_appear(
    fake: FakeDocker, runtime: DockerRuntime
) -> None:
    """Nobody is told of a start that is over."""
    own = fake.containers["a" * 64] = Container("a" * 64, "own", {})
    fake.begin(own)
    await runtime.rotate()
    fake.die(own, 0)
    await asyncio.sleep(0.05)
    fake.begin(own)
    born = (await runtime.appeared()).born
    assert born == pytest.approx(own.started, abs=1e-5)


async def test_docker_away_is_told_with_a_remedy(tmp_path: Path) -> None:
    """If Docker doesn't come within our patience, it is said what to look at."""
    docker = config.Docker(host=f"unix://{tmp_path}/nobody.sock")
    began = time.monotonic()
    with pytest.raises(DockerAway, match="systemctl status docker"):
        async with open_runtime(tmp_path, docker, gpu=0, port_of=lambda _: 8000, patience=0.3):
            pass
    assert time.monotonic() - began > 0.2


async def test_docker_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    """Docker may come up after us; that it is waited for is told at once."""
    async with fake_docker(tmp_path / "docker.sock") as fake:
        await fake.go()

        async def come_late() -> None:
            await asyncio.sleep(0.2)
            await fake.come()

        coming = asyncio.create_task(come_late())
        with structlog.testing.capture_logs() as logs:
            async with opened(fake, tmp_path / "state") as runtime:
                assert await runtime.instances() == []
        await coming
    (waiting,) = [entry for entry in logs if entry["event"] == "waiting for Docker"]
    assert "systemctl status docker" in waiting["reason"]


def test_a_socket_that_may_not_be_used_is_told() -> None:
    """A permission that is missing is told with how to get it, and as lasting."""
    away = client.failure(PermissionError(13, "Permission denied"), "connecting to it")
    assert "group docker" in str(away) and away.code is Code.MODEL_BROKEN


async def test_log_lines_are_whole(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """Lines that Docker gives in pieces, of two streams by turns, are put together; colours are taken off."""
    running = await started(runtime)
    fake.only().log = [(1, b"one \x1b[32m"), (2, b"err"), (1, b"line\x1b[0m\ntwo\n"), (2, b"or\n"), (1, b"10%\r20%")]
    assert await runtime.log_tail("m", 10, running.instance) == ["one line", "two", "error", "20%"]
    assert await runtime.log_tail("m", 2) == ["error", "20%"]
    fake.only().body["Tty"] = True
    assert await runtime.log_tail("m", 1) == ["20%"]
    assert await runtime.log_tail("m", 0) == []
    fake.fault = failing("/logs", times=1, message="configured logging driver does not support reading")
    assert await runtime.log_tail("m", 10) == []


async def test_what_somebody_elses_container_is_started_with_is_told(fake: FakeDocker, runtime: DockerRuntime) -> None:
    """Its whole command and its environment; of ours nothing, since we say it, nor of one that is gone."""
    body: dict[str, Any] = {
        "Entrypoint": ["/bin/sh", "-c", "vllm serve org/m --x"],
        "Cmd": None,
        "Env": ["A=1", "B=c=d"],
    }
    body["HostConfig"] = {"PortBindings": {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "9"}]}}
    container = Container("own" * 21 + "0", "own", body)
    fake.containers[container.id] = container
    place = await runtime.allocate(OWN)
    running = await runtime.start(
        StartOrder(instance="o1", model="own", definition="o", spec=OWN, launch=Launch((), {}), address=place.address)
    )
    words = ("/bin/sh", "-c", "vllm", "serve", "org/m", "--x")
    assert await runtime.told(running) == Told(words, {"A": "1", "B": "c=d"})
    assert await runtime.told(await started(runtime)) is None
    del fake.containers[container.id]
    assert await runtime.told(running) is None
