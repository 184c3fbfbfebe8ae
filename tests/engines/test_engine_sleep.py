"""Sleep and wake by the adapters of vLLM and SGLang, against simulated engines that they could have started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from modelswap.engines import greedy
from modelswap.engines.base import Address, CannotSleep, CannotWake, Engine, WakeOutOfMemory
from modelswap.engines.registry import engine_for
from modelswap.spec.config import Model
from modelswap.testing.engine import Behaviour, Options, SimEngine
from modelswap.testing.ledger import Ledger
from modelswap.testing.waiting import until

VLLM = Model(engine="vllm", model="org/m", sleep="on")
SGLANG = Model(engine="sglang", model="org/m", sleep="on")
WAYS = [(VLLM, 1), (VLLM, 2), (SGLANG, 1)]


@dataclass
class Scene:
    """A model's engine, asked through its adapter."""

    engine: Engine
    http: aiohttp.ClientSession
    model: Model
    sim: SimEngine
    ledger: Ledger

    @property
    def address(self) -> Address:
        """Where it listens."""
        return Address(self.sim.host, self.sim.port)

    async def sleep(self, level: int) -> None:
        """Have it sleep."""
        await self.engine.sleep(self.http, self.model, self.address, level)

    async def wake(self, level: int) -> None:
        """Have it wake."""
        await self.engine.wake(self.http, self.model, self.address, level)

    async def answer(self) -> tuple[str, ...] | None:
        """Return its greedy answer."""
        return await self.engine.greedy(self.http, "m", self.model, self.address, 6)


@asynccontextmanager
async def scene(folder: Path, model: Model, behaviour: Behaviour | None = None, **options: Any) -> AsyncIterator[Scene]:
    """Run a simulated engine of 80 bytes on a device of 100."""
    ledger = Ledger.create(folder / "gpu.json", 100)
    flavour: Any = "sglang" if model.engine == "sglang" else "vllm"
    device: Any = {"gpu_ledger": str(ledger.path), "gpu_bytes": 80, "residue_bytes": 5}
    said = {"model": "m", "sleepable": True, "behaviour": behaviour or Behaviour(), **device, **options}
    full = Options(flavour=flavour, **said)
    async with SimEngine(full) as sim, aiohttp.ClientSession() as http:
        yield Scene(engine_for(model.engine), http, model, sim, ledger)


@pytest.mark.parametrize(("model", "level"), WAYS)
async def test_it_sleeps_gives_its_memory_back_and_wakes_as_it_was(tmp_path: Path, model: Model, level: int) -> None:
    """Over several rounds; asleep it is healthy, counts nothing, and nothing is generated."""
    async with scene(tmp_path, model) as it:
        before = await it.answer()
        assert before is not None and before[0] == "model=m"
        for _ in range(2):
            requests = it.sim.stats.requests
            await it.sleep(level)
            assert (it.sim.asleep, it.ledger.read().used) == (True, 5)
            assert await it.engine.healthy(it.http, it.model, it.address)
            assert await it.engine.running(it.http, it.model, it.address) == 0
            assert await it.engine.asleep(it.http, it.model, it.address) in (True, None)
            await it.wake(level)
            assert (it.sim.asleep, it.ledger.read().used) == (False, 80)
            assert not await it.engine.asleep(it.http, it.model, it.address)
            assert it.sim.stats.requests == requests
            assert await it.answer() == before
        assert it.ledger.read().overcommits == 0


@pytest.mark.parametrize(("model", "level"), WAYS)
async def test_a_busy_one_is_not_put_to_sleep(tmp_path: Path, model: Model, level: int) -> None:
    """It counts requests of its own: they go on, and it stays awake."""
    async with scene(tmp_path, model, Behaviour(first_token_seconds=0.5)) as it:
        running = asyncio.create_task(it.answer())
        await until(lambda: it.sim.stats.running)
        with pytest.raises(CannotSleep, match="1 requests still run"):
            await it.sleep(level)
        assert not it.sim.asleep
        assert await running


@pytest.mark.parametrize(("model", "level"), WAYS)
async def test_too_little_memory_to_wake_is_told_and_may_be_mended(tmp_path: Path, model: Model, level: int) -> None:
    """While somebody holds memory the wake fails as out of memory; afterwards the same call succeeds."""
    async with scene(tmp_path, model) as it:
        before = await it.answer()
        await it.sleep(level)
        # At level 2 the weights still fit (48), and the cache does not.
        it.ledger.add_foreign(40)
        with pytest.raises(WakeOutOfMemory, match="out of memory"):
            await it.wake(level)
        it.ledger.remove_foreign()
        await it.wake(level)
        assert (await it.answer(), it.ledger.read().used) == (before, 80)


@pytest.mark.parametrize(("model", "level"), WAYS)
async def test_failures_are_told_with_the_engines_words(tmp_path: Path, model: Model, level: int) -> None:
    """An answer of 500 to either order is an error that says so."""
    async with scene(tmp_path, model) as it:
        it.sim.set_faults(Behaviour(sleep="fail"))
        with pytest.raises(CannotSleep, match="500: simulated failure to sleep"):
            await it.sleep(level)
        it.sim.set_faults(Behaviour())
        await it.sleep(level)
        it.sim.set_faults(Behaviour(wake="fail"))
        with pytest.raises(CannotWake, match="500: simulated failure to wake") as failed:
            await it.wake(level)
        assert not isinstance(failed.value, WakeOutOfMemory)


