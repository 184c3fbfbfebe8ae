"""The gate-floor policy's verdicts."""

from __future__ import annotations

from modelswap.core.facts import Settings
from modelswap.core.policy import Contender, GateFloor, Residency, Verdict

SETTINGS = Settings(max_wait=160, linger=2)


def consider(
    *,
    now: float,
    since: float = 0.0,
    floor: int = 0,
    idle_since: float | None = None,
    swap_time: float | None = 10.0,
    arrived: float = 0.0,
    urgent: bool = False,
    settings: Settings = SETTINGS,
) -> Verdict:
    """Ask the policy about one resident and one contender."""
    return GateFloor().consider(
        Residency(since=since, floor=floor, idle_since=idle_since, swap_time=swap_time),
        Contender(model="b", rank=arrived, arrived=arrived, urgent=urgent),
        settings,
        now,
    )


def test_stays_while_floor_is_unserved() -> None:
    """Not even an operator or a very old waiter gets past what waited when the model came in."""
    assert consider(now=10_000, floor=1, urgent=True) == Verdict(leave=False)


def test_leaves_for_operator() -> None:
    """An operator's request waits for nothing but the gate floor."""
    assert consider(now=1, urgent=True).leave


def test_busy_model_leaves_at_max_wait() -> None:
    """A busy model is closed when the oldest foreign waiter reaches max_wait, and not before."""
    assert consider(now=159.9, arrived=0) == Verdict(leave=False, again_at=160)
    assert consider(now=160, arrived=0).leave


def test_busy_model_stays_for_min_residency() -> None:
    """A waiter past max_wait still waits until the model has been resident for three swap times."""
    assert consider(now=200, since=180, arrived=0) == Verdict(leave=False, again_at=210)
    assert consider(now=210, since=180, arrived=0).leave


def test_min_residency_is_configurable() -> None:
    """A configured min_residency takes the place of the measured one."""
    settings = Settings(max_wait=160, min_residency=5)
    assert consider(now=185, since=180, arrived=0, settings=settings).leave


def test_idle_model_lingers() -> None:
    """A model that has just fallen idle is left after linger."""
    assert consider(now=11, since=0, idle_since=10) == Verdict(leave=False, again_at=12)
    assert consider(now=12, since=0, idle_since=10).leave


def test_idle_model_leaves_at_once_after_min_residency() -> None:
    """An idle model that has been resident for min_residency is left without lingering."""
    assert consider(now=30, since=0, idle_since=30).leave


def test_idle_wait_ends_at_min_residency() -> None:
    """Lingering ends early when min_residency is reached meanwhile."""
    assert consider(now=29, since=0, idle_since=28.5) == Verdict(leave=False, again_at=30)


def test_unserved_model_counts_as_active() -> None:
    """A model that came in and served nothing stays for linger, also when its swap time is unknown."""
    assert consider(now=0.5, since=0, idle_since=0, swap_time=None) == Verdict(leave=False, again_at=2)
    assert consider(now=2, since=0, idle_since=0, swap_time=None).leave
