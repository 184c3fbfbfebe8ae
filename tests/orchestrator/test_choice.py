"""The choice between stopping and sleeping."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelswap.orchestrator.choice import STOP, Room, SleepWay, Verdict, choose

PLENTY = Room(host=1 << 40, device=1 << 40)


def good(level: int, seconds: float | None, host: int = 0, residue: int = 0) -> SleepWay:
    return SleepWay(level=level, verdict=Verdict.GOOD, seconds=seconds, host=host, residue=residue)


def test_a_model_that_was_never_seen_starting_cold_is_stopped() -> None:
    """Without a cold start's time, and answer, nothing is tried."""
    assert choose(None, [SleepWay(level=1), good(2, 0.1)], PLENTY) == STOP


def test_without_levels_a_model_is_stopped() -> None:
    """An engine that can't sleep is stopped."""
    assert choose(30.0, [], PLENTY) == STOP


def test_the_fastest_good_level_wins_if_it_beats_stopping() -> None:
    """Level 2 is taken where it is measured as faster, and neither where both are slower than stopping."""
    assert choose(30.0, [good(1, 2.0), good(2, 1.0)], PLENTY) == 2
    assert choose(30.0, [good(1, 1.0), good(2, 2.0)], PLENTY) == 1
    assert choose(0.5, [good(1, 1.0), good(2, 2.0)], PLENTY) == STOP


def test_a_faster_cold_way_takes_the_model_back() -> None:
    """With a standby that starts in 3 s, a wake of 5 s is of no use."""
    ways = [good(1, 5.0)]
    assert choose(30.0, ways, PLENTY) == 1
    assert choose(3.0, ways, PLENTY) == STOP


def test_the_lowest_level_that_was_not_measured_is_tried() -> None:
    """Level 1 first; level 2 only when level 1 is off or does not fit, or turned out slower than stopping."""
    assert choose(30.0, [SleepWay(level=1), SleepWay(level=2)], PLENTY) == 1
    assert choose(30.0, [SleepWay(level=1, verdict=Verdict.OFF), SleepWay(level=2)], PLENTY) == 2
    assert choose(30.0, [good(1, 2.0), SleepWay(level=2)], PLENTY) == 1
    assert choose(1.0, [good(1, 2.0), SleepWay(level=2)], PLENTY) == 2


def test_a_level_that_is_good_but_not_yet_measured_twice_is_tried_again() -> None:
    """The first, slow round doesn't condemn a level."""
    assert choose(1.0, [good(1, None)], PLENTY) == 1


def test_what_does_not_fit_into_host_memory_is_not_chosen() -> None:
    """Short of host memory, level 2 is taken instead of level 1."""
    ways = [good(1, 1.0, host=100), good(2, 3.0, host=5)]
    assert choose(30.0, ways, Room(host=99)) == 2
    assert choose(30.0, ways, Room(host=4)) == STOP


def test_what_would_leave_too_little_of_the_device_is_not_chosen() -> None:
    """A residue that other models have no room beside rules a level out; without readings nobody can tell."""
    ways = [good(1, 1.0, residue=100)]
    assert choose(30.0, ways, Room(host=10, device=99)) == STOP
    assert choose(30.0, ways, Room(host=10, device=None)) == 1


WAYS = st.lists(
    st.builds(
        SleepWay,
        level=st.sampled_from([1, 2]),
        verdict=st.sampled_from(Verdict),
        seconds=st.none() | st.floats(0, 1000),
        host=st.integers(0, 1000),
        residue=st.integers(0, 1000),
    ),
    unique_by=lambda way: way.level,
    max_size=2,
)


@given(st.none() | st.floats(0, 1000), WAYS, st.integers(-10, 1000), st.none() | st.integers(0, 1000))
def test_a_chosen_level_always_fits_and_is_never_off(
    stop: float | None, ways: list[SleepWay], host: int, device: int | None
) -> None:
    """Whatever was measured: what is chosen fits, isn't off, and isn't known to be slower than stopping."""
    room = Room(host=host, device=device)
    level = choose(stop, ways, room)
    if level == STOP:
        return
    (way,) = [way for way in ways if way.level == level]
    assert stop is not None
    assert way.verdict is not Verdict.OFF
    assert way.host <= host
    assert device is None or way.residue <= device
    assert way.verdict is Verdict.UNTRIED or way.seconds is None or way.seconds < stop
