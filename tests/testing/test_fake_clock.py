from __future__ import annotations

import asyncio

import pytest

from modelswap.testing.clock import FakeClock


def test_timers_fire_in_order_each_at_its_own_time() -> None:
    """Advancing past several timers lets each see the time it was set for, ties in order of making."""
    clock, seen = FakeClock(100.0), list[tuple[str, float]]()
    for name, delay in (("b", 2.0), ("a", 1.0), ("c", 2.0), ("never", 9.0)):
        clock.call_later(delay, lambda name=name: seen.append((name, clock.now())))  # type: ignore[misc]
    clock.advance(5.0)
    assert seen == [("a", 101.0), ("b", 102.0), ("c", 102.0)]
    assert (clock(), clock.next_timer()) == (105.0, 109.0)


def test_timers_made_on_the_way_fire_too() -> None:
    """A timer that sets another one within the advance sees it fire."""
    clock, seen = FakeClock(), list[float]()

    def again() -> None:
        seen.append(clock.now())
        clock.call_later(1.0, again)

    clock.call_later(1.0, again)
    clock.advance(3.0)
    assert seen == [1.0, 2.0, 3.0]


def test_a_cancelled_timer_does_not_fire() -> None:
    """Cancelling works before firing and does nothing after."""
    clock, seen = FakeClock(), list[str]()
    timer = clock.call_later(1.0, lambda: seen.append("no"))
    other = clock.call_later(1.0, lambda: seen.append("yes"))
    timer.cancel()
    clock.advance(2.0)
    other.cancel()
    other.fire()
    assert (seen, timer.pending, other.pending, clock.next_timer()) == (["yes"], False, False, None)


async def test_sleepers_wake_in_order_and_see_their_time() -> None:
    """Tasks that sleep on the clock run as virtual time passes, one after the other."""
    clock, seen = FakeClock(), list[tuple[str, float]]()

    async def tick(name: str, seconds: float) -> None:
        for _ in range(2):
            await clock.sleep(seconds)
            seen.append((name, clock.now()))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(tick("slow", 3.0))
        tasks.create_task(tick("fast", 1.0))
        await clock.run(6.0)
        assert seen == [("fast", 1.0), ("fast", 2.0), ("slow", 3.0), ("slow", 6.0)]
    await clock.sleep(0)


async def test_a_cancelled_sleeper_leaves_no_timer() -> None:
    """Giving up a sleep takes its timer away."""
    clock = FakeClock()
    sleeper = asyncio.create_task(clock.sleep(5.0))
    await clock.run(1.0)
    assert clock.next_timer() == 5.0
    sleeper.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sleeper
    assert clock.next_timer() is None
