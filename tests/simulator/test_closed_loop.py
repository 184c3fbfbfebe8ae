"""Two agents that take turns on one device: the case that linger is for."""

from __future__ import annotations

import pytest

from modelswap.core.policy import Policy
from modelswap.simulator.arrivals import Agent
from modelswap.simulator.policies import Bypass
from modelswap.simulator.setup import Setup, model
from modelswap.simulator.timed import Timed, Timing

pytestmark = pytest.mark.long

HOURS = 1.0


def two_agents(policy: Policy | None, gateways: int = 2) -> tuple[list[float], float]:
    """Return the answers per hour of each agent, and the swaps per hour."""
    names = tuple(f"g{n}" for n in range(gateways))
    setup = Setup(models=(model("a"), model("b")), gateways=names, policy=policy)
    timing = Timing(service=lambda request: 3.0, load=lambda name: 8.0, stop=lambda name: 1.5, release=lambda d: 0.5)
    world = Timed(setup, timing)
    agents = [Agent(world, n, names[n % gateways], name, thought=0.3) for n, name in enumerate("ab")]
    for agent in agents:
        agent.begin()
    world.run(until=HOURS * 3600.0)
    return [agent.answers / HOURS for agent in agents], len(world.system.swaps) / HOURS


@pytest.mark.parametrize("gateways", [1, 2])
def test_two_agents_get_their_answers(gateways: int) -> None:
    """With default settings each agent gets at least 375 answers an hour, on one gateway and on two."""
    answers, swaps = two_agents(None, gateways)
    assert min(answers) >= 375
    assert swaps <= 100


def test_leaving_at_every_idle_moment_costs_most_of_them() -> None:
    """A policy that swaps whenever the resident model is idle gets about 138 answers an hour for each."""
    answers, swaps = two_agents(Bypass())
    assert max(answers) == pytest.approx(138, abs=4)
    assert min(answers) == pytest.approx(138, abs=4)
    assert swaps == pytest.approx(275, abs=8)
