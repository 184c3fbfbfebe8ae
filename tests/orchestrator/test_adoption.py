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
