# ruff: noqa: A005 - nothing here imports the standard library's sched
"""Compares policies on one exclusive device in virtual time: `make bench-sched`.

Clients come by chance (Poisson) and choose among three models; swaps take 10 s, service 8 s (mean, exponential), and
8 requests run at once. Waits are seconds from a request's arrival to its going to the engine; those who still wait at
the end count with what they have waited.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass

from modelswap.core.facts import Settings
from modelswap.core.policy import Policy
from modelswap.simulator.arrivals import Agent, Poisson
from modelswap.simulator.policies import AgeBound, Bypass, FloorOnly
from modelswap.simulator.setup import Setup, model
from modelswap.simulator.timed import Timed, Timing

LOAD, STOP, RELEASE = 8.0, 1.5, 0.5
SLOTS = 8
SERVICE = 8.0
ENDLESS = 1e9


@dataclass(frozen=True)
class Load:
    """Who comes, how often, and for which model."""

    name: str
    rate: float
    weights: tuple[float, ...]


LOADS = (
    Load("70/20/10, 0.6/s", 0.6, (70, 20, 10)),
    Load("70/20/10, 0.3/s", 0.3, (70, 20, 10)),
    Load("uniform, 0.4/s", 0.4, (1, 1, 1)),
)


@dataclass(frozen=True)
class Entrant:
    """A policy and its bound; None: what modelswap does by default."""

    name: str
    policy: Policy | None = None
    max_wait: float | None = None


ENTRANTS = (
    Entrant("modelswap, default (max_wait 160 s)"),
    Entrant("modelswap, max_wait 120 s", max_wait=120.0),
    Entrant("modelswap, max_wait 200 s", max_wait=200.0),
    Entrant("modelswap, max_wait 250 s", max_wait=250.0),
    Entrant("gate floor only", FloorOnly()),
    Entrant("unbounded bypass (llama-swap, Ollama, llama.cpp)", Bypass()),
    Entrant("age bound alone, 60 s", AgeBound(), 60.0),
)


@dataclass(frozen=True)
class Result:
    """What came of one run; waits in seconds, sorted by arrival."""

    waits: list[float]
    swaps: int
    served: int
    arrived: int


def settings(entrant: Entrant) -> Settings:
    bound = Settings().max_wait if entrant.max_wait is None else entrant.max_wait
    return Settings(queue_requests=1_000_000, queue_timeout=ENDLESS, max_wait=bound)


def timing(rng: random.Random) -> Timing:
    return Timing(
        service=lambda request: rng.expovariate(1 / SERVICE),
        load=lambda name: LOAD,
        stop=lambda name: STOP,
        release=lambda device: RELEASE,
    )


def run(load: Load, entrant: Entrant, seed: int, seconds: float) -> Result:
    rng = random.Random(seed)
    names = tuple("abc"[: len(load.weights)])
    setup = Setup(
        models=tuple(model(name, slots=SLOTS) for name in names),
        settings=settings(entrant),
        policy=entrant.policy,
        checked=False,
    )
    world = Timed(setup, timing(rng))
    Poisson(world, rng, load.rate, names, load.weights).begin()
    world.run(until=seconds)
    requests = list(world.system.requests.values())
    return Result(
        waits=[(seconds if r.sent is None else r.sent) - r.came for r in requests],
        swaps=len(world.system.swaps),
        served=sum(r.outcome is not None for r in requests),
        arrived=len(requests),
    )


def two_agents(entrant: Entrant, hours: float) -> tuple[float, float]:
    """Return the answers an hour of the worse-off of two agents, and the swaps an hour."""
    setup = Setup(
        models=(model("a"), model("b")), gateways=("g0", "g1"), policy=entrant.policy, settings=settings(entrant)
    )
    steady = Timing(service=lambda r: 3.0, load=lambda n: LOAD, stop=lambda n: STOP, release=lambda d: RELEASE)
    world = Timed(setup, steady)
    agents = [Agent(world, n, f"g{n}", name, thought=0.3) for n, name in enumerate("ab")]
    for agent in agents:
        agent.begin()
    world.run(until=hours * 3600)
    return min(agent.answers for agent in agents) / hours, len(world.system.swaps) / hours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each line (default 3)")
    parser.add_argument("--seconds", type=float, default=20_000.0, help="virtual seconds of each run (default 20000)")
    args = parser.parse_args()
    began = time.perf_counter()
    for load in LOADS:
        print(f"\n{load.name}: {args.seeds} seeds of {args.seconds:,.0f} s")
        print(f"  {'policy':<50} {'mean':>7} {'p99':>7} {'max':>7}  s wait  {'swaps/h':>8}  served")
        for entrant in ENTRANTS:
            results = [run(load, entrant, seed, args.seconds) for seed in range(args.seeds)]
            waits = sorted(wait for result in results for wait in result.waits)
            swaps = sum(result.swaps for result in results) / (args.seeds * args.seconds / 3600)
            served = sum(r.served for r in results) / sum(r.arrived for r in results)
            p99 = waits[int(0.99 * (len(waits) - 1))]
            numbers = f"{statistics.fmean(waits):7.0f} {p99:7.0f} {waits[-1]:7.0f}"
            print(f"  {entrant.name:<50} {numbers}          {swaps:8.0f}  {served:6.1%}", flush=True)
    print("\ntwo closed-loop agents, each on its own model: 0.3 s thought, 3 s service, 10 s swaps")
    print(f"  {'policy':<50} answers/h each  swaps/h")
    for entrant in ENTRANTS:
        answers, swaps = two_agents(entrant, 2.0)
        print(f"  {entrant.name:<50} {answers:14.0f}  {swaps:7.0f}")
    print(f"\n{time.perf_counter() - began:.0f} s of real time")


if __name__ == "__main__":
    main()
