"""Which instances of an earlier orchestrator go on: the whole matrix, then for real."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from modelswap.core import events
from modelswap.core.states import InstanceState
from modelswap.engines.base import Address, Readiness
from modelswap.orchestrator.adoption import Adoption, Stray, sort_out
from modelswap.orchestrator.journal import Entry, Journal
from modelswap.orchestrator.service import Service
from modelswap.orchestrator.store import Store
from modelswap.protocol.messages import Epoch, Hello
from modelswap.runtimes.base import Running, Unkillable
from tests.orchestrator.fakes import Bench, config, until

S = InstanceState


def living(bench: Bench, instance: str = "a.1", model: str = "a", **fields: Any) -> Running:
    """Return a running instance of the current definition."""
    made = Running(
        instance=instance,
        model=model,
        definition=bench.configured().definitions.get(model, "gone"),
        address=Address("127.0.0.1", 20001),
        pid=41,
        born=1.0,
    )
    return msgspec.structs.replace(made, **fields)


def entry(running: Running, state: InstanceState = S.READY, **fields: Any) -> Entry:
    """Return what the journal says of it."""
    made = Entry(
        instance=running.instance,
        model=running.model,
        definition=running.definition,
        address=running.address,
        slots=6,
        state=state,
        pid=running.pid,
        born=running.born,
    )
    return msgspec.structs.replace(made, **fields)


@pytest.mark.parametrize(
    ("state", "ready"),
    [(S.READY, True), (S.DRAINING, True), (S.STARTING, False)],
)
def test_what_had_been_opened_is_adopted_ready_and_a_start_is_taken_up(
    bench: Bench, state: InstanceState, ready: bool
) -> None:
    """With the slots that were journalled."""
    running = living(bench)
    found = sort_out([running], {"a.1": entry(running, state)}, bench.configured())
    assert found.adopted == (Adoption(running, 6, ready),) and found.strays == ()


@pytest.mark.parametrize(
    ("fields", "concurrency", "slots"), [({}, 9, 9), ({"slots": 0}, None, 3), ({"pid": 0, "born": 0.0}, None, 6)]
)
def test_slots_and_identity_as_far_as_they_are_known(
    bench: Bench, fields: dict[str, Any], concurrency: int | None, slots: int
) -> None:
    """The config goes first; a start whose process wasn't journalled any more is still ours."""
    bench.config = config(a={"concurrency": concurrency}, b={})
    running = living(bench)
    found = sort_out([running], {"a.1": entry(running, **fields)}, bench.configured())
    assert [adopted.slots for adopted in found.adopted] == [slots]


@pytest.mark.parametrize(
    ("running_fields", "entry_fields", "reason"),
    [
        ({}, None, "it isn't in the journal"),
        ({"model": "gone"}, {}, "its model isn't in the config any more"),
        ({"definition": "older"}, {}, "its model's definition has changed"),
        ({}, {"state": S.STOPPING}, "it was stopping"),
        ({}, {"state": S.FAILED}, "it was failed"),
        ({}, {"pid": 42}, "its process isn't the one in the journal"),
        ({}, {"born": 2.0}, "its process isn't the one in the journal"),
    ],
)
def test_what_has_no_place_is_a_stray(
    bench: Bench, running_fields: dict[str, Any], entry_fields: dict[str, Any] | None, reason: str
) -> None:
    """Unknown, unwanted, outdated, on its way out, or not the process it seems to be."""
    running = living(bench, **running_fields)
    journal = {} if entry_fields is None else {"a.1": msgspec.structs.replace(entry(living(bench)), **entry_fields)}
    found = sort_out([running], journal, bench.configured())
    assert found.strays == (Stray(running, reason),) and found.adopted == ()


def test_of_two_on_the_device_the_opened_one_stays(bench: Bench) -> None:
    """Even if the other one is younger."""
    ready, starting = living(bench), living(bench, "b.2", "b", born=9.0)
    journal = {"a.1": entry(ready), "b.2": entry(starting, S.STARTING)}
    found = sort_out([starting, ready], journal, bench.configured())
    assert [adopted.running.instance for adopted in found.adopted] == ["a.1"]
    assert found.strays == (Stray(starting, "a.1 has the device"),)


def test_of_two_opened_ones_the_younger_stays(bench: Bench) -> None:
    """Which is the one that the last swap brought in."""
    older, younger = living(bench), living(bench, "b.2", "b", born=9.0)
    found = sort_out([older, younger], {"a.1": entry(older), "b.2": entry(younger)}, bench.configured())
    assert [adopted.running.instance for adopted in found.adopted] == ["b.2"]


