"""What surrounds the services: a hung orchestrator, a stop without one, tokens, and a log that can't be written."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from modelswap.cli.failure import ExitCode, Failure
from modelswap.cli.services import Forgiving, orchestrator, wait_for_token
from modelswap.cli.stack import Stack, what_drains
from modelswap.cli.supervisor import Service, Supervisor
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.docker.client import DockerAway
from modelswap.runtimes.docker.owner import OtherOwner
from modelswap.spec.load import loads

DEADLINE = 30.0


@pytest.fixture
def said() -> list[str]:
    """Return the list of what the user was told."""
    return []


@pytest.fixture
async def supervisor(said: list[str]) -> AsyncIterator[Supervisor]:
    """Yield a supervisor whose services do nothing, under the names of the real ones."""
    async with Supervisor(said.append) as supervisor:
        for name in ("orchestrator", "gateway-0"):
            supervisor.start(Service(name, (sys.executable, "-c", "import signal; signal.pause()")))
        async with asyncio.timeout(DEADLINE):
            while True:
                if len(supervisor.pids()) == 2:
                    break
                await asyncio.sleep(0.01)
        yield supervisor


@pytest.fixture
def stack(fake: Any, supervisor: Supervisor, said: list[str], tmp_path: Path) -> Stack:
    """Return a stack whose orchestrator answers as the fake does."""
    port = fake.url.rpartition(":")[2]
    config = loads(
        f"models: {{a: {{engine: custom, command: [x, '{{port}}']}}}}\n"
        f"orchestrator: {{port: {port}, state_dir: {tmp_path / 'state'}}}\n"
    )
    return Stack(config, tmp_path / "modelswap.yaml", supervisor, said.append)


async def test_an_orchestrator_that_fails_its_health_checks_is_replaced(
    fake: Any, stack: Stack, supervisor: Supervisor, said: list[str]
) -> None:
    """One that says it can't decide any more is killed, so that a new one adopts what runs."""
    fake.answers["GET /health"] = (503, {"problems": ["stuck"]})
    before = supervisor.pids()
    watching = asyncio.create_task(stack.watch(every=0.02))
    async with asyncio.timeout(DEADLINE):
        while True:
            if supervisor.pids().get("orchestrator") not in (None, before["orchestrator"]):
                break
            await asyncio.sleep(0.01)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert f"orchestrator (pid {before['orchestrator']}) failed 3 health checks and is killed" in said
    assert supervisor.pids()["gateway-0"] == before["gateway-0"]


async def test_a_healthy_orchestrator_is_left_alone(fake: Any, stack: Stack, supervisor: Supervisor) -> None:
    """A failed check now and then is nothing."""
    states = iter([200, 503, 503, 200] * 10)
    asked_enough = asyncio.Event()
    loop = asyncio.get_running_loop()

    def health() -> tuple[int, Any]:
        state = next(states, None)
        if state is None:
            loop.call_soon_threadsafe(asked_enough.set)
        return state or 200, {}

    fake.answers["GET /health"] = health
    before = supervisor.pids()
    watching = asyncio.create_task(stack.watch(every=0.005))
    async with asyncio.timeout(DEADLINE):
        await asked_enough.wait()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert supervisor.pids() == before


async def test_a_stop_asks_first_and_ends_the_services_then(
    fake: Any, stack: Stack, supervisor: Supervisor, said: list[str]
) -> None:
    """Services are ended only after the orchestrator has said that nothing runs any more."""
    running_meanwhile = []

    def shut_down() -> tuple[int, Any]:
        running_meanwhile.append(len(supervisor.pids()))
        return 200, {"status": "finished"}

    fake.answers["POST /shutdown"] = shut_down
    await stack.stop(asyncio.Event())
    assert running_meanwhile == [2]
    assert supervisor.pids() == {}
    assert ("POST /shutdown", {"now": False}) in fake.asked


