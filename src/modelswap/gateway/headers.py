"""Message heads: what is kept of them, what is dropped, and how their messages are framed.

llhttp (through httptools) judges every request's head; here it is only cut into lines.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from modelswap.gateway.routes import inference

CHUNKED: Final = -1
"""A message's length if its body is chunked."""
UNTIL_CLOSE: Final = -2
"""A response's length if its body ends with the connection."""

IDLE_SECONDS: Final = 4.0
"""How long an engine's idle connection is kept: less than any engine's own limit (uvicorn's is 5 s)."""
IDLE_MARGIN: Final = 1.0
"""How much earlier than the engine says its connection is given up."""

_MAX_DIGITS: Final = 18
_BODILESS: Final = frozenset({204, 304})


class BadHead(ValueError):
    """Raised for a head that isn't HTTP/1 or whose framing is in doubt."""


class _Field(IntEnum):
    DROP = 0
    CONNECTION = 1
    LENGTH = 2
    CODING = 3
    REQUEST_ID = 4
    EXPECT = 5
    KEEP_ALIVE = 6
    CONTENT_TYPE = 7
    CONTENT_ENCODING = 8


_HOP_BY_HOP: Final = {
    b"connection": _Field.CONNECTION,
    b"proxy-connection": _Field.DROP,
    b"keep-alive": _Field.DROP,
    b"te": _Field.DROP,
    b"trailer": _Field.DROP,
    b"transfer-encoding": _Field.CODING,
    b"upgrade": _Field.DROP,
    b"http2-settings": _Field.DROP,
    b"proxy-authenticate": _Field.DROP,
    b"proxy-authorization": _Field.DROP,
    b"proxy-authentication-info": _Field.DROP,
    b"content-length": _Field.LENGTH,
    b"x-request-id": _Field.REQUEST_ID,
}
_REQUEST: Final = _HOP_BY_HOP | {
    b"host": _Field.DROP,
    b"expect": _Field.EXPECT,
    b"authorization": _Field.DROP,
    b"x-api-key": _Field.DROP,
    b"api-key": _Field.DROP,
    b"cookie": _Field.DROP,
}
_RESPONSE: Final = _HOP_BY_HOP | {
    b"keep-alive": _Field.KEEP_ALIVE,
    b"content-type": _Field.CONTENT_TYPE,
    b"content-encoding": _Field.CONTENT_ENCODING,
}
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: [^\r\n\0]*)?")
_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TIMEOUT: Final = re.compile(rb"timeout=(\d{1,6})")


class RequestHead:
    """A request's head, without its body's length. Shared by requests that look alike, so never changed.

    ``lines`` are the header lines to pass on, ``kept`` the same as one; ``route`` is where a POST goes, if anywhere.
    """

    __slots__ = ("expects", "http10", "keep_alive", "kept", "lines", "method", "request_id", "route", "target")

    def __init__(self, method: bytes, target: bytes, http10: bool) -> None:
        self.method = method
        self.target = target
        self.http10 = http10
        self.keep_alive = not http10
        self.request_id: bytes | None = None
        self.expects = False
        self.route = inference(target) if method == b"POST" else None
        self.lines: list[bytes] = []
        self.kept = b""


class ResponseHead:
    """A response's head, without its body's length. Shared by responses that look alike, so never changed.

    ``kept`` is the status line and the header lines to pass on, content-length and transfer-encoding not among them;
    ``reusable`` is how many seconds its connection may be kept afterwards, None if not at all.
    """

    __slots__ = ("content_type", "encoded", "kept", "lines", "reusable", "status")

    def __init__(self, status: int) -> None:
        self.status = status
        self.content_type = b""
        self.encoded = False
        self.lines: list[bytes] = []
        self.kept = b""
        self.reusable: float | None = IDLE_SECONDS

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is events that more can be added to."""
        return self.content_type.startswith(b"text/event-stream") and not self.encoded


Likeness = tuple[bytes, int, int, bytes, int]
"""A head but for its body's length: what comes before that number, where the number begins and ended in the head this
was made from, what comes after it, and how much that is.