def test_models_without_a_device_are_in_nobodys_way(bench: Bench) -> None:
    """But only one instance of each goes on."""
    bench.config = config(a={}, c={"device": "none"}, d={"device": "none"})
    found_living = [
        living(bench), living(bench, "c.1", "c"), living(bench, "d.1", "d"), living(bench, "d.2", "d", born=3.0)
    ]  # fmt: skip
    journal = {running.instance: entry(running) for running in found_living}
    found = sort_out(found_living, journal, bench.configured())
    assert {adopted.running.instance for adopted in found.adopted} == {"a.1", "c.1", "d.2"}
    assert [stray.reason for stray in found.strays] == ["d.2 has model d"]


def test_sleepers_go_on_beside_what_has_the_device(bench: Bench) -> None:
    """A sleeper holds no device; it is adopted at the level it sleeps at."""
    awake, asleep = living(bench), living(bench, "b.2", "b", pid=42)
    journal = {"a.1": entry(awake), "b.2": entry(asleep, S.ASLEEP, asleep=2)}
    found = sort_out([awake, asleep], journal, bench.configured())
    assert set(found.adopted) == {Adoption(awake, 6, True), Adoption(asleep, 6, True, asleep=2)} and not found.strays


@pytest.mark.parametrize("state", [S.DRAINING, S.WAKING, S.STOPPING])
def test_what_was_neither_asleep_nor_awake_is_a_stray(bench: Bench, state: InstanceState) -> None:
    """Nobody knows how far its sleeping or waking went."""
    running = living(bench)
    found = sort_out([running], {"a.1": entry(running, state, asleep=1)}, bench.configured())
    assert found.strays == (Stray(running, "it was falling asleep or waking"),)


def strange(bench: Bench, model: str = "a", born: float = 1.0, **fields: Any) -> Running:
    """Return an instance that somebody else has started in a container."""
    return living(bench, f"foreign.{model}", model, pid=0, born=born, container="c0ffee", **fields)


def resident(service: Service) -> str | None:
    """Return which model has the device."""
    return next((device.resident for device in service.shell.snapshot().devices), None)


def is_strange(running: Running) -> bool:
    """Return whether somebody else has started it."""
    return running.instance.startswith("foreign.")


def test_of_what_others_started_the_one_that_runs_longest_is_taken_up(bench: Bench) -> None:
    """As a start: nobody knows whether it is ready. The others are in its way."""
    old, young = strange(bench, "b", born=1.0), strange(bench, "a", born=9.0)
    found = sort_out([young, old], {}, bench.configured(), is_strange)
    assert found.adopted == (Adoption(old, 3, ready=False, foreign=True),)
    assert found.strays == (Stray(young, "foreign.b has the device", foreign=True),)


def test_what_is_ours_goes_before_what_others_started(bench: Bench) -> None:
    """Even if it is still being started."""
    ours, theirs = living(bench, "b.2", "b", born=9.0), strange(bench)
    found = sort_out([theirs, ours], {"b.2": entry(ours, S.STARTING)}, bench.configured(), is_strange)
    assert [adopted.running.instance for adopted in found.adopted] == ["b.2"]
    assert found.strays == (Stray(theirs, "b.2 has the device", foreign=True),)


def test_what_others_started_and_an_earlier_one_took_up_is_ours(bench: Bench) -> None:
    """It goes on as ready, and before others that run longer."""
    known, older = strange(bench, "b", born=9.0), strange(bench)
    found = sort_out([older, known], {"foreign.b": entry(known)}, bench.configured(), is_strange)
    assert found.adopted == (Adoption(known, 6, ready=True),)
    assert [stray.running for stray in found.strays] == [older]


@pytest.mark.parametrize(
    ("fields", "journalled", "reason"),
    [
        ({"definition": "older"}, None, "its model's definition has changed"),
        ({}, {"state": S.STOPPING}, "it was stopping"),
        ({}, {"born": 5.0}, "its container isn't the one in the journal, or was started again"),
        ({}, {"container": "beef"}, "its container isn't the one in the journal, or was started again"),
    ],
)
def test_a_container_without_a_place_is_a_stray(
    bench: Bench, fields: dict[str, Any], journalled: dict[str, Any] | None, reason: str
) -> None:
    """Its identity is the container and when Docker has started it."""
    running = strange(bench, **fields)
    journal = {} if journalled is None else {"foreign.a": entry(running, container="c0ffee")}
    journal = {name: msgspec.structs.replace(known, **journalled or {}) for name, known in journal.items()}
    found = sort_out([running], journal, bench.configured(), is_strange)
    assert found.strays == (Stray(running, reason, foreign=True),) and found.adopted == ()


