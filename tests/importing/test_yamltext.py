"""Foreign YAML is read as it is written, and what is wrong with it is told with its line."""

from __future__ import annotations

import pytest

from modelswap.importing.result import CannotImport
from modelswap.importing.yamltext import Override, parse


def test_scalars_stay_as_written() -> None:
    """Numbers, switches and times are texts; null is nothing; a quoted null is a text."""
    value = parse("a: 0.90\nb: on\nc: 22:22\nd: 007\ne: null\nf: ~\ng:\nh: 'null'\ni: !!str 5\n", "f")
    assert value == {
        "a": "0.90", "b": "on", "c": "22:22", "d": "007", "e": None, "f": None, "g": None, "h": "null", "i": "5",
    }  # fmt: skip


def test_merge_keys_lie_below_what_stands_beside_them() -> None:
    """`<<` takes one mapping or several, the first of which counts most."""
    value = parse("a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: {<<: [*a, *b], x: 3}\n", "f")
    assert value["c"] == {"x": "3", "y": "1", "z": "2"}


def test_tags_of_compose_are_kept_and_others_ignored() -> None:
    """`!override` and `!reset` mean something; a tag of somebody else's is only a tag."""
    value = parse("a: !override [1]\nb: !reset null\nc: !secret x\nd: !vault\n  e: f\n", "f")
    assert value == {"a": Override(["1"]), "b": Override(None, gone=True), "c": "x", "d": {"e": "f"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: 2\n", "f:2: not YAML"),
        ("a: 1\na: 2\n", "f:2: not YAML: the key 'a' was given on line 1 already"),
        ("a: &a {b: *a}\n", "refers to itself"),
        ("a: &a {<<: *a}\n", "refers to itself"),
        ("a: {<<: 5}\n", "'<<' wants a mapping"),
        ("{[1]: 2}\n", "a key must be a text"),
        ("- a\n- b\n", "wants a mapping"),
        ("just a text", "wants a mapping"),
        ("", "f: empty"),
        ("# nothing\n", "f: empty"),
        ("a: \x07", "not YAML"),
        ("[" * 3000, "f"),
    ],
)
def test_what_is_no_mapping_is_told(text: str, said: str) -> None:
    """Every broken file ends in one message with its place."""
    with pytest.raises(CannotImport) as raised:
        parse(text, "f")
    assert said in str(raised.value)
    assert raised.value.remedy


def test_a_bomb_of_aliases_is_refused() -> None:
    """A small file that means billions of values is not unfolded."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(CannotImport, match="too many values"):
        parse("\n".join(lines), "f")
