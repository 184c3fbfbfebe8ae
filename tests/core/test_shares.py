"""How an instance's slots are divided between gateways."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelswap.core.leases import Claim, Lease, shares
from modelswap.protocol.messages import Epoch

counts = st.integers(0, 6)
needs = st.lists(st.tuples(counts, counts, st.integers(0, 5)), min_size=1, max_size=5)


def claims_of(drawn: list[tuple[int, int, int]]) -> list[Claim]:
    """Return claims of running and waiting requests, with ranks."""
    return [
        Claim(gateway=f"g{n}", running=running, waiting=waiting, rank=float(rank) if waiting else float("inf"))
        for n, (running, waiting, rank) in enumerate(drawn)
    ]


@given(slots=st.integers(0, 12), drawn=needs)
def test_all_slots_are_given_and_no_more(slots: int, drawn: list[tuple[int, int, int]]) -> None:
    """The shares add up to the slots, and none is negative."""
    given_out = shares(slots, claims_of(drawn))
    assert sum(given_out.values()) == slots
    assert min(given_out.values()) >= 0


@given(slots=st.integers(0, 12), drawn=needs)
def test_nobody_gets_surplus_while_another_lacks(slots: int, drawn: list[tuple[int, int, int]]) -> None:
    """A gateway has more than it needs only when every gateway has all that it needs."""
    claims = claims_of(drawn)
    given_out = shares(slots, claims)
    lacking = [c for c in claims if given_out[c.gateway] < c.need]
    surplus = [c for c in claims if given_out[c.gateway] > c.need]
    assert not (lacking and surplus)


@given(slots=st.integers(0, 12), drawn=needs)
def test_who_lacks_has_as_much_as_anybody(slots: int, drawn: list[tuple[int, int, int]]) -> None:
    """A gateway that could fill more slots has at most one fewer than any other."""
    claims = claims_of(drawn)
    given_out = shares(slots, claims)
    for claim in claims:
        if given_out[claim.gateway] < claim.need:
            assert given_out[claim.gateway] >= max(given_out.values()) - 1


@given(drawn=needs, slots=st.integers(1, 4))
def test_too_few_slots_go_to_the_oldest_waiters(slots: int, drawn: list[tuple[int, int, int]]) -> None:
    """With fewer slots than gateways that want one, nobody who waits longer goes without for one who waits less."""
    claims = [c for c in claims_of(drawn) if c.need]
    if slots >= len(claims):
        return
    given_out = shares(slots, claims)
    without = [c.rank for c in claims if not given_out[c.gateway] and c.waiting]
    served = [c.rank for c in claims if given_out[c.gateway]]
    assert not without or max(served) <= min(without)


@given(slots=st.integers(0, 12), drawn=needs)
def test_dividing_again_changes_nothing(slots: int, drawn: list[tuple[int, int, int]]) -> None:
    """The same claims get the same shares, so that nothing is sent to and fro."""
    claims = claims_of(drawn)
    assert shares(slots, claims) == shares(slots, claims)


def lease(granted: int = 0) -> Lease:
    """Return a gateway's lease."""
    return Lease(gateway="g", epoch=Epoch(1, 1), granted=granted, upper=granted)


def test_slots_taken_away_count_until_confirmed() -> None:
    """A gateway may use what it had until it has said that it knows better."""
    held = lease(3)
    held.grant(1)
    assert held.upper == 3
    held.report(revision=0, in_flight=0, idle_since=0.0)
    assert held.upper == 3
    held.report(revision=1, in_flight=2, idle_since=0.0)
    assert held.upper == 2
    held.report(revision=1, in_flight=1, idle_since=0.0)
    assert held.upper == 1


def test_a_confirmation_overtaken_by_a_new_grant_counts() -> None:
    """A report about a word before the last one frees what only still older words allowed."""
    held = lease(3)
    held.grant(0)
    held.grant(1)
    held.report(revision=1, in_flight=0, idle_since=0.0)
    assert held.upper == 1


@given(steps=st.lists(st.one_of(st.integers(0, 4), st.just("hear"), st.just("tell")), max_size=40))
def test_upper_bounds_what_the_gateway_goes_by(steps: list[int | str]) -> None:
    """Whatever was said and heard in whatever order, ``upper`` is at least what the gateway may use."""
    held = lease(0)
    down: list[tuple[int, int]] = []
    up: list[int] = []
    slots = revision = 0
    for step in steps:
        if isinstance(step, int):
            held.grant(step)
            down.append((held.revision, step))
        elif step == "hear" and down:
            revision, slots = down.pop(0)
            up.append(revision)
        elif step == "tell" and up:
            held.report(up.pop(0), in_flight=0, idle_since=0.0)
        assert held.upper >= max([slots, *(told for _, told in down)])
    if not down and not up and held.revision == revision:
        assert held.upper == slots