async def test_vllm_is_asked_whether_it_really_sleeps(tmp_path: Path) -> None:
    """Without its flag vLLM answers 200 and stays awake; without the development mode it has no such path."""
    async with scene(tmp_path, VLLM, Behaviour(sleep="ignore")) as it:
        with pytest.raises(CannotSleep, match="doesn't sleep; it needs --enable-sleep-mode"):
            await it.sleep(1)
    async with scene(tmp_path, VLLM, sleepable=False) as it:
        with pytest.raises(CannotSleep, match=r"has no /sleep; .*VLLM_SERVER_DEV_MODE=1"):
            await it.sleep(1)
        assert await it.engine.asleep(it.http, it.model, it.address) is None


@pytest.mark.parametrize(("model", "level"), WAYS)
@pytest.mark.parametrize("crash", ["sleep", "wake"])
async def test_a_crash_on_the_way_is_an_error_of_the_connection(
    tmp_path: Path, model: Model, level: int, crash: Any
) -> None:
    """Nothing hangs when the engine's process ends in the middle."""
    async with scene(tmp_path, model, Behaviour(crash=crash)) as it:
        if crash == "wake":
            await it.sleep(level)
        with pytest.raises(aiohttp.ClientError):
            await (it.sleep(level) if crash == "sleep" else it.wake(level))
        assert it.sim.exit_code == 1


@pytest.mark.parametrize(("model", "level"), WAYS)
@pytest.mark.parametrize("hang", ["sleep", "wake"])
async def test_a_hang_can_be_given_up(tmp_path: Path, model: Model, level: int, hang: Any) -> None:
    """Whoever waits decides for how long."""
    async with scene(tmp_path, model, Behaviour(hang=hang)) as it:
        if hang == "wake":
            await it.sleep(level)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(it.sleep(level) if hang == "sleep" else it.wake(level), 0.2)


@pytest.mark.parametrize(("model", "level"), WAYS)
async def test_a_garbled_wake_shows_in_the_greedy_answer(tmp_path: Path, model: Model, level: int) -> None:
    """All calls succeed, and the first token is another."""
    async with scene(tmp_path, model, Behaviour(garbled=level)) as it:
        before = await it.answer()
        await it.sleep(level)
        await it.wake(level)
        after = await it.answer()
        assert before and after and greedy.agreeing(before, after) == 0