async def test_what_others_started_meanwhile_is_taken_up_or_stopped(bench: Bench) -> None:
    """The one that stays is tried out and journalled; the other has ended before anything starts. Both are counted."""
    definitions = bench.configured().definitions
    bench.runtime.spawn("foreign.b", "b", definitions["b"], container="beef")
    bench.runtime.spawn("foreign.a", "a", definitions["a"], container="c0ffee")
    async with bench.running() as service:
        await until(lambda: resident(service) == "b" and "foreign.a" not in bench.runtime.living)
        assert bench.runtime.orders == [] and bench.engine.canaries == 1
        assert [stopped for stopped, _ in bench.runtime.stops] == ["foreign.a"]
        assert service.journal.entries["foreign.b"].container == "beef"
        text = service.metrics.render(service.shell.snapshot(), None, "gpu0", 0).decode()
        assert 'modelswap_foreign_starts_total{model="b",outcome="adopted"} 1.0' in text
        assert 'modelswap_foreign_starts_total{model="a",outcome="stopped"} 1.0' in text
    async with bench.running() as service:
        await until(lambda: resident(service) == "b")
    assert bench.engine.canaries == 1 and len(bench.runtime.stops) == 1


async def test_the_runtime_knows_the_models_before_it_is_asked_what_runs(bench: Bench) -> None:
    """It could not tell whose containers they are."""
    async with bench.running():
        definitions = bench.configured().definitions
        assert {name: known.definition for name, known in bench.runtime.known.items()} == definitions


async def test_a_ready_engine_outlives_its_orchestrator_untouched(bench: Bench) -> None:
    """The next orchestrator answers for it at once, without starting or trying anything."""
    async with bench.running() as service:
        number, answer = service.answers.expect()
        service.post(events.Ensure(at=service.clock(), request=number, model="a"))
        first = await answer
    assert len(bench.runtime.living) == 1
    async with bench.running() as service:
        number, answer = service.answers.expect()
        service.post(events.Ensure(at=service.clock(), request=number, model="a"))
        second = await answer
        assert (second.port, second.mechanism) == (first.port, "resident")
        snapshot = service.shell.snapshot()
        assert snapshot.instances[0].slots == 3
        await until(lambda: service.outside.hosted[snapshot.instances[0].instance].watch is not None)
    assert len(bench.runtime.orders) == 1 and bench.runtime.stops == [] and bench.engine.canaries == 1


async def test_a_start_is_taken_up_by_the_next_orchestrator(bench: Bench) -> None:
    """It is waited for and tried, not started anew."""
    bench.engine.said = Readiness(ready=False)
    async with bench.running() as service:
        service.post(events.Ensure(at=service.clock(), request=service.answers.number(), model="a"))
        await until(lambda: bool(bench.runtime.living))
        await until(lambda: any(e.pid for e in service.journal.entries.values()))
    async with bench.running() as service:
        await until(lambda: bool(service.shell.snapshot().swaps))
        bench.engine.said = Readiness(ready=True)
        await until(lambda: service.shell.snapshot().devices[0].resident == "a")
    assert len(bench.runtime.orders) == 1


async def test_strays_are_killed_and_a_survivor_is_no_reason_not_to_begin(bench: Bench) -> None:
    """Whatever carries our ids and is in no journal ends."""
    bench.runtime.spawn("x.1", "a", "digest")
    bench.runtime.sweep_error = Unkillable("PID 7 survived SIGKILL")
    async with bench.running() as service:
        await until(lambda: service.shell.snapshot().begun)
        assert bench.runtime.living == {}


async def test_nothing_is_decided_before_journalled_gateways_are_back(bench: Bench) -> None:
    """As long as something runs that they may hold leases on."""
    async with bench.running() as service:
        number, answer = service.answers.expect()
        service.post(events.Ensure(at=service.clock(), request=number, model="a"))
        await answer
        service.journal.gateway_came("g1")
    async with bench.running() as service:
        await until(lambda: bool(service.shell.snapshot().instances))
        assert not service.shell.snapshot().begun
        service.post(events.GatewaySaid(at=service.clock(), gateway="g1", message=Hello(gateway="g1")))
        await until(lambda: service.shell.snapshot().begun)
        epoch = service.shell.snapshot().instances[0].epoch
        assert (
            epoch is not None and Epoch(*map(int, epoch.split("."))).generation == service.shell.snapshot().generation
        )


async def test_a_lost_database_costs_the_running_engine_and_nothing_else(bench: Bench) -> None:
    """Nobody can say what it is, so it is ended and the next request starts it anew."""
    async with bench.running() as service:
        number, answer = service.answers.expect()
        service.post(events.Ensure(at=service.clock(), request=number, model="a"))
        await answer
    for file in bench.folder.glob("modelswap.db*"):
        file.unlink()
    async with bench.running() as service:
        assert bench.runtime.living == {}
        number, answer = service.answers.expect()
        service.post(events.Ensure(at=service.clock(), request=number, model="a"))
        assert (await answer).mechanism == "cold"


async def test_journal_rows_of_what_died_meanwhile_are_removed(bench: Bench) -> None:
    """They would otherwise pile up."""
    store = Store(bench.folder / "modelswap.db")
    await store.open()
    await Journal(store).intend("a.1", "a", "digest", Address("127.0.0.1", 20001))
    await store.close()
    async with bench.running() as service:
        assert service.journal.entries == {}
        assert await service.store.read("select * from instances") == []
