"""How the next model's weights are read ahead: beside its swap, and never in its way."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from modelswap.core import effects, events
from modelswap.orchestrator import pagecache, reading_ahead
from modelswap.orchestrator.facts import DEVICE
from modelswap.orchestrator.metrics import Metrics
from modelswap.orchestrator.pagecache import CHUNK
from modelswap.orchestrator.preparing import NoWeights
from modelswap.orchestrator.reading_ahead import ReadingAhead, beside
from modelswap.orchestrator.service import Service
from modelswap.orchestrator.tasks import Tasks, cancel
from modelswap.spec.config import Model
from tests.orchestrator.conftest import serving
from tests.orchestrator.fakes import Bench, config, until

SIZE = CHUNK + 1000
FOR_WEEKS: dict[str, Any] = {"device": {"read_ahead": 1}}
"""A byte per second: after the first chunk it waits for weeks."""


class Files(NoWeights):
    """Weights of a file for each model; nothing of them is to be downloaded."""

    def __init__(self, folder: Path) -> None:
        self._place = folder
        self.asked: list[str] = []
        self.error: OSError | None = None

    async def files(self, name: str, spec: Model) -> list[Path]:
        """See `Weights`."""
        self.asked.append(name)
        if self.error is not None:
            raise self.error
        path = self._place / f"{name}.gguf"
        path.write_bytes(bytes(SIZE))
        return [path]


@pytest.fixture(autouse=True)
def _all_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that can't tell what is cached: files that were written just now are."""
    monkeypatch.setattr(pagecache, "_NOWAIT", None)


@pytest.fixture
def weights(bench: Bench, tmp_path: Path) -> Files:
    """The weights of the orchestrator's models."""
    made = Files(tmp_path)
    bench.weights = made
    return made


def ensure(service: Service, model: str) -> asyncio.Future[effects.Answer]:
    """Ask for a model, whose canary may keep it from coming in."""
    number, answer = service.answers.expect()
    service.post(events.Ensure(at=service.clock(), request=number, model=model))
    return answer


def counted(service: Service, name: str, **labels: str) -> float | None:
    """Return a metric of model a."""
    return service.metrics.registry.get_sample_value(f"modelswap_read_ahead_{name}_total", {"model": "a", **labels})


