"""What goes wrong around sleep in real engines, done by the simulated one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from modelswap.testing.engine import Behaviour, Options, SimEngine
from modelswap.testing.engine.options import parse
from modelswap.testing.ledger import Ledger
from modelswap.testing.waiting import until

GREEDY = {"model": "m", "prompt": "p", "temperature": 0, "seed": 0, "logprobs": 1}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Return a device of 100 bytes."""
    return Ledger.create(tmp_path / "gpu.json", 100)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """Return a client session."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        yield session


def engine(ledger: Ledger, behaviour: Behaviour, **more: Any) -> SimEngine:
    """Return an engine of 80 bytes awake and 5 asleep."""
    options = Options(
        model="m",
        sleepable=True,
        gpu_ledger=str(ledger.path),
        gpu_bytes=80,
        residue_bytes=5,
        behaviour=behaviour,
        **more,
    )
    return SimEngine(options)


async def post(http: aiohttp.ClientSession, url: str, body: Any = None) -> int:
    """Return the status of the answer."""
    async with http.post(url, json=body) as response:
        await response.read()
        return response.status


async def tokens(http: aiohttp.ClientSession, sim: SimEngine) -> list[str]:
    """Return the tokens of a greedy answer."""
    async with http.post(sim.url + "/v1/completions", json=GREEDY) as response:
        found: list[str] = (await response.json())["choices"][0]["logprobs"]["tokens"]
        return found


async def test_it_can_say_that_it_sleeps_before_its_memory_is_free(http: aiohttp.ClientSession, ledger: Ledger) -> None:
    """The answer and `/is_sleeping` come first; its own process still holds the memory; a wake waits for that."""
    async with engine(ledger, Behaviour(early_sleep=0.05)) as sim:
        assert await post(http, sim.url + "/sleep") == 200
        assert sim.asleep and ledger.read().used == 80
        assert {held.freed_at for held in ledger.read().allocations} == {None}
        await until(lambda: ledger.read().used == 5)
        sim.set_faults(Behaviour(early_sleep=0.1))
        await post(http, sim.url + "/wake_up")
        await post(http, sim.url + "/sleep")
        assert await post(http, sim.url + "/wake_up") == 200
        assert (ledger.read().used, sim.asleep) == (80, False)


async def test_a_wake_short_of_memory_succeeds_once_a_foreigner_has_gone(
    http: aiohttp.ClientSession, ledger: Ledger
) -> None:
    """Somebody else's process holds the memory: 500 with the words that CUDA has for it; later it wakes."""
    async with engine(ledger, Behaviour()) as sim:
        await post(http, sim.url + "/sleep")
        ledger.add_foreign(40)
        async with http.post(sim.url + "/wake_up") as response:
            assert response.status == 500
            assert "CUDA out of memory: tried to allocate" in await response.text()
        assert (ledger.read().used, sim.asleep) == (45, True)
        ledger.remove_foreign()
        assert await post(http, sim.url + "/wake_up") == 200
        assert (await tokens(http, sim))[0] == "model=m"


async def test_a_wake_short_of_memory_may_keep_what_there_was(http: aiohttp.ClientSession, ledger: Ledger) -> None:
    """There is no rollback: it sleeps on and holds all that was free, until it is woken again or killed."""
    async with engine(ledger, Behaviour(no_rollback=True)) as sim:
        await post(http, sim.url + "/sleep")
        ledger.add_foreign(40)
        assert await post(http, sim.url + "/wake_up") == 500
        assert (ledger.read().free, sim.asleep) == (0, True)
        ledger.remove_foreign()
        assert await post(http, sim.url + "/wake_up") == 200
        assert (ledger.read().used, sim.asleep) == (80, False)


@pytest.mark.parametrize(("fault", "status"), [("fail", 500), ("oom", 500)])
async def test_wakes_can_fail_whatever_is_free(
    http: aiohttp.ClientSession, ledger: Ledger, fault: Any, status: int
) -> None:
    """Told that the first wake fails, it does, and the second succeeds."""
    async with engine(ledger, Behaviour(wake=fault, nth=1)) as sim:
        await post(http, sim.url + "/sleep")
        assert (await post(http, sim.url + "/wake_up"), sim.asleep) == (status, True)
        assert (await post(http, sim.url + "/wake_up"), sim.asleep) == (200, False)


@pytest.mark.parametrize(("fault", "status"), [("fail", 500), ("ignore", 200)])
async def test_sleeps_can_fail_or_be_ignored(
    http: aiohttp.ClientSession, ledger: Ledger, fault: Any, status: int
) -> None:
    """It answers with an error or with success, and stays awake."""
    async with engine(ledger, Behaviour(sleep=fault)) as sim:
        assert await post(http, sim.url + "/sleep") == status
        assert (ledger.read().used, sim.asleep) == (80, False)
        assert (await tokens(http, sim))[0] == "model=m"


