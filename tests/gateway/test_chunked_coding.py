"""Chunked bodies, however they are split into reads."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelswap.gateway.chunked import END, BadChunk, ChunkScanner, chunk


@st.composite
def _bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Return a chunked body and what it carries."""
    pieces = draw(st.lists(st.binary(min_size=1, max_size=40) | st.just(b"0\r\n\r\n"), max_size=6))
    raw = b""
    for piece in pieces:
        size = f"{len(piece):{draw(st.sampled_from(['x', 'X', '04x']))}}".encode()
        raw += size + draw(st.sampled_from([b"", b";a=b", b' ;q="x"'])) + b"\r\n" + piece + b"\r\n"
    trailer = draw(st.sampled_from([b"", b"x-a: b\r\n", b"x-a: b\r\nx-c: d\r\n"]))
    return raw + draw(st.sampled_from([b"0", b"000"])) + b"\r\n" + trailer + b"\r\n", b"".join(pieces)


@st.composite
def _cut(draw: st.DrawFn, raw: bytes) -> list[bytes]:
    """Return ``raw`` in pieces."""
    places = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    return [raw[a:b] for a, b in zip([0, *places], [*places, len(raw)], strict=True)]


@settings(deadline=None)
@given(st.data(), _bodies(), st.binary(max_size=20))
def test_any_split_gives_the_same(data: st.DataObject, body: tuple[bytes, bytes], after: bytes) -> None:
    """The end is found at the same byte and the same payload comes out, whatever the reads; what follows is left."""
    raw, payload = body
    scanner = ChunkScanner()
    carried: list[bytes] = []
    seen = 0
    for piece in data.draw(_cut(raw + after)):
        end = scanner.scan(piece, carried) if piece else -1
        if end >= 0:
            assert seen + end == len(raw)
            assert b"".join(carried) == payload
            return
        seen += len(piece)
        assert seen < len(raw)
    raise AssertionError("no end found")


@settings(deadline=None)
@given(st.data(), _bodies(), st.binary(min_size=1, max_size=60))
def test_broken_off_body_can_be_added_to(data: st.DataObject, body: tuple[bytes, bytes], text: bytes) -> None:
    """What splice adds is whole chunks with the text in them, padded by newlines at most; the body goes on."""
    raw, payload = body
    scanner = ChunkScanner()
    length = data.draw(st.integers(0, len(raw) - 1))
    before: list[bytes] = []
    assert scanner.scan(raw[:length], before) == -1
    last = scanner.splice(text)
    if last is None:
        return  # it broke off within a size, or behind the last chunk
    whole: list[bytes] = []
    assert ChunkScanner().scan(raw[:length] + last, whole) == -1
    assert ChunkScanner().scan(raw[:length] + last + END) == length + len(last) + len(END)
    carried = b"".join(whole)
    assert carried.startswith(b"".join(before) + text)
    assert carried[len(b"".join(before) + text) :].strip(b"\n") == b""
    assert payload.startswith(b"".join(before))


@pytest.mark.parametrize(
    "raw",
    [
        b"x\r\n",
        b"\r\n",
        b"0x5\r\nhello\r\n",
        b"+5\r\nhello\r\n",
        b"5_0\r\n",
        b"-1\r\n",
        b" 5\r\nhello\r\n",
        b"5 \r\nhello\r\n",
        b"5;a\nb\r\nhello\r\n",
        b"5\r\nhelloX\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"ffffffffffffffffff\r\n",
        b"0\r\nno colon\r\n\r\n",
        b"0\r\na: b\nc: d\r\n\r\n",
        b"5" * 5000,
        b"0\r\n" + b"a: b\r\n" * 5000,
    ],
)
def test_bad_framing_is_refused(raw: bytes) -> None:
    """Sizes and line ends that parsers could read in two ways are errors, however they are split."""
    with pytest.raises(BadChunk):
        ChunkScanner().scan(raw)
    with pytest.raises(BadChunk):
        _scan_bytewise(raw)


def test_chunk_and_end_are_read_back() -> None:
    """What is written as chunks reads as the same."""
    carried: list[bytes] = []
    raw = chunk(b"hello") + chunk(b"0\r\n\r\n") + END
    assert ChunkScanner().scan(raw, carried) == len(raw)
    assert carried == [b"hello", b"0\r\n\r\n"]


def _scan_bytewise(raw: bytes) -> None:
    scanner = ChunkScanner()
    for i in range(len(raw)):
        assert scanner.scan(raw[i : i + 1]) == -1
