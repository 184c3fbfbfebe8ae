from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from modelswap.testing.engine import Behaviour, Options
from modelswap.testing.engine.journal import Log
from modelswap.testing.ledger import Ledger
from modelswap.testing.liveness import born
from modelswap.testing.processes import EngineProcess
from modelswap.testing.waiting import until

CHAT = "/v1/chat/completions"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Return a device of 100 bytes."""
    return Ledger.create(tmp_path / "gpu.json", 100)


def _options(ledger: Ledger, model: str = "m", **behaviour: Any) -> Options:
    return Options(
        model=model, gpu_ledger=str(ledger.path), gpu_bytes=60, sleepable=True, behaviour=Behaviour(**behaviour)
    )


async def _post(url: str, **body: Any) -> Any:
    async with aiohttp.ClientSession() as http, http.post(url, json=body) as response:
        return await response.json()


async def _stats(engine: EngineProcess) -> Any:
    async with aiohttp.ClientSession() as http, http.get(engine.url + "/sim/stats") as response:
        return await response.json()


async def test_an_engine_is_a_process_with_an_identity(ledger: Ledger) -> None:
    """Its answers carry the id from its environment, its log says what it does, SIGTERM ends it with status 0."""
    async with EngineProcess(_options(ledger), env={"MODELSWAP_INSTANCE": "i-7"}) as engine:
        await engine.logged("startup complete")
        answer = await _post(engine.url + CHAT, model="m")
        assert answer["choices"][0]["message"]["content"].startswith("model=m instance=i-7 ")
        held = ledger.read().allocations
        assert [(a.pid, a.instance, a.bytes) for a in held] == [(engine.pid, "i-7", 60)]
        engine.signal(signal.SIGTERM)
        assert await engine.wait() == 0
        assert await engine.logged("POST /v1/chat/completions HTTP/1.1")
        assert await engine.logged("shutdown complete")
    assert ledger.read().used == 0


async def test_the_second_of_two_overlapping_engines_dies_of_out_of_memory(ledger: Ledger) -> None:
    """It exits with status 1 and vLLM's words; the first one serves on, and the ledger knows."""
    async with EngineProcess(_options(ledger, "a")) as a:
        await a.logged("startup complete")
        async with EngineProcess(_options(ledger, "b")) as b:
            assert await b.wait() == 1
            assert await b.logged("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate")
            assert await b.logged("Engine core initialization failed")
        assert (await _post(a.url + CHAT, model="a"))["model"] == "a"
    account = ledger.read()
    assert (account.overlaps, account.overcommits, account.peak, account.used) == (1, 1, 60, 0)


async def test_engines_one_after_the_other_do_not_overlap(ledger: Ledger) -> None:
    """After a kill, the next engine finds the whole device."""
    for name in ("a", "b"):
        async with EngineProcess(_options(ledger, name)) as engine:
            await engine.logged("startup complete")
            engine.signal(signal.SIGKILL)
            assert await engine.wait() == -signal.SIGKILL
    assert (ledger.read().overlaps, ledger.read().used) == (0, 0)


async def test_late_release_outlives_the_process(ledger: Ledger) -> None:
    """Memory of a dead process can stay away."""
    async with EngineProcess(_options(ledger, late_release=3600), env={"MODELSWAP_INSTANCE": "late"}) as engine:
        await engine.logged("startup complete")
    assert ledger.read().used == 60
    ledger.delay_release(0, instance="late")
    assert ledger.read().used == 0


@pytest.mark.parametrize(("by", "code"), [("exit", 1), ("kill", -signal.SIGKILL)])
async def test_crashes_end_the_process(ledger: Ledger, by: Any, code: int) -> None:
    """A crash is the process's end, by exit or by signal, and cuts the stream."""
    async with EngineProcess(_options(ledger)) as engine:
        await engine.logged("startup complete")
        with pytest.raises(aiohttp.ClientError):
            await _post(engine.url + CHAT, model="m", sim={"crash": "first_byte", "by": by})
        assert await engine.wait() == code


async def test_an_engine_can_crash_while_loading(ledger: Ledger) -> None:
    """It never gets ready."""
    async with EngineProcess(_options(ledger, crash="load")) as engine:
        assert await engine.wait() == 1
        assert not engine.mentions("startup complete")


async def test_sigterm_can_be_ignored(ledger: Ledger) -> None:
    """Only SIGKILL ends such an engine."""
    async with EngineProcess(_options(ledger, ignore_sigterm=True)) as engine:
        await engine.logged("startup complete")
        for _ in range(2):
            engine.lines.clear()
            engine.signal(signal.SIGTERM)
            assert await engine.logged("SIGTERM ignored")
        engine.signal(signal.SIGKILL)
        assert await engine.wait() == -signal.SIGKILL


async def test_a_child_that_holds_the_memory_survives_its_killed_parent(ledger: Ledger) -> None:
    """As vLLM's EngineCore: gone after a clean stop, left over after a SIGKILL, ended with the process group."""
    async with EngineProcess(_options(ledger, child="child")) as engine:
        await engine.logged("startup complete")
        child = (await _stats(engine))["child"]
        assert [a.pid for a in ledger.read().allocations] == [child]
        engine.signal(signal.SIGTERM)
        await engine.wait()
        assert (born(child), ledger.read().used) == (None, 0)
    async with EngineProcess(_options(ledger, child="child")) as engine:
        await engine.logged("startup complete")
        child = (await _stats(engine))["child"]
        engine.signal(signal.SIGKILL)
        await engine.wait()
        assert ledger.read().used == 60
        engine.signal_group(signal.SIGKILL)
        await until(lambda: born(child) is None)
        assert ledger.read().used == 0


@pytest.mark.parametrize("kind", ["orphan", "session"])
async def test_a_child_can_survive_a_clean_stop(ledger: Ledger, kind: Any) -> None:
    """An orphan stays in the process group, or leaves it with a session of its own."""
    async with EngineProcess(_options(ledger, child=kind)) as engine:
        await engine.logged("startup complete")
        child = (await _stats(engine))["child"]
        assert (os.getpgid(child) == engine.pid) == (kind == "orphan")
        engine.signal(signal.SIGTERM)
        assert await engine.wait() == 0
        assert ledger.read().used == 60
        os.kill(child, signal.SIGKILL)
        await until(lambda: born(child) is None)
    assert ledger.read().used == 0


def test_a_log_that_nobody_reads_any_more_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine serves on when its reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    with Path(os.devnull).open("w") as sink, open(writing, "w") as pipe:  # noqa: PTH123 (a descriptor)
        monkeypatch.setattr("sys.stdout", pipe)
        log = Log(to_stdout=True)
        log.info("one")
        log.info("two")
        monkeypatch.undo()
        # What it could not write stays in the buffer, and closing would try again.
        os.dup2(sink.fileno(), writing)
    assert [line.split()[-1] for line in log.lines] == ["one", "two"]


async def test_a_taken_port_ends_the_process(ledger: Ledger) -> None:
    """It says why and exits with status 1."""
    async with EngineProcess(Options(model="a")) as first:
        port = int(first.url.rpartition(":")[2])
        async with EngineProcess(Options(model="b", port=port)) as second:
            assert await second.wait() == 1
            assert await second.logged("[Errno")
            assert second.url == ""