def readers() -> list[str]:
    """Return the threads that read."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read ahead")]


async def test_weights_are_read_until_the_model_has_come_in(bench: Bench, weights: Files) -> None:
    """All of them, once; bytes and seconds are counted, and then nothing is under way."""
    bench.engine.canary_gate.clear()
    async with bench.running() as service:
        assert counted(service, "bytes", source="disk") == 0
        answer = ensure(service, "a")
        await until(lambda: counted(service, "bytes", source="disk") == SIZE)
        assert counted(service, "bytes", source="cache") == 0
        assert counted(service, "seconds")
        assert service.reading_ahead.told(DEVICE) is None
        bench.engine.canary_gate.set()
        assert (await answer).code is None
    assert weights.asked == ["a"]


async def test_it_ends_when_the_model_has_come_in(bench: Bench, weights: Files) -> None:
    """However far it is: the model is open at once."""
    bench.config = config(FOR_WEEKS)
    bench.engine.canary_gate.clear()
    async with bench.running() as service:
        answer = ensure(service, "a")
        await until(lambda: (service.reading_ahead.told(DEVICE) or {}).get("bytes") == CHUNK)
        bench.engine.canary_gate.set()
        assert (await answer).code is None
        await until(lambda: service.reading_ahead.told(DEVICE) is None)
        assert counted(service, "bytes", source="disk") == CHUNK


async def test_it_ends_with_the_orchestrator(bench: Bench, weights: Files) -> None:
    """No thread is left that reads on."""
    bench.config = config(FOR_WEEKS)
    bench.engine.canary_gate.clear()
    async with bench.running() as service:
        ensure(service, "a").cancel()
        await until(lambda: service.reading_ahead.told(DEVICE) is not None)
    await until(lambda: not readers())
    assert service.tasks.failures == 0


async def test_status_and_metrics_tell_of_it(bench: Bench, weights: Files) -> None:
    """Which model is being read for a device, and how far that is."""
    bench.config = config(FOR_WEEKS)
    bench.engine.canary_gate.clear()
    async with serving(bench) as api:
        assert (await api.json("/status"))["devices"][0]["reading_ahead"] is None
        ensure(api.service, "a").cancel()
        await until(lambda: (api.service.reading_ahead.told(DEVICE) or {}).get("bytes") == CHUNK)
        told = (await api.json("/status"))["devices"][0]["reading_ahead"]
        assert told.pop("seconds") > 0
        assert told == {"model": "a", "bytes": CHUNK, "cached_bytes": 0, "total_bytes": SIZE}
        assert 'modelswap_read_ahead_bytes_total{model="b",source="cache"} 0.0' in (await api.get("/metrics"))[1]


async def test_it_can_be_switched_off(bench: Bench, weights: Files) -> None:
    """Then nobody even asks for the files."""
    bench.config = config({"device": {"read_ahead": 0}})
    async with bench.running() as service:
        assert (await ensure(service, "a")).code is None
    assert weights.asked == []


async def test_files_that_cant_be_looked_for_are_no_failure(bench: Bench, weights: Files) -> None:
    """The engine will say what is wrong, if anything is."""
    weights.error = PermissionError(13, "Permission denied")
    async with bench.running() as service:
        assert (await ensure(service, "a")).code is None
        assert service.tasks.failures == 0
    assert weights.asked == ["a"]


async def test_short_memory_is_left_to_those_who_need_it(bench: Bench, weights: Files) -> None:
    """Nothing is read; the swap goes on."""
    bench.engine.canary_gate.clear()
    async with bench.running() as service:
        service.outside.memory.available = lambda: 0
        answer = ensure(service, "a")
        await until(lambda: bool(counted(service, "seconds")))
        assert counted(service, "bytes", source="disk") == 0
        bench.engine.canary_gate.set()
        assert (await answer).code is None


class Alone:
    """A `ReadingAhead` over the bench's config, without a scheduler."""

    def __init__(self, bench: Bench, service: Service) -> None:
        self.configured = bench.configured()
        self.tasks = Tasks()
        assert isinstance(bench.weights, Files)
        self.ahead = ReadingAhead(service.outside, bench.weights, Metrics(), self.tasks, lambda: self.configured)

    def turn_to(self, model: str | None, definition: str | None = None) -> None:
        """Say it."""
        known = self.configured.definitions.get(model or "", "")
        self.ahead.turn_to(effects.ReadAhead(device=DEVICE, model=model, definition=definition or known))

    def model(self) -> str | None:
        """Return which model is being read."""
        told = self.ahead.told(DEVICE)
        return None if told is None else str(told["model"])


async def test_another_model_takes_its_place(bench: Bench, weights: Files) -> None:
    """One is read at a time; taken back, nothing is."""
    bench.config = config(FOR_WEEKS)
    async with bench.running() as service:
        alone = Alone(bench, service)
        alone.turn_to("a")
        await until(lambda: alone.model() == "a")
        alone.turn_to("b")
        await until(lambda: alone.model() == "b")
        await until(lambda: readers() == ["read ahead b"])
        alone.turn_to(None)
        await until(lambda: alone.model() is None)
        await alone.tasks.close()
        assert alone.tasks.failures == 0


async def test_what_the_config_has_no_more_is_not_read(bench: Bench, weights: Files) -> None:
    """The scheduler has yet to hear of it, and says it anew then."""
    async with bench.running() as service:
        alone = Alone(bench, service)
        alone.turn_to("a", "older")
        alone.turn_to("gone")
        await alone.tasks.close()
    assert weights.asked == []


async def test_a_model_without_files_that_we_see_is_left_alone(bench: Bench) -> None:
    """Its engine sees to its weights."""
    async with bench.running() as service:
        assert (await ensure(service, "a")).code is None
        assert counted(service, "seconds") == 0


async def test_a_disk_that_keeps_its_thread_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gave the reading up goes on; the thread ends when it can."""
    monkeypatch.setattr(reading_ahead, "LEAVE", 0.01)
    begun, answers, ended = threading.Event(), threading.Event(), threading.Event()

    def work(stop: threading.Event) -> None:
        begun.set()
        answers.wait(30)
        assert stop.is_set()
        ended.set()

    task = asyncio.create_task(beside(work, "stuck"))
    await until(begun.is_set)
    await cancel(task)
    assert task.cancelled()
    assert not ended.is_set()
    answers.set()
    await until(ended.is_set)


async def test_a_mistake_of_ours_is_told(bench: Bench) -> None:
    """It is raised where the thread is awaited."""

    def work(stop: threading.Event) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await beside(work, "broken")
