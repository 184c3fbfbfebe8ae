from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelswap.engines.openvino_server.text import Detokenizer, StopFilter


def bytes_dropping(tokens: Sequence[int]) -> str:
    """Decode as OpenVINO does: each token is a byte, what is incomplete is left out."""
    return bytes(tokens).decode(errors="ignore")


def bytes_replacing(tokens: Sequence[int]) -> str:
    """Decode as many tokenizers do: what is incomplete becomes U+FFFD."""
    return bytes(tokens).decode(errors="replace")


def words(tokens: Sequence[int]) -> str:
    """Decode as SentencePiece does: every word begins with a space, which the very first loses."""
    return "".join(f" w{token}" for token in tokens)[1:]


@settings(deadline=None)
@given(st.text(max_size=40))
def test_incomplete_characters_are_held_back(text: str) -> None:
    """No piece has half a character, and all pieces together are the whole text, for both kinds of tokenizers."""
    for decode in (bytes_dropping, bytes_replacing):
        detokenizer = Detokenizer(decode)
        pieces = [detokenizer.push(token) for token in text.encode()]
        assert "".join(pieces) + detokenizer.flush() == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


def test_a_broken_end_is_flushed() -> None:
    """What can't be completed any more comes out at the end, as the tokenizer shows it."""
    detokenizer = Detokenizer(bytes_replacing)
    assert detokenizer.push("é".encode()[0]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_spaces_between_words_survive() -> None:
    """A tokenizer that decides about a space by what precedes it gives the same text piece by piece."""
    detokenizer = Detokenizer(words)
    assert [detokenizer.push(token) for token in (1, 2, 3)] == ["w1", " w2", " w3"]


def test_only_the_last_tokens_are_decoded_again() -> None:
    """The cost of a token doesn't grow with the length of the answer."""
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return bytes_dropping(tokens)

    detokenizer = Detokenizer(decode)
    for token in b"x" * 500:
        detokenizer.push(token)
    assert longest == 2


def filtered(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """Return all that comes out, and whether a stop string was met."""
    stop_filter = StopFilter(stops)
    out = "".join(stop_filter.push(piece) for piece in pieces)
    return (out, True) if stop_filter.stopped else (out + stop_filter.flush(), False)


@settings(deadline=None)
@given(st.lists(st.text("ab<|", max_size=4), max_size=12), st.lists(st.text("ab<|", max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    """However the text is cut into pieces, all that comes before the first stop string comes out and no more."""
    stop_filter = StopFilter(stops)
    seen = ""
    out = ""
    for piece in pieces:
        seen += piece
        out += stop_filter.push(piece)
        places = [seen.find(stop) for stop in stops if stop and stop in seen]
        assert stop_filter.stopped == bool(places)
        if places:
            assert out == seen[: min(places)]
            break
    else:
        assert out + stop_filter.flush() == seen


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_stop_string_split_over_two_pieces(cut: int) -> None:
    """A stop string is found wherever the border between two pieces lies, and none of it comes out."""
    text = "ab<|end|>"
    assert filtered([text[:cut], text[cut:], "more"], ["<|end|>"]) == ("ab", True)


def test_what_only_looked_like_a_stop_string_comes_out() -> None:
    """The beginning of a stop string that doesn't go on is given out with what follows."""
    assert filtered(["a<|", "e", "nough", " <"], ["<|end|>"]) == ("a<|enough <", False)


def test_no_stop_strings() -> None:
    """Without stop strings, and with an empty one, everything comes out at once."""
    assert StopFilter([]).push("text") == "text"
    assert StopFilter([""]).push("text") == "text"