@pytest.mark.parametrize(
    ("status", "body", "short"),
    [
        (500, "Internal Server Error", True),
        (500, "", True),
        (500, '{"error": {"message": "CUDA Error: out of memory at cumem_allocator.cpp:62"}}', True),
        (500, "torch.OutOfMemoryError: CUDA out of memory.", True),
        (500, "RuntimeError: the worker has gone", False),
        (404, "Not Found", False),
    ],
)
async def test_what_vllm_says_of_a_failed_wake(status: int, body: str, short: bool) -> None:
    """A bare error is taken for want of memory, which is the usual cause and worth another try; others aren't."""
    app = web.Application()

    async def refuse(_: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    app.router.add_post("/wake_up", refuse)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        assert server.port is not None
        with pytest.raises(CannotWake) as failed:
            await engine_for("vllm").wake(http, VLLM, Address("127.0.0.1", server.port), 1)
    assert isinstance(failed.value, WakeOutOfMemory) is short


def model_of(**given: Any) -> Model:
    """Return a model for vLLM unless ``given`` says otherwise."""
    return Model.model_validate({"model": "org/m", **given})


FLAG = "--enable-sleep-mode"
DEV = {"VLLM_SERVER_DEV_MODE": "1"}
SAVER = ["--enable-memory-saver", "--enable-weights-cpu-backup"]


@pytest.mark.parametrize(
    ("given", "levels"),
    [
        ({}, ()),
        ({"sleep": "on"}, (1, 2)),
        ({"sleep": "off", "args": [FLAG], "env": DEV}, ()),
        ({"args": [FLAG], "env": DEV}, (1, 2)),
        ({"args": ["--enable_sleep_mode"], "env": DEV}, (1, 2)),
        ({"args": [FLAG]}, ()),
        ({"env": DEV}, ()),
        ({"args": [FLAG], "env": {"VLLM_SERVER_DEV_MODE": "0"}}, ()),
        ({"args": [FLAG, "--no-enable-sleep-mode"], "env": DEV}, ()),
        ({"sleep": "on", "device": "none"}, ()),
        ({"sleep": "on", "args": ["--runner", "pooling"]}, ()),
        ({"sleep": "on", "args": ["--task=embed"]}, ()),
        ({"sleep": "on", "canary": "embedding"}, ()),
        ({"sleep": "on", "args": ["--enable-lora"]}, (1,)),
        ({"sleep": "on", "adapters": ["lora"]}, (1,)),
        ({"sleep": "on", "args": ["--quantization", "fp8"]}, (1,)),
        ({"sleep": "on", "args": ["--speculative-config", "{}"]}, (1,)),
        ({"container": "c"}, ()),
        ({"container": "c", "sleep": "on"}, (1, 2)),
        ({"image": "i", "args": [FLAG], "env": DEV}, (1, 2)),
        ({"engine": "sglang"}, ()),
        ({"engine": "sglang", "sleep": "on"}, (1,)),
        ({"engine": "sglang", "args": SAVER}, (1,)),
        ({"engine": "sglang", "args": SAVER[:1]}, ()),
        ({"engine": "sglang", "args": SAVER, "sleep": "off"}, ()),
        ({"engine": "sglang", "sleep": "on", "args": ["--is-embedding"]}, ()),
        ({"engine": "sglang", "container": "c", "sleep": "on"}, (1,)),
        ({"engine": "llamacpp"}, ()),
    ],
    ids=str,
)
def test_which_levels_its_arguments_allow(
    given: dict[str, Any], levels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sleep is only thought possible where the engine was started for it, and what breaks is left out."""
    monkeypatch.delenv("VLLM_SERVER_DEV_MODE", raising=False)
    model = model_of(**given)
    assert engine_for(model.engine).sleep_levels(model) == levels


def test_the_development_mode_may_come_from_our_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process inherits it; a container doesn't."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    engine = engine_for("vllm")
    assert engine.sleep_levels(model_of(args=[FLAG])) == (1, 2)
    assert engine.sleep_levels(model_of(args=[FLAG], image="i")) == ()


def test_on_starts_it_for_sleep() -> None:
    """The flags are there once, and without ``on`` only what the config says."""
    address = Address("127.0.0.1", 1)
    engine = engine_for("vllm")
    launch = engine.launch("m", model_of(sleep="on", program=["/vllm"]), address)
    assert (launch.argv.count(FLAG), launch.env) == (1, DEV)
    assert engine.launch("m", model_of(program=["/vllm"]), address).env == {}
    launch = engine_for("sglang").launch(
        "m", model_of(engine="sglang", sleep="on", program=["/s"], args=SAVER[:1]), address
    )
    assert sorted(flag for flag in launch.argv if flag in SAVER) == sorted(SAVER)


@given(st.lists(st.sampled_from("ab")), st.lists(st.sampled_from("ab")))
def test_agreeing_is_the_length_of_the_common_beginning(first: list[str], second: list[str]) -> None:
    """It is symmetric, and what comes right after it differs or isn't there."""
    length = greedy.agreeing(first, second)
    assert length == greedy.agreeing(second, first)
    assert first[:length] == second[:length]
    assert first[length : length + 1] != second[length : length + 1] or length == len(first) == len(second)


@pytest.mark.parametrize(
    ("choice", "tokens"),
    [
        ({"logprobs": {"tokens": ["a", " b"]}, "text": "x"}, ("a", " b")),
        ({"logprobs": {"content": [{"token": "a"}, {"token": " b"}]}, "text": "x"}, ("a", " b")),
        ({"logprobs": None, "text": " one two\n"}, (" one", " two")),
        ({"logprobs": {"tokens": []}, "text": "one"}, ("one",)),
        ({"message": {"content": "one two"}}, ("one", " two")),
        ({"message": {"content": None}}, ()),
        ({}, ()),
        (7, ()),
    ],
    ids=str,
)
async def test_tokens_are_read_from_every_shape_of_answer(choice: Any, tokens: tuple[str, ...]) -> None:
    """OpenAI's two shapes of logprobs; else the words."""
    app = web.Application()

    async def complete(_: web.Request) -> web.Response:
        return web.json_response({"choices": [choice]})

    app.router.add_post("/v1/completions", complete)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        assert server.port is not None
        address = Address("127.0.0.1", server.port)
        assert await greedy.answer(http, "m", VLLM, address, 9, "completion") == tokens


async def test_who_has_no_completions_or_no_logprobs_is_asked_otherwise() -> None:
    """First a completion with its tokens, then without, then in a chat; an engine with neither has no answer."""
    asked: list[tuple[str, bool]] = []
    served = {"/v1/chat/completions"}
    app = web.Application()

    async def reply(request: web.Request) -> web.Response:
        body = await request.json()
        asked.append((request.path, "logprobs" in body))
        if request.path not in served or "logprobs" in body:
            return web.json_response({"error": "no"}, status=400)
        return web.json_response({"choices": [{"message": {"content": "one two"}}]})

    for path in ("/v1/completions", "/v1/chat/completions"):
        app.router.add_post(path, reply)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        assert server.port is not None
        address = Address("127.0.0.1", server.port)
        assert await greedy.answer(http, "m", VLLM, address, 9, "completion") == ("one", " two")
        assert asked == [
            ("/v1/completions", True),
            ("/v1/completions", False),
            ("/v1/chat/completions", True),
            ("/v1/chat/completions", False),
        ]
        served.clear()
        assert await greedy.answer(http, "m", VLLM, address, 9, "completion") is None
