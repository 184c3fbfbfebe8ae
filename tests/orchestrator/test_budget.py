"""The ranking of sleepers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelswap.orchestrator.budget import GIB, MOST_USES, Ranking, Sleeper
from modelswap.orchestrator.sleepers import CLEARLY


def sleeper(model: str, host: int = GIB, residue: int = 0) -> Sleeper:
    return Sleeper(instance=f"{model}.1.1", model=model, host=host, residue=residue)


def names(chosen: list[Sleeper]) -> list[str]:
    return [one.model for one in chosen]


def test_nothing_is_dropped_without_need() -> None:
    """A need of nothing, or less, has no victims."""
    assert Ranking().victims([sleeper("a")], 0, 0) == []
    assert Ranking().victims([sleeper("a")], -5, -5) == []


def test_the_one_that_saves_least_goes_first() -> None:
    """Of equally large ones, equally often used, the one that saves fewer seconds."""
    ranking = Ranking()
    ranking.used("slow", saved=60.0, size=GIB)
    ranking.used("quick", saved=2.0, size=GIB)
    assert names(ranking.victims([sleeper("slow"), sleeper("quick")], need_host=1)) == ["quick"]


def test_the_one_that_takes_most_for_the_same_goes_first() -> None:
    """Of two that save as much, the larger one."""
    ranking = Ranking()
    ranking.used("large", saved=30.0, size=8 * GIB)
    ranking.used("small", saved=30.0, size=GIB)
    assert names(ranking.victims([sleeper("large", 8 * GIB), sleeper("small")], need_host=1)) == ["large"]


def test_what_is_used_often_stays() -> None:
    """Frequent use outweighs a somewhat smaller saving."""
    ranking = Ranking()
    for _ in range(5):
        ranking.used("often", saved=10.0, size=GIB)
    ranking.used("once", saved=20.0, size=GIB)
    assert names(ranking.victims([sleeper("often"), sleeper("once")], need_host=1)) == ["once"]


def test_a_past_favourite_is_overtaken_in_time() -> None:
    """What nobody asks for any more is dropped in the end, because each victim raises the clock."""
    ranking = Ranking()
    for _ in range(10):
        ranking.used("favourite", saved=30.0, size=GIB)
    gone = []
    for _ in range(100):
        for model in ("b", "c"):
            ranking.used(model, saved=10.0, size=GIB)
            (victim,) = ranking.victims([sleeper("favourite"), sleeper("b"), sleeper("c")], need_host=1)
            ranking.dropped(victim.model)
            gone.append(victim.model)
        if "favourite" in gone:
            break
    assert gone[0] != "favourite"
    assert "favourite" in gone


def test_a_past_favourite_is_overtaken_even_if_nobody_is_dropped() -> None:
    """A newcomer that is stopped each time, because a favourite sleeps in its place, is worth clearly more one day."""
    ranking = Ranking()
    for _ in range(int(MOST_USES)):
        ranking.used("favourite", saved=30.0, size=GIB)
    uses = 0
    while ranking.credit("now") <= ranking.credit("favourite") * CLEARLY:
        ranking.used("now", saved=30.0, size=GIB)
        uses += 1
        assert uses < 50
    assert uses > 5


def test_those_in_rotation_are_worth_about_the_same() -> None:
    """Five alike that are asked for in turn don't push each other out again and again."""
    ranking = Ranking()
    for turn in range(100):
        ranking.used("abcde"[turn % 5], saved=30.0, size=GIB)
    assert max(map(ranking.credit, "abcde")) < min(map(ranking.credit, "abcde")) * CLEARLY


def test_uses_fade() -> None:
    """However often a model was used, its uses count no more than the most there are."""
    ranking = Ranking()
    for _ in range(1000):
        ranking.used("a", saved=1.0, size=GIB)
    assert ranking.credit("a") - ranking.clock <= MOST_USES


def test_one_large_victim_spares_the_small_ones() -> None:
    """Ones that were taken first are let off when a larger one suffices alone."""
    ranking = Ranking()
    ranking.used("tiny", saved=0.1, size=GIB)
    ranking.used("huge", saved=90.0, size=10 * GIB)
    chosen = ranking.victims([sleeper("tiny", GIB), sleeper("huge", 10 * GIB)], need_host=5 * GIB)
    assert names(chosen) == ["huge"]


def test_what_does_not_help_is_not_dropped() -> None:
    """Too little to drop: nothing is, unless all that helps is asked for. One without residue frees no device."""
    ranking = Ranking()
    all_ = [sleeper("a", GIB, residue=10), sleeper("b", GIB, residue=0)]
    assert ranking.victims(all_, need_device=11) == []
    assert names(ranking.victims(all_, need_device=11, partly=True)) == ["a"]
    assert names(ranking.victims(all_, need_device=10)) == ["a"]


SLEEPERS = st.lists(
    st.builds(
        Sleeper,
        instance=st.uuids().map(str),
        model=st.sampled_from("abcdefgh"),
        host=st.integers(0, 100),
        residue=st.integers(0, 100),
    ),
    unique_by=lambda one: one.model,
    max_size=8,
)
USES = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.floats(0, 100), st.integers(0, 1 << 40)), max_size=20)


@given(SLEEPERS, USES, st.integers(-5, 300), st.integers(-5, 300))
def test_victims_suffice_and_none_of_them_is_spare(
    sleepers: list[Sleeper], uses: list[tuple[str, float, int]], host: int, device: int
) -> None:
    """Victims free what is needed, and without any one of them they would not; none at all if even all are too few."""
    ranking = Ranking()
    for model, saved, size in uses:
        ranking.used(model, saved, size)
    chosen = ranking.victims(sleepers, host, device)

    def enough(some: list[Sleeper]) -> bool:
        return sum(s.host for s in some) >= host and sum(s.residue for s in some) >= device

    if not enough(sleepers):
        assert chosen == []
        return
    assert enough(chosen)
    assert all(not enough([other for other in chosen if other is not one]) for one in chosen)
