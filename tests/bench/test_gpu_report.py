from __future__ import annotations

from typing import Any

import pytest

from bench.gpu_report import (
    COLD,
    FIRST,
    GIB,
    LATER,
    OTHER,
    Found,
    Machine,
    Release,
    Swap,
    bound,
    kinds,
    put_into,
    render,
    same_answers,
)

MACHINE = Machine(
    name="NVIDIA X", driver="580.1", torch="2.9", date="2026-11-28", cores=16, gpu_bytes=140 * GIB, host_bytes=128 * GIB
)


def swap(source: str | None, target: str, out: str, mechanism: str, seconds: float = 1.0, answer: str = "") -> Swap:
    """Return a swap as the benchmark sees it."""
    phases = {"drain": 0.001, "out": 0.2, "release": 0.02, "in": 0.3, "canary": 0.05}
    record = {"source": source, "target": target, "out": out, "mechanism": mechanism, "phases": phases}
    return Swap(seconds=seconds, answer=answer or f"answer of {target}", model=target, record=record)


def rotation() -> list[Swap]:
    """Return the swaps that modelswap makes of two models that may sleep, from the beginning."""
    return [
        swap(None, "a", "", "cold"),
        swap("a", "b", "stop", "cold"),
        swap("b", "a", "stop", "cold"),
        swap("a", "b", "sleep", "cold"),
        swap("b", "a", "sleep", "wake", 0.9),
        swap("a", "b", "sleep", "wake", 0.8),
        swap("b", "a", "sleep", "wake", 0.5),
        swap("a", "b", "sleep", "wake", 0.7),
        swap("b", "a", "sleep", "wake", 0.6),
    ]


def found(**fields: Any) -> Found:
    """Return what a run found."""
    return Found(machine=MACHINE, weights=8 * GIB, share=0.9, **fields)


def test_swaps_are_told_apart_by_how_they_went() -> None:
    """A sleep or a wake is the first until both models have slept and woken since their cold starts."""
    assert kinds(rotation()) == [OTHER, COLD, COLD, OTHER, FIRST, FIRST, LATER, LATER, LATER]


def test_a_new_cold_start_begins_anew() -> None:
    """A model that had to be started again sleeps for the first time again."""
    again = [*rotation(), swap("a", "b", "sleep", "cold"), swap("b", "a", "sleep", "wake")]
    assert kinds(again)[-2:] == [OTHER, FIRST]


@pytest.mark.parametrize(
    ("swaps", "same"),
    [
        (rotation(), True),
        ([*rotation(), swap("a", "b", "sleep", "wake", answer="something else")], False),
        ([swap("a", "b", "stop", "cold", answer="x"), swap("b", "a", "stop", "cold", answer="x")], False),
    ],
    ids=["the same", "another one after a wake", "two models that answer alike"],
)
def test_answers_are_the_same_or_not(swaps: list[Swap], same: bool) -> None:
    """Each model must answer the same every time, and something else than the other one."""
    assert same_answers(found(swaps={0: swaps[:2], 1: swaps[2:]})) is same
    assert ("**DIFFER**" in render(found(swaps={1: swaps}))) is not same


def test_the_bound_is_bytes_by_bandwidth() -> None:
    """At level 1 the old weights go out before the new come in; else they are only read."""
    rates = {"pinned_in": 8 * GIB / 0.2, "pinned_out": 8 * GIB / 0.3, "pageable_in": 1.0, "pageable_out": 1.0}
    assert bound(found(bandwidth=rates), 0) == pytest.approx(0.2)
    assert bound(found(bandwidth=rates), 2) == pytest.approx(0.2)
    assert bound(found(bandwidth=rates), 1) == pytest.approx(0.5)
    assert bound(found(), 1) is None


def test_a_section_tells_it_all() -> None:
    """Hardware, bandwidth, releases, swaps with phases and share, residue, and what is missing."""
    text = render(
        found(
            bandwidth={"pinned_in": 50e9, "pinned_out": 40e9, "pageable_in": 9e9, "pageable_out": 8e9},
            releases=[Release(event="SIGKILL", size=8 * GIB, seconds=[0.2, 0.0031, 0.004])],
            swaps={1: rotation(), 0: rotation()[:3]},
            asleep={1: (GIB // 2, 12 * GIB)},
            missing=["swaps by sleep level 2"],
        )
    )
    lines = text.splitlines()
    assert lines[0] == "## Swaps on a GPU (NVIDIA X, driver 580.1, torch 2.9, 2026-11-28)"
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120
    assert "| pinned | 50.0 | 40.0 |" in lines
    assert "| SIGKILL | 8.00 GiB | 4.0 ms | 200 ms | 3 |" in lines
    phases = "1.0 ms | 200 ms | 20 ms | 300 ms | 50 ms"
    assert f"| stop, cold start | **1.000 s** (1.000 to 1.000) | {phases} | 172 ms | 17% | 2 |" in lines
    assert f"| sleep level 1, later | **0.600 s** (0.500 to 0.700) | {phases} | 387 ms | 64% | 3 |" in lines
    assert "Asleep at level 1, an engine keeps 0.50 GiB of the device and takes 12.00 GiB of host memory." in lines
    assert lines[-1] == "Not measured in this run: swaps by sleep level 2."


def test_tables_have_as_many_cells_in_each_row() -> None:
    """Also where bandwidth is not known, and nothing else either."""
    for known in (found(swaps={1: rotation()}), found()):
        tables = [line for line in render(known).splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in tables}) <= 1


def test_a_section_is_put_last_and_replaces_its_like() -> None:
    """One section for each hardware: a second run replaces the first, and leaves all else as it is."""
    once = put_into("# Page\n\nText.\n", "X", "## X 1\n")
    both = put_into(once, "Y", "## Y 1\n")
    again = put_into(both, "X", "## X 2\n")
    assert once.startswith("# Page\n\nText.\n\n<!-- bench-gpu: X -->\n## X 1\n")
    assert again == both.replace("X 1", "X 2")
    assert put_into("", "X", "## X\n") == "<!-- bench-gpu: X -->\n## X\n<!-- end of bench-gpu: X -->\n"
    with pytest.raises(ValueError, match="mend that by hand"):
        put_into(once.replace("<!-- end", "<!-- and"), "X", "## X 2\n")