async def test_a_stop_does_not_wait_for_an_orchestrator_that_can_not_decide(
    fake: Any, stack: Stack, supervisor: Supervisor, said: list[str]
) -> None:
    """If it says itself that its scheduler has failed, the engines are ended without it."""
    ended = threading.Event()

    def never() -> tuple[int, Any]:
        ended.wait(DEADLINE)
        return 200, {}

    fake.answers["POST /shutdown"] = never
    fake.answers["GET /status"] = (200, {"problems": ["the scheduler failed"]})
    try:
        await stack.stop(asyncio.Event())
    finally:
        ended.set()
    assert supervisor.pids() == {}
    assert "ending the engines without the orchestrator: the scheduler failed" in said


async def test_a_hurried_stop_says_so_to_the_orchestrator(fake: Any, stack: Stack, supervisor: Supervisor) -> None:
    """The second signal asks it not to drain."""
    fake.answers["POST /shutdown"] = (200, {})
    hurry = asyncio.Event()
    hurry.set()
    await stack.stop(hurry)
    assert [asked for asked in fake.asked if asked[0].startswith("POST")] == [("POST /shutdown", {"now": True})]
    assert supervisor.pids() == {}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, ""),
        ({"models": [{"name": "a", "in_flight": 1}, {"name": "b", "in_flight": 0}]}, "draining 1 request of a"),
        (
            {"models": [{"name": "a", "in_flight": 2}, {"name": "b", "in_flight": 1}]},
            "draining 2 requests of a and 1 request of b",
        ),
        ({"instances": [{"model": "a", "state": "stopping"}, {"model": "b", "state": "ready"}]}, "stopping a"),
    ],
)
def test_what_a_stop_waits_for_is_said_in_words(status: dict[str, Any], expected: str) -> None:
    """Running requests first, then engines that are ending."""
    assert what_drains(status) == expected


def test_the_token_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that starts before its orchestrator gets the token when it is there; the variable goes first."""
    monkeypatch.delenv("MODELSWAP_TOKEN", raising=False)
    with pytest.raises(Failure, match="there is no token"):
        wait_for_token(tmp_path, within=0.0)
    later = threading.Timer(0.15, (tmp_path / "token").write_text, ["secret\n"])
    later.start()
    assert wait_for_token(tmp_path, within=DEADLINE) == "secret"
    later.join()
    monkeypatch.setenv("MODELSWAP_TOKEN", "other")
    assert wait_for_token(tmp_path, within=0.0) == "other"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DockerAway("it isn't running"), ExitCode.FAILED),
        (DockerAway("this user may not", code=Code.MODEL_BROKEN), ExitCode.USAGE),
        (OtherOwner("another one is here"), ExitCode.USAGE),
    ],
)
def test_only_a_docker_that_may_come_is_worth_another_start(
    monkeypatch: pytest.MonkeyPatch, error: ModelswapError, code: ExitCode
) -> None:
    """`up` and systemd start an orchestrator again unless it ends with 2."""

    def run(path: Path) -> None:
        raise error

    monkeypatch.setattr("modelswap.cli.services.tie_to_parent", lambda: None)
    monkeypatch.setattr("modelswap.cli.services.forgive_stderr", lambda: None)
    monkeypatch.setattr("modelswap.orchestrator.main.run", run)
    with pytest.raises(Failure) as raised:
        orchestrator(Path("modelswap.yaml"))
    assert raised.value.code is code and str(raised.value) == str(error)


def test_a_log_that_can_not_be_written_is_no_error() -> None:
    """A service goes on when its terminal, its disk or its reader has gone."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def flush(self) -> None:
            raise OSError(5, "Input/output error")

        def isatty(self) -> bool:
            raise OSError(5, "Input/output error")

    gone = Forgiving(Gone())
    assert gone.write("lost") == 4
    gone.flush()
    assert gone.isatty() is False
    kept = io.StringIO()
    Forgiving(kept).write("kept")
    assert kept.getvalue() == "kept"
