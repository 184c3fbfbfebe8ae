"""Finding and replacing the top-level model of a request's body."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelswap.gateway import body
from modelswap.protocol.errors import Code, ModelswapError

_TEXT = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(
    ["model", 'a"model":"b', "\\", "stream"]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=12,
)


@st.composite
def _spelled(draw: st.DrawFn, text: str) -> str:
    """Return a JSON string for ``text`` with any of its letters escaped."""
    out = ""
    for letter in text:
        plain = json.dumps(letter, ensure_ascii=draw(st.booleans()))[1:-1]
        if ord(letter) < 0x10000 and draw(st.integers(0, 9)) == 0:
            plain = f"\\u{ord(letter):04{draw(st.sampled_from('xX'))}}"
        out += plain
    return f'"{out}"'


@st.composite
def _objects(draw: st.DrawFn) -> bytes:
    """Return an object as a client may send it: keys twice, odd spaces, escapes, surrogates."""
    space = st.sampled_from(["", " ", "\n", "\t ", "\r\n"])
    members = []
    keys = st.sampled_from(["model", "model", "stream", "messages", "Model"]) | _TEXT
    for key in draw(st.lists(keys, max_size=6)):
        if key == "model" and draw(st.booleans()):
            value = draw(_spelled(draw(_TEXT)))
        else:
            value = json.dumps(draw(_VALUES), ensure_ascii=draw(st.booleans()))
        members.append(f"{draw(space)}{draw(_spelled(key))}{draw(space)}:{draw(space)}{value}{draw(space)}")
    text = "{" + ",".join(members) + "}"
    return text.encode("utf-8", "replace")  # a lone surrogate can be sent only as an escape


@settings(deadline=None)
@given(_objects())
def test_reads_what_json_reads(raw: bytes) -> None:
    """The model and stream found are those that Python's parser finds, duplicates, escapes and surrogates included."""
    expected = json.loads(raw)
    found = body.read(raw)
    assert found.model == expected.get("model")
    assert found.stream == expected.get("stream")


@settings(deadline=None)
@given(_objects(), _TEXT.filter(lambda name: not any("\ud800" <= letter <= "\udfff" for letter in name)))
def test_replaces_the_model_and_nothing_else(raw: bytes, name: str) -> None:
    """Afterwards the parser finds the new name, and everything else is as it was, but for one run of bytes."""
    if type(body.read(raw).model) is not str:
        return
    replaced = body.replace_model(raw, name)
    assert body.read(replaced).model == name
    before, after = _pairs(raw), _pairs(replaced)
    last = max(i for i, (key, _) in enumerate(before) if key == "model")
    assert after == [*before[:last], ("model", name), *before[last + 1 :]]


def test_bytes_around_the_model_stay() -> None:
    """Formatting, escapes and number spellings outside the model's string are kept byte for byte."""
    raw = b'{ "n" : 1.50e+1 ,\r\n "a":"\\u00e9\xc3\xa9", "model"\t:\n"alias" , "tools":[{"model":"alias"}] }'
    assert body.replace_model(raw, "real") == raw.replace(b'"alias" ,', b'"real" ,')


def test_key_called_model_in_text_does_not_count() -> None:
    """A model named inside a string, in a nested object or by a key that ends alike is left alone."""
    raw = json.dumps({"x": 'say "model": "no"', "y": {"model": "no"}, 'z"model': "no", "model": "yes"}).encode()
    assert body.read(raw).model == "yes"
    assert json.loads(body.replace_model(raw, "new")) == {**json.loads(raw), "model": "new"}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"model"',
        b"null",
        b'{"model":"a"} x',
        b"{'model':'a'}",
        b'{"model":"a","x":NaN}',
        b'{"x":"\\ud800","y":NaN}',
        b'{"x":"\\ud800"',
        b'["\\ud800"]',
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"x":"\\ud800","a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"\xff\xfe{\x00}\x00",
    ],
)
def test_refuses_what_is_no_json_object(raw: bytes) -> None:
    """Anything but one JSON object is refused with its own code."""
    with pytest.raises(ModelswapError) as caught:
        body.read(raw)
    assert caught.value.code == Code.INVALID_JSON


def test_many_nested_models_are_no_burden() -> None:
    """A body in which the key occurs very often is handled in one pass."""
    raw = b'{"a":[' + b",".join([b'{"model":"x"}'] * 100_000) + b'],"model":"alias","b":{"model":"y"}}'
    assert body.replace_model(raw, "real") == raw.replace(b'"model":"alias"', b'"model":"real"')


def _pairs(raw: bytes) -> list[tuple[str, Any]]:
    pairs = json.loads(raw, object_pairs_hook=list)
    assert isinstance(pairs, list)
    return pairs
