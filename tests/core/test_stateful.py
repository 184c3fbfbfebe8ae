"""Random histories of the whole protocol: real schedulers and gateway cores, every fault at any point."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from modelswap.core.facts import Settings
from modelswap.simulator.setup import Setup, model
from modelswap.simulator.stepped import Budget, Stepped

pytestmark = pytest.mark.long

EXAMPLES = int(os.environ.get("MODELSWAP_EXAMPLES", "1000"))
CHEAP = ("up", "down", "done", "finish", "connect", "tick", "deadline", "time", "ask")
"""What makes things go on; the rest is faults, which are tried less often than chance would."""

setups = st.builds(
    Setup,
    models=st.tuples(
        st.builds(
            lambda slots, prepare, preload: model("a", slots=slots, prepare=prepare, preload=preload),
            st.integers(1, 3),
            st.booleans(),
            st.booleans(),
        ),
        st.builds(
            lambda slots, ttl: model("b", slots=slots, ttl=ttl), st.sampled_from((1, 2)), st.sampled_from((None, 5.0))
        ),
    ).flatmap(
        lambda two: st.sampled_from((two, (*two, model("c", prepare=True)), (*two, model("beside", device=None))))
    ),
    gateways=st.sampled_from((("g0", "g1"), ("g0",), ("g0", "g1", "g2"))),
    settings=st.builds(
        Settings,
        queue_timeout=st.just(1e6),
        max_wait=st.sampled_from((20.0, 0.0, 160.0)),
        linger=st.sampled_from((2.0, 0.0)),
        min_residency=st.sampled_from((None, 0.0)),
        backoff_first=st.sampled_from((2.0, 0.5)),
        drain_timeout=st.just(30.0),
        abort_on_drain_timeout=st.booleans(),
    ),
    wire=st.booleans(),
    sleeping=st.sampled_from((("a", "b"), (), ("a",), ("b", "beside", "c"))),
)
budgets = st.builds(
    Budget,
    asks=st.integers(1, 12),
    leaves=st.integers(0, 3),
    first_bytes=st.integers(0, 3),
    drops=st.integers(0, 3),
    engine_deaths=st.integers(0, 2),
    failures=st.integers(0, 2),
    stops=st.integers(0, 2),
    gateway_deaths=st.integers(0, 1),
    restarts=st.integers(0, 2),
    commands=st.integers(0, 2),
    stalls=st.integers(0, 2),
    appearances=st.integers(0, 2),
    spoilings=st.integers(0, 2),
    sleeper_drops=st.integers(0, 2),
    pins=st.integers(0, 2),
)


searching = settings(
    derandomize="MODELSWAP_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    phases=(Phase.generate,),  # a failing history takes thousands of steps to settle, too many to shrink
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
histories = st.lists(st.integers(0, 1 << 16), min_size=40, max_size=250)


@settings(searching, max_examples=EXAMPLES)
@given(setup=setups, budget=budgets, choices=histories)
def test_every_request_ends_whatever_happens(setup: Setup, budget: Budget, choices: list[int]) -> None:
    """After every step all invariants hold; when no more goes wrong, every request ends and nothing is left over."""
    live(Stepped(setup, budget), choices)


@settings(searching, max_examples=EXAMPLES // 4)
@given(setup=setups, budget=budgets, choices=histories)
def test_the_same_with_sleepers(setup: Setup, budget: Budget, choices: list[int]) -> None:
    """The same from where one model is resident and another asleep, which chance would seldom lead to."""
    asleep = tuple(facts.name for facts in setup.models)
    world = Stepped(replace(setup, sleeping=asleep), budget)
    for name in ("a", "b"):
        world.system.request("g0", name)
        world.settle(patience=300.0)
    assert world.system.machine.find(lambda engine: not engine.holding)
    live(world, choices)


def live(world: Stepped, choices: list[int]) -> None:
    """Do what chance has chosen, then let everything come to rest."""
    steps = 0
    try:
        for choice in choices:
            possible = world.enabled()
            usual = [action for action in possible if action[0] in CHEAP]
            among = usual if usual and choice % 4 else possible
            world.do(among[(choice >> 2) % len(among)])
            steps += 1
        world.settle()
    except AssertionError:
        note(f"{world.system.setup}\nafter {world.story[: steps + 1]}")
        raise
