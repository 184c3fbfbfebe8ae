"""Each part is killed in the middle of load; what may not be lost isn't."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path

import aiohttp
import pytest

from modelswap.testing.engine.options import Options
from tests.system.load import Outcome, ask, clients
from tests.system.stack import MODELS, Stack, until

pytestmark = pytest.mark.long

SLOW = Options(load_seconds=0.05, tokens=20, tokens_per_second=40)


def unanswered(outcomes: list[Outcome]) -> list[Outcome]:
    """Return the requests that never got a first byte, or got it and neither an end nor an error."""
    return [o for o in outcomes if not o.right and not (o.first_byte and o.error)]


@pytest.mark.parametrize("seed", [1, 2])
async def test_killed_engine_loses_no_request_without_first_byte(tmp_path: Path, seed: int) -> None:
    """kill -9 of engines under load: requests without a first byte are answered, the others end with an error."""
    rng = random.Random(seed)
    async with Stack(tmp_path, engine=Options(load_seconds=0.05, tokens=6, tokens_per_second=30)) as stack:
        load = asyncio.create_task(clients(stack.base_url, MODELS, count=60, at_once=12, seed=seed))
        killed = 0
        while not load.done() and killed < 4:
            await asyncio.sleep(rng.uniform(0.3, 1.5))
            # One that serves: a model whose starts are all killed is given up, and rightly so.
            if (await stack.status())["current_model"] is not None:
                for engine in stack.engines()[:1]:
                    engine.kill()
                    killed += 1
        outcomes = await load
        refused = [o for o in outcomes if o.status not in (0, 200)]
        # Only a request whose second engine was killed, too, may be told so.
        assert {o.error for o in refused} <= {"engine_died"}, refused
        assert unanswered(outcomes) == []
        assert len(refused) <= 8
        await stack.settled()
        stack.assert_never_overlapped()


async def test_killed_gateway_worker_takes_only_its_own_clients(tmp_path: Path) -> None:
    """kill -9 of one of two workers: its clients see a closed connection, the other's are served, nothing leaks."""
    async with Stack(tmp_path, workers=2, engine=SLOW) as stack:
        load = asyncio.create_task(clients(stack.base_url, MODELS[:2], count=40, at_once=16, seed=3))
        await asyncio.sleep(1.0)
        victim = stack.gateways()[0]
        victim.kill()
        outcomes = await load
        lost = [o for o in outcomes if not o.right]
        assert len(lost) <= 16
        assert all("Disconnected" in o.error or "Payload" in o.error or "OSError" in o.error for o in lost), lost
        await until(lambda: len(stack.gateways()) == 2, "the worker comes back")
        await stack.settled()
        after = await clients(stack.base_url, MODELS, count=12, at_once=6, seed=4)
        assert all(o.right for o in after)
        await stack.settled()
        stack.assert_never_overlapped()


async def test_killed_orchestrator_cuts_no_stream_and_reloads_nothing(tmp_path: Path) -> None:
    """kill -9 of the orchestrator: streams go on, the same engine process is adopted, what waited is served."""
    async with Stack(tmp_path, workers=2, engine=SLOW) as stack, aiohttp.ClientSession() as session:
        assert (await ask(session, stack.base_url, "mistral", stream=False)).right
        [engine] = stack.engines()
        streams = [asyncio.create_task(ask(session, stack.base_url, "mistral", stream=True)) for _ in range(4)]
        waiting = asyncio.create_task(ask(session, stack.base_url, "coder", stream=True))
        await asyncio.sleep(0.2)
        [orchestrator] = stack.orchestrators()
        orchestrator.kill()
        assert all(o.right for o in await asyncio.gather(*streams))
        assert engine.is_running()
        assert engine.status() != "zombie"
        assert (await waiting).right
        await stack.settled()
        assert len(stack.engines()) == 1
        stack.assert_never_overlapped()


async def test_orchestrator_killed_at_random_moments_of_swaps(tmp_path: Path) -> None:
    """kill -9 of the orchestrator again and again under swapping load: every request is answered."""
    rng = random.Random(11)
    async with Stack(tmp_path) as stack:
        load = asyncio.create_task(clients(stack.base_url, MODELS, count=80, at_once=8, seed=5))
        for _ in range(5):
            await asyncio.sleep(rng.uniform(0.2, 1.2))
            for orchestrator in stack.orchestrators():
                orchestrator.kill()
        outcomes = await load
        assert [o for o in outcomes if not o.right] == []
        await stack.settled()
        assert len(stack.engines()) <= 1
        stack.assert_never_overlapped()


async def test_killed_up_ends_services_and_the_next_adopts(tmp_path: Path) -> None:
    """kill -9 of ``up``: its services end, the engine lives on, and the next ``up`` takes it over."""
    async with Stack(tmp_path, workers=2) as stack, aiohttp.ClientSession() as session:
        assert (await ask(session, stack.base_url, "mistral", stream=False)).right
        [engine] = stack.engines()
        assert stack.up is not None
        stack.up.kill()
        await asyncio.to_thread(stack.up.wait)
        await until(lambda: not stack.orchestrators() and not stack.gateways(), "the services end")
        assert [p.pid for p in stack.engines()] == [engine.pid]
        await stack.start()
        assert (await ask(session, stack.base_url, "mistral", stream=True)).right
        assert [p.pid for p in stack.engines()] == [engine.pid]


async def test_stopped_gateway_is_broken_and_comes_back(tmp_path: Path) -> None:
    """A worker stopped with SIGSTOP for longer than the term holds up no swap, and serves again when continued."""
    async with Stack(tmp_path, workers=2, engine=SLOW) as stack, aiohttp.ClientSession() as session:
        assert (await ask(session, stack.base_url, "mistral", stream=False)).right
        sleeper = stack.gateways()[0]
        sleeper.suspend()
        answer = await stack.post("/ensure_model", {"model": "coder"})
        assert answer["model"] == "coder", answer
        sleeper.resume()
        outcomes = await clients(stack.base_url, MODELS, count=24, at_once=8, seed=6)
        assert [o for o in outcomes if not o.right] == []
        await until(lambda: len(stack.gateways()) == 2, "both workers live")
        await stack.settled()
        stack.assert_never_overlapped()


async def test_terminated_orchestrator_leaves_engines_running(tmp_path: Path) -> None:
    """SIGTERM to the orchestrator ends only it; the engine is taken over by the next one."""
    async with Stack(tmp_path) as stack, aiohttp.ClientSession() as session:
        assert (await ask(session, stack.base_url, "mistral", stream=False)).right
        [engine] = stack.engines()
        [orchestrator] = stack.orchestrators()
        orchestrator.send_signal(signal.SIGTERM)
        await until(lambda: not orchestrator.is_running() or orchestrator.status() == "zombie", "it ends")
        await until(lambda: len(stack.orchestrators()) == 1, "the next one starts")
        await until(stack.healthy, "well again")
        assert (await ask(session, stack.base_url, "mistral", stream=False)).right
        assert [p.pid for p in stack.engines()] == [engine.pid]


async def test_up_drains_on_terminate(tmp_path: Path) -> None:
    """SIGTERM to ``up`` lets running streams finish, stops everything, and ends with status 0."""
    async with Stack(tmp_path, engine=SLOW) as stack, aiohttp.ClientSession() as session:
        assert (await ask(session, stack.base_url, "mistral", stream=False)).right
        streams = [asyncio.create_task(ask(session, stack.base_url, "mistral", stream=True)) for _ in range(3)]
        await asyncio.sleep(0.2)
        assert await stack.stop() == 0
        assert all(o.right for o in await asyncio.gather(*streams))
