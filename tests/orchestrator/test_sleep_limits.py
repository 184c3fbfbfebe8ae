"""When something that sleeps or wakes is thought to hang."""

from __future__ import annotations

from modelswap.orchestrator.sleeping import LEAST_LIMIT, SLEEP_LIMIT, limit


def test_an_unknown_time_depends_on_the_bytes() -> None:
    """A first sleep may take as long as its bytes need, slowly; nothing may take for ever."""
    assert limit(None, 0) < limit(None, 28 << 30) < SLEEP_LIMIT
    assert limit(None, 28 << 30) > 3 * 36
    assert limit(None, 1 << 40) == SLEEP_LIMIT


def test_a_known_time_counts_many_times() -> None:
    """Ten times the usual, neither less than a few seconds nor more than the longest."""
    assert limit(0.1, 1 << 40) == LEAST_LIMIT
    assert limit(5.0, 0) == 50.0
    assert limit(100.0, 0) == SLEEP_LIMIT