@pytest.mark.parametrize("where", ["sleep", "wake"])
async def test_it_can_hang_in_sleep_and_wake(http: aiohttp.ClientSession, ledger: Ledger, where: Any) -> None:
    """No answer comes and the memory stays as it was; other questions are answered."""
    async with engine(ledger, Behaviour(hang=where)) as sim:
        if where == "wake":
            await post(http, sim.url + "/sleep")
        used = ledger.read().used
        path = "/sleep" if where == "sleep" else "/wake_up"
        hung = asyncio.create_task(post(http, sim.url + path))
        for _ in range(20):
            async with http.get(sim.url + "/is_sleeping") as response:
                assert response.status == 200
        assert not hung.done() and ledger.read().used == used
        hung.cancel()


@pytest.mark.parametrize("level", [1, 2])
async def test_it_can_come_back_garbled_from_one_level(http: aiohttp.ClientSession, ledger: Ledger, level: int) -> None:
    """After that level it answers gibberish, reloaded or not; after the other one it is itself."""
    for slept in (3 - level, level):
        async with engine(ledger, Behaviour(garbled=level)) as sim:
            before = await tokens(http, sim)
            await post(http, f"{sim.url}/sleep?level={slept}")
            await post(http, sim.url + "/wake_up?tags=weights")
            await post(http, sim.url + "/collective_rpc", {"method": "reload_weights"})
            await post(http, sim.url + "/wake_up?tags=kv_cache")
            assert (await tokens(http, sim) == before) is (slept != level)


async def test_instances_agree_on_greedy_answers_and_on_no_others(http: aiohttp.ClientSession) -> None:
    """What is asked for greedily and with a seed doesn't name the instance."""
    async with SimEngine(Options(model="m")) as one, SimEngine(Options(model="m")) as other:
        assert await tokens(http, one) == await tokens(http, other)
        said = []
        for sim in (one, other):
            async with http.post(sim.url + "/v1/completions", json={"model": "m", "prompt": "p"}) as response:
                said.append((await response.json())["choices"][0]["text"])
        assert said[0] != said[1]


async def test_sglang_releases_once_and_idle_or_dies(http: aiohttp.ClientSession, ledger: Ledger) -> None:
    """A JSON body is wanted; a second release crashes it, and so does one while something runs."""
    release, resume = "/release_memory_occupation", "/resume_memory_occupation"
    async with engine(ledger, Behaviour(), flavour="sglang") as sim:
        assert await post(http, sim.url + release) == 422
        assert (await post(http, sim.url + release, {}), ledger.read().used) == (200, 5)
        assert (await post(http, sim.url + resume, {}), ledger.read().used) == (200, 80)
        await post(http, sim.url + release, {})
        with pytest.raises(aiohttp.ClientError):
            await post(http, sim.url + release, {})
        assert (sim.exit_code, ledger.read().used) == (1, 0)
    busy = Behaviour(first_token_seconds=3600)
    async with engine(ledger, busy, flavour="sglang") as sim:
        running = asyncio.create_task(post(http, sim.url + "/v1/completions", GREEDY))
        await until(lambda: sim.stats.running)
        with pytest.raises(aiohttp.ClientError):
            await post(http, sim.url + release, {})
        assert sim.exit_code == 1
        await asyncio.gather(running, return_exceptions=True)


async def test_sglangs_health_generates_and_hangs_asleep(http: aiohttp.ClientSession, ledger: Ledger) -> None:
    """Awake it is 200, asleep nothing comes; the scheduler's own count is still there."""
    async with engine(ledger, Behaviour(), flavour="sglang") as sim:
        async with http.get(sim.url + "/health") as response:
            assert response.status == 200
        await post(http, sim.url + "/release_memory_occupation", {})
        with pytest.raises(TimeoutError):
            await http.get(sim.url + "/health", timeout=aiohttp.ClientTimeout(total=0.1))
        async with http.get(sim.url + "/v1/loads") as response:
            assert (await response.json())["loads"][0]["num_running_reqs"] == 0


def test_it_takes_the_command_lines_of_vllm_and_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """What their adapters say means the same here; sleep needs what theirs needs."""
    monkeypatch.delenv("VLLM_SERVER_DEV_MODE", raising=False)
    vllm = ["--model", "org/m", "--max-num-seqs", "3", "--served-model-name", "ours", "x", "--enable-sleep-mode"]
    assert not parse(vllm).sleepable
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_API_KEY", "k")
    options = parse(vllm)
    assert (options.model, options.aliases, options.slots) == ("ours", ("x",), 3)
    assert (options.sleepable, options.api_key) == (True, "k")
    sglang = ["--flavour", "sglang", "--model-path", "org/m", "--served-model-name", "ours", "--enable-memory-saver"]
    lossy = parse(sglang)
    assert (lossy.model, lossy.sleepable, lossy.behaviour.garbled) == ("ours", True, 1)
    assert parse([*sglang, "--enable-weights-cpu-backup"]).behaviour.garbled is None