A client sends the same head again and again on its connection but for that number, and an engine does within a second:
what starts with the one and goes on, after a number, with the other needs no parsing.
"""

LENGTHS: Final = {b"%d" % n: n for n in range(10_000)}
"""The usual lengths as they are written, which is the quickest way to read them."""


def likeness(raw: bytes) -> Likeness:
    """Return what is alike in heads like this one, which must have been read and found to have a length."""
    at = raw.lower().find(b"\r\ncontent-length:") + 17
    while raw[at : at + 1] in (b" ", b"\t"):
        at += 1
    end = at
    while raw[end : end + 1].isdigit():
        end += 1
    return raw[:at], at, end, raw[end:], len(raw) - end


def number(digits: bytes) -> int:
    """Return the length that these bytes write, or -1 if they are no digits."""
    return int(digits) if digits.isdigit() and len(digits) <= _MAX_DIGITS else -1


def read_request(raw: bytes) -> tuple[RequestHead, int]:
    """Read a request's head, up to and with its empty line; return it and its body's length (`CHUNKED`).

    Raises `BadHead`.
    """
    try:
        HttpRequestParser(_DEAF).feed_data(raw)
    except HttpParserUpgrade:
        pass  # asked for, and not granted
    except HttpParserError as error:
        raise BadHead(str(error)) from None
    lines = raw[:-4].split(b"\r\n")
    words = lines[0].split(b" ")
    if len(words) != 3 or words[0] in (b"CONNECT", b"PRI"):
        raise BadHead("bad request line")
    version = words[2]
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise BadHead("bad HTTP version")
    head = RequestHead(words[0], words[1], version == b"HTTP/1.0")
    length = 0
    lengths = 0
    named: list[bytes] = []
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        value = value.strip(b" \t")
        field = _REQUEST.get(name.lower())
        if field is None:
            head.lines.append(line)
        elif field is _Field.LENGTH:
            lengths += 1
            if not value.isdigit() or len(value) > _MAX_DIGITS:
                raise BadHead("bad Content-Length")
            length = int(value)
        elif field is _Field.CODING:
            lengths += 1
            if value.lower() != b"chunked" or head.http10:
                raise BadHead("bad Transfer-Encoding")
            length = CHUNKED
        elif field is _Field.CONNECTION:
            named += _tokens(value)
        elif field is _Field.REQUEST_ID:
            head.request_id = value or None
        elif field is _Field.EXPECT:
            head.expects = value.lower() == b"100-continue" and not head.http10
    if lengths > 1:
        raise BadHead("more than one Content-Length or Transfer-Encoding")
    if named:
        if b"close" in named:
            head.keep_alive = False
        head.lines = [line for line in head.lines if line.partition(b":")[0].lower() not in named]
    head.kept = b"".join(line + b"\r\n" for line in head.lines)
    return head, length


def read_response(raw: bytes) -> tuple[ResponseHead, int]:
    """Read a response's head, up to and with its empty line; return it and its body's length.

    That is `CHUNKED` or `UNTIL_CLOSE` if it isn't known. Raises `BadHead`.
    """
    if raw.count(b"\n") != raw.count(b"\r\n") or raw.count(b"\r") != raw.count(b"\r\n") or b"\0" in raw:
        raise BadHead("stray line end in the engine's response head")
    lines = raw[:-4].split(b"\r\n")
    start = _STATUS_LINE.fullmatch(lines[0])
    if start is None:
        raise BadHead("bad status line from the engine")
    head = ResponseHead(int(start[2]))
    keep_alive = start[1] == b"1"
    length = UNTIL_CLOSE
    named: list[bytes] = []
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon or _TOKEN.fullmatch(name) is None:
            raise BadHead("bad header line from the engine")
        value = value.strip(b" \t")
        field = _RESPONSE.get(name.lower())
        if field is None:
            head.lines.append(line)
        elif field is _Field.LENGTH:
            if not value.isdigit() or len(value) > _MAX_DIGITS or length not in (UNTIL_CLOSE, CHUNKED, int(value)):
                raise BadHead("bad Content-Length from the engine")
            if length != CHUNKED:
                length = int(value)
        elif field is _Field.CODING:
            if value.lower() != b"chunked":
                raise BadHead("unknown Transfer-Encoding from the engine")
            length = CHUNKED
        elif field is _Field.CONNECTION:
            named += _tokens(value)
        elif field is _Field.KEEP_ALIVE:
            timeout = _TIMEOUT.search(value)
            if timeout is not None:
                seconds = min(IDLE_SECONDS, int(timeout[1]) - IDLE_MARGIN)
                head.reusable = seconds if seconds > 0 else None
        elif field is _Field.CONTENT_TYPE:
            head.content_type = value.lower()
            head.lines.append(line)
        elif field is _Field.CONTENT_ENCODING:
            head.encoded = value.lower() != b"identity"
            head.lines.append(line)
    if named:
        keep_alive = b"close" not in named and (keep_alive or b"keep-alive" in named)
        head.lines = [line for line in head.lines if line.partition(b":")[0].lower() not in named]
    if head.status in _BODILESS:
        length = 0
    if length == UNTIL_CLOSE or not keep_alive:
        head.reusable = None
    head.kept = b"HTTP/1.1 %b\r\n" % lines[0][9:] + b"".join(line + b"\r\n" for line in head.lines)
    return head, length


def without(lines: list[bytes], name: bytes) -> list[bytes]:
    """Return the header lines but those called ``name`` (in lower case)."""
    return [line for line in lines if line.partition(b":")[0].lower() != name]


def find(lines: list[bytes], name: bytes) -> bytes | None:
    """Return the first value of the header ``name`` (in lower case), if it is there."""
    for line in lines:
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip(b" \t")
    return None


class _Deaf:
    """Takes no callbacks, so that the parser makes no objects."""

    __slots__ = ()


_DEAF: Final = _Deaf()


def _tokens(value: bytes) -> list[bytes]:
    return [token.strip(b" \t").lower() for token in value.split(b",")]
