from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from modelswap.testing.engine import Behaviour, Options, SimEngine
from modelswap.testing.ledger import Ledger
from modelswap.testing.waiting import until

CHAT = "/v1/chat/completions"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Return a device of 100 bytes."""
    return Ledger.create(tmp_path / "gpu.json", 100)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """Return a client session."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        yield session


def _options(ledger: Ledger, model: str = "m", **more: Any) -> Options:
    return Options(model=model, sleepable=True, gpu_ledger=str(ledger.path), gpu_bytes=80, residue_bytes=5, **more)


async def _post(http: aiohttp.ClientSession, url: str, body: Any = None) -> int:
    async with http.post(url, json=body) as response:
        await response.read()
        return response.status


async def _sleeping(http: aiohttp.ClientSession, engine: SimEngine) -> bool:
    async with http.get(engine.url + "/is_sleeping") as response:
        return bool((await response.json())["is_sleeping"])


async def _said(http: aiohttp.ClientSession, engine: SimEngine, **body: Any) -> tuple[str, str]:
    async with http.post(engine.url + CHAT, json={"model": engine.options.model, **body}) as response:
        choice = (await response.json())["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]


async def test_sleeping_frees_memory_and_waking_takes_it_back(http: aiohttp.ClientSession, ledger: Ledger) -> None:
    """Asleep it keeps a residue, answers health, queues requests silently, and shows it in its metrics."""
    async with SimEngine(_options(ledger)) as engine:
        assert ledger.read().used == 80
        assert await _post(http, engine.url + "/sleep?level=1&mode=wait") == 200
        assert (ledger.read().used, await _sleeping(http, engine)) == (5, True)
        async with http.get(engine.url + "/health") as response:
            assert response.status == 200
        async with http.get(engine.url + "/metrics") as response:
            assert 'sleep_state="weights_offloaded"} 1.0' in await response.text()
        waiting = asyncio.create_task(_said(http, engine))
        await until(lambda: engine.stats.waiting == 1)
        assert await _post(http, engine.url + "/wake_up") == 200
        assert (await waiting)[0].startswith("model=m ")
        assert (ledger.read().used, await _sleeping(http, engine)) == (80, False)
        assert await _post(http, engine.url + "/wake_up") == 200


async def test_level_two_needs_its_weights_reloaded(http: aiohttp.ClientSession, ledger: Ledger) -> None:
    """Without the reload it answers gibberish with status 200; with it, itself again."""
    async with SimEngine(_options(ledger)) as engine:
        await _post(http, engine.url + "/sleep?level=2")
        await _post(http, engine.url + "/wake_up")
        assert "model=m" not in (await _said(http, engine))[0]
        await _post(http, engine.url + "/sleep?level=2")
        rpc = {"method": "reload_weights"}
        assert await _post(http, engine.url + "/collective_rpc", rpc) == 500
        await _post(http, engine.url + "/wake_up?tags=weights")
        assert (ledger.read().used, await _sleeping(http, engine)) == (48, True)
        assert await _post(http, engine.url + "/collective_rpc", rpc) == 200
        await _post(http, engine.url + "/wake_up?tags=kv_cache")
        assert await _post(http, engine.url + "/reset_prefix_cache") == 200
        assert (await _said(http, engine))[0].startswith("model=m ")
        assert ledger.read().used == 80


async def test_two_sleepers_take_turns_on_one_device(http: aiohttp.ClientSession, ledger: Ledger) -> None:
    """A wake that does not fit fails and can be tried again once there is room; a clean swap is no overlap."""
    async with SimEngine(_options(ledger, "a")) as a:
        await _post(http, a.url + "/sleep")
        async with SimEngine(_options(ledger, "b")) as b:
            assert b.ready.is_set()
            assert ledger.read().overlaps == 0
            assert await _post(http, a.url + "/wake_up") == 500
            assert (await _sleeping(http, a), ledger.read().overlaps) == (True, 1)
            await _post(http, b.url + "/sleep")
            assert await _post(http, a.url + "/wake_up") == 200
            assert (await _said(http, a))[0].startswith("model=a ")
            assert ledger.read().overlaps == 1


async def test_sleep_modes(http: aiohttp.ClientSession, ledger: Ledger) -> None:
    """What runs is aborted, waited for, or kept until the engine wakes."""
    async with SimEngine(_options(ledger, tokens=10**9, tokens_per_second=500)) as engine:
        running = asyncio.create_task(_said(http, engine))
        await until(lambda: engine.stats.running)
        await _post(http, engine.url + "/sleep?mode=abort")
        assert (await running)[1] == "abort"
        await _post(http, engine.url + "/wake_up")

        running = asyncio.create_task(_said(http, engine, max_tokens=20))
        await until(lambda: engine.stats.running)
        await _post(http, engine.url + "/sleep?mode=wait")
        assert (await running)[1] == "length"
        await _post(http, engine.url + "/wake_up")

        running = asyncio.create_task(_said(http, engine, max_tokens=100))
        await until(lambda: engine.stats.running)
        await _post(http, engine.url + "/sleep?mode=keep")
        assert engine.stats.running == 1
        await _post(http, engine.url + "/wake_up")
        assert (await running)[1] == "length"


async def test_a_stream_that_is_aborted_says_so(http: aiohttp.ClientSession, ledger: Ledger) -> None:
    """It ends properly, with the reason `abort`."""
    async with SimEngine(_options(ledger, tokens=10**9, tokens_per_second=500)) as engine:
        async with http.post(engine.url + CHAT, json={"model": "m", "stream": True}) as response:
            await response.content.readline()
            await _post(http, engine.url + "/sleep?mode=abort")
            rest = await response.text()
        assert '"finish_reason":"abort"' in rest
        assert rest.endswith("data: [DONE]\n\n")


async def test_bad_sleep_requests(http: aiohttp.ClientSession, ledger: Ledger) -> None:
    """A wrong level, mode or method is refused."""
    async with SimEngine(_options(ledger)) as engine:
        assert await _post(http, engine.url + "/sleep?level=3") == 400
        assert await _post(http, engine.url + "/sleep?mode=gently") == 400
        assert await _post(http, engine.url + "/is_sleeping") == 405
        assert await _post(http, engine.url + "/collective_rpc", {"method": "other"}) == 500


@pytest.mark.parametrize("where", ["sleep", "wake"])
async def test_an_engine_can_crash_in_sleep_and_wake(http: aiohttp.ClientSession, ledger: Ledger, where: Any) -> None:
    """It dies in the middle, and its memory comes back."""
    async with SimEngine(_options(ledger, behaviour=Behaviour(crash=where))) as engine:
        if where == "wake":
            await _post(http, engine.url + "/sleep")
        with pytest.raises(aiohttp.ClientError):
            await _post(http, engine.url + ("/sleep" if where == "sleep" else "/wake_up"))
        assert (engine.exit_code, ledger.read().used) == (1, 0)


async def test_memory_can_come_back_late(http: aiohttp.ClientSession, ledger: Ledger) -> None:
    """Told so at run time, an engine's memory stays away after its sleep."""
    async with SimEngine(_options(ledger)) as engine:
        await _post(http, engine.url + "/sim/fault", {"late_release": 3600})
        await _post(http, engine.url + "/sleep")
        assert ledger.read().used == 80
        ledger.delay_release(0, instance=engine.instance)
        assert ledger.read().used == 5
