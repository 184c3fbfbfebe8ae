"""Tokens to text and text to stop strings, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns a growing list of tokens into text that never has to be taken back.

    ``decode`` turns tokens into text, dropping or replacing an incomplete UTF-8 sequence at the end. Only the tokens
    since the last piece are decoded again, together with the piece before, because some tokenizers decide about a
    space by what precedes it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._previous = 0
        self._done = 0

    def push(self, token: int) -> str:
        """Add a token; return the text that became certain, perhaps none."""
        self._tokens.append(token)
        text = self._pending()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._previous, self._done = self._done, len(self._tokens)
        return text

    def flush(self) -> str:
        """Return what is left when no more tokens come."""
        text = self._pending()
        self._previous = self._done = len(self._tokens)
        return text

    def _pending(self) -> str:
        known = self._decode(self._tokens[self._previous : self._done]) if self._done > self._previous else ""
        return self._decode(self._tokens[self._previous :])[len(known) :]


class StopFilter:
    """Ends a stream of text before the first stop string, also one that is split over pieces."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add a piece; return what can be given out. Once ``stopped``, nothing more comes."""
        if self.stopped:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            out, self._held = self._held[: min(places)], ""
            return out
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """Return what was held back, when no more text comes."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
