"""Every interleaving of small worlds: 2 models on one device, 2 gateways, up to 3 tickets, one fault of each kind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from _pytest.mark import ParameterSet

from modelswap.core.facts import Settings
from modelswap.core.policy import Contender, Residency, Verdict
from modelswap.simulator.explore import begin, explore
from modelswap.simulator.setup import Setup, model
from modelswap.simulator.stepped import Budget, Stepped
from modelswap.simulator.traffic import Violation

pytestmark = pytest.mark.long

LONG = 1e6
TIMELESS = Settings(
    queue_timeout=LONG,
    linger=0.0,
    min_residency=0.0,
    max_wait=0.0,
    term=LONG,
    progress_interval=LONG,
    drain_timeout=LONG,
)
FAULTS = {
    "leaves": "a client leaves",
    "engine_deaths": "an engine dies",
    "drops": "a connection drops",
    "restarts": "the orchestrator is killed",
}


def worlds() -> Iterator[ParameterSet]:
    """Yield requests, slots and fault of the worlds to go through; all of them take an hour."""
    thorough = "MODELSWAP_THOROUGH" in os.environ
    yield pytest.param(3, 1, None, id="3 tickets, 1 slot")
    yield pytest.param(3 if thorough else 2, 2, None, id="2 slots")
    for fault, name in FAULTS.items():
        yield pytest.param(2, 1, fault, id=f"2 tickets, 1 slot, {name}")
        if thorough:
            yield pytest.param(2, 2, fault, id=f"2 tickets, 2 slots, {name}")
            yield pytest.param(3, 1, fault, id=f"3 tickets, 1 slot, {name}")
    yield pytest.param(2, 1, "appearances", id="2 tickets, 1 slot, an engine is started by hand")


def small_world(budget: Budget, *, slots: int = 1, prepare: bool = False) -> Stepped:
    """Return a connected world whose first request has been made: by symmetry it doesn't matter where and for what."""
    setup = Setup(
        models=(model("a", slots=slots, prepare=prepare), model("b", slots=slots)),
        gateways=("g0", "g1"),
        settings=TIMELESS,
        terse=True,
    )
    world = Stepped(setup, budget)
    begin(world)
    world.do(("ask", "g0", "a"))
    return world


@pytest.mark.parametrize(("asks", "slots", "fault"), list(worlds()))
def test_every_interleaving(asks: int, slots: int, fault: str | None) -> None:
    """Whatever happens in whatever order, all invariants hold, nothing runs in circles and every request ends."""
    budget = Budget(asks=asks)
    if fault is not None:
        setattr(budget, fault, 1)
    found = explore(small_world(budget, slots=slots))
    assert found.states > 500
    assert found.rests > 5


@pytest.mark.parametrize("fault", [None, "spoilings", "failures"])
def test_every_interleaving_with_preparing(fault: str | None) -> None:
    """The same where a model must be prepared, which fails once, or what was prepared disappears."""
    budget = Budget(asks=2)
    if fault is not None:
        setattr(budget, fault, 1)
    found = explore(small_world(budget, prepare=True))
    assert found.rests > 5


def world_with_a_sleeper(budget: Budget, gateways: tuple[str, ...]) -> Stepped:
    """Return a world in which a sleeps and b is resident and idle; a request for a has been made."""
    models = (model("a"), model("b"))
    world = Stepped(Setup(models=models, gateways=gateways, settings=TIMELESS, terse=True, sleeping=("a", "b")), budget)
    begin(world)
    for name in ("a", "b"):
        world.system.request("g0", name)
        begin(world)
    (sleeper,) = world.system.machine.find(lambda engine: not engine.holding)
    assert sleeper.model == "a"
    world.do(("ask", "g0", "a"))
    return world


@pytest.mark.parametrize(
    ("asks", "gateways", "faults"),
    [
        pytest.param(3, ("g0",), (), id="3 tickets"),
        pytest.param(2, ("g0", "g1"), (), id="2 gateways"),
        pytest.param(2, ("g0",), ("failures",), id="sleep or waking fails"),
        pytest.param(1, ("g0",), ("failures", "sleeper_drops"), id="that, and a sleeper is dropped"),
        pytest.param(2, ("g0",), ("engine_deaths",), id="an engine dies"),
        pytest.param(2, ("g0",), ("drops",), id="a connection drops"),
        pytest.param(1, ("g0", "g1"), ("drops",), id="a connection of two drops"),
        pytest.param(2, ("g0",), ("restarts",), id="the orchestrator is killed"),
        pytest.param(2, ("g0",), ("commands",), id="an operator's command"),
        pytest.param(1, ("g0", "g1"), ("gateway_deaths",), id="a gateway dies"),
    ],
)
def test_every_interleaving_with_sleepers(asks: int, gateways: tuple[str, ...], faults: tuple[str, ...]) -> None:
    """The same where models sleep and are woken: also when that fails, or a sleeper is dropped or dies."""
    budget = Budget(asks=asks)
    for fault in faults:
        setattr(budget, fault, 1)
    world = world_with_a_sleeper(budget, gateways)
    found = explore(world)
    assert found.states > 200
    assert found.rests > 3


class _Stubborn:
    """Never leaves."""

    def consider(self, resident: Residency, contender: Contender, settings: Settings, now: float) -> Verdict:
        """See `modelswap.core.policy.Policy.consider`."""
        return Verdict(leave=False)


def test_starvation_is_found() -> None:
    """A policy that never leaves the resident model starves a request, and the search tells the steps to it."""
    setup = Setup(models=(model("a"), model("b")), settings=TIMELESS, terse=True, policy=_Stubborn())
    world = Stepped(setup, Budget(asks=2))
    begin(world)
    with pytest.raises(Violation, match="still wait"):
        explore(world)
