"""Chunked transfer coding, incrementally: where a message ends, what it carries, how to add to a broken-off one."""

from __future__ import annotations

from typing import Final

_MAX_LINE: Final = 4096
_MAX_TRAILER: Final = 16 * 1024
_MAX_DIGITS: Final = 15


_SIZES: Final = {b"%x" % n: n for n in range(1, 4096)}
"""The usual sizes as they are written, which is the quickest way to read them."""


class BadChunk(ValueError):
    """Raised when bytes are not chunked coding as RFC 9112 has it."""


# What comes next. Plain integers: members of an enum take longer to compare.
_SIZE: Final = 0
_DATA: Final = 1
_DATA_END: Final = 2
_TRAILER: Final = 3


class ChunkScanner:
    """Follows one chunked body through reads of any size; copies only what straddles two reads."""

    __slots__ = ("_partial", "_remaining", "_state", "_trailer")

    def __init__(self) -> None:
        self._state = _SIZE
        self._remaining = 0
        self._partial = b""
        self._trailer = 0

    def scan(self, data: bytes, payload: list[bytes] | None = None) -> int:
        """Take in ``data``; return the index in it where the body ends, or -1 if it goes on.

        What the chunks carry is appended to ``payload``, if given. Raises `BadChunk`.
        """
        state = self._state
        pos = 0
        held = len(self._partial)
        if state == _SIZE and not held:
            # An event is usually a chunk, and a chunk a read.
            end = data.find(b"\r\n", 0, 8)
            length = _SIZES.get(data[:end]) if end > 0 else None
            if length is not None and end + length + 4 == len(data) and data.endswith(b"\r\n"):
                if payload is not None:
                    payload.append(data[end + 2 : -2])
                return -1
        if held:
            data = self._partial + data
            self._partial = b""
        size = len(data)
        while True:
            if state == _SIZE:
                end = data.find(b"\r\n", pos)
                if end < 0:
                    return self._pause(_SIZE, data, pos, _MAX_LINE)
                remaining = _chunk_size(data[pos:end])
                pos = end + 2
                if remaining == 0:
                    state = _TRAILER
                    continue
                self._remaining = remaining
                state = _DATA
            if state == _DATA:
                remaining = self._remaining
                end = pos + remaining
                if end > size:
                    if payload is not None and pos < size:
                        payload.append(data[pos:])
                    self._remaining = end - size
                    self._state = _DATA
                    return -1
                if payload is not None:
                    payload.append(data[pos:end])
                pos = end
                state = _DATA_END
            if state == _DATA_END:
                if data[pos : pos + 2] != b"\r\n":
                    if data[pos:] not in (b"", b"\r"):
                        raise BadChunk("a chunk does not end where its size says")
                    return self._pause(_DATA_END, data, pos, _MAX_LINE)
                pos += 2
                if pos == size:
                    self._state = _SIZE
                    return -1
                state = _SIZE
                continue
            end = data.find(b"\r\n", pos)
            if end < 0:
                return self._pause(_TRAILER, data, pos, _MAX_TRAILER)
            if end == pos:
                return pos + 2 - held
            self._trailer += end - pos
            if self._trailer > _MAX_TRAILER or b"\n" in data[pos:end] or b":" not in data[pos:end]:
                raise BadChunk("bad trailer")
            pos = end + 2

    def splice(self, text: bytes) -> bytes | None:
        """Return what adds ``text`` to a body that broke off, without ending it; None if that can't be.

        A chunk that broke off in the middle is filled up with the text's beginning, or with newlines after it.
        """
        if self._state == _SIZE:
            return None if self._partial else chunk(text)
        if self._state == _DATA_END:
            return b"\r\n"[len(self._partial) :] + chunk(text)
        if self._state == _DATA:
            room = self._remaining
            rest = text[room:]
            return text[:room].ljust(room, b"\n") + b"\r\n" + (chunk(rest) if rest else b"")
        return None

    def _pause(self, state: int, data: bytes, pos: int, limit: int) -> int:
        self._partial = data[pos:]
        if len(self._partial) > limit:
            raise BadChunk("a line is too long")
        self._state = state
        return -1


END: Final = b"0\r\n\r\n"
"""What ends a chunked body."""


def chunk(payload: bytes) -> bytes:
    """Return ``payload``, which must not be empty, as one chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def _chunk_size(line: bytes) -> int:
    if not line.isalnum():
        line, mark, extension = line.partition(b";")
        line = line.rstrip(b" \t")
        if not mark or not line.isalnum() or b"\n" in extension or b"\r" in extension or b"\0" in extension:
            raise BadChunk("bad chunk size")
    if len(line) > _MAX_DIGITS or b"x" in line or b"X" in line:  # int() would take 0x10
        raise BadChunk("bad chunk size")
    try:
        return int(line, 16)
    except ValueError:
        raise BadChunk("bad chunk size") from None
