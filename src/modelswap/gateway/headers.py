"""Message heads: what is kept of them, what is dropped, and how their messages are framed.

llhttp (through httptools) judges every request's head; here it is only cut into lines. Lines that mean nothing to
a proxy come again and again, so they are remembered and not looked into twice.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Final

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

CHUNKED: Final = -1
"""A message's length if its body is chunked."""
UNTIL_CLOSE: Final = -2
"""A response's length if its body ends with the connection."""

_REMEMBERED: Final = 4096
_MAX_REMEMBERED_LINE: Final = 256


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
_TIMEOUT: Final = re.compile(rb"timeout=(\d{1,6})")


class RequestHead:
    """A request's head. ``lines`` are the header lines to pass on, ``length`` the body's (`CHUNKED`)."""

    __slots__ = ("expects", "http10", "keep_alive", "length", "lines", "method", "request_id", "target")

    def __init__(self, method: bytes, target: bytes, http10: bool) -> None:
        self.method = method
        self.target = target
        self.http10 = http10
        self.keep_alive = not http10
        self.length = 0
        self.request_id: bytes | None = None
        self.expects = False
        self.lines: list[bytes] = []


class ResponseHead:
    """A response's head. ``lines`` are the header lines to pass on, without content-length and transfer-encoding.

    ``length`` is the body's length, `CHUNKED` or `UNTIL_CLOSE`; ``idle`` is how many seconds the engine says it keeps
    an idle connection, if it does.
    """

    __slots__ = ("content_type", "encoded", "idle", "keep_alive", "length", "lines", "start", "status")

    def __init__(self, start: bytes, status: int, keep_alive: bool) -> None:
        self.start = start
        self.status = status
        self.keep_alive = keep_alive
        self.length = UNTIL_CLOSE
        self.idle: int | None = None
        self.content_type = b""
        self.encoded = False
        self.lines: list[bytes] = []


class HeadReader:
    """Reads heads; remembers lines that are passed on unread. One per worker."""

    __slots__ = ("_plain_request", "_plain_response")

    def __init__(self) -> None:
        self._plain_request: set[bytes] = set()
        self._plain_response: set[bytes] = set()

    def request(self, raw: bytes) -> RequestHead:
        """Read a request's head, up to and with its empty line. Raises `BadHead`."""
        upgrade = False
        try:
            parser = HttpRequestParser(_DEAF)
            parser.feed_data(raw)
        except HttpParserUpgrade:
            upgrade = True  # asked for, and not granted
        except HttpParserError as error:
            raise BadHead(str(error)) from None
        lines = raw[:-4].split(b"\r\n")
        words = lines[0].split(b" ")
        if len(words) != 3 or words[0] == b"CONNECT":
            raise BadHead("bad request line")
        version = words[2]
        if version != b"HTTP/1.1" and version != b"HTTP/1.0":
            raise BadHead("bad HTTP version")
        head = RequestHead(words[0], words[1], version == b"HTTP/1.0")
        del lines[0]
        plain = self._plain_request
        keep = head.lines
        lengths = 0
        named: list[bytes] = []
        for line in lines:
            if line in plain:
                keep.append(line)
                continue
            name, _, value = line.partition(b":")
            name = name.lower()
            field = _REQUEST.get(name)
            if field is None:
                keep.append(line)
                _remember(plain, line)
            elif field is _Field.LENGTH:
                lengths += 1
                value = value.strip(b" \t")
                if not value.isdigit() or len(value) > 18 or lengths > 1:
                    raise BadHead("bad Content-Length")
                head.length = int(value)
            elif field is _Field.CODING:
                if head.length == CHUNKED or value.strip(b" \t").lower() != b"chunked" or head.http10:
                    raise BadHead("bad Transfer-Encoding")
                head.length = CHUNKED
                lengths += 1
            elif field is _Field.CONNECTION:
                named += _tokens(value)
            elif field is _Field.REQUEST_ID:
                head.request_id = value.strip(b" \t") or None
            elif field is _Field.EXPECT:
                head.expects = value.strip(b" \t").lower() == b"100-continue" and not head.http10
        if lengths > 1:
            raise BadHead("Content-Length and Transfer-Encoding")
        if named:
            if b"close" in named:
                head.keep_alive = False
            head.lines = _without(keep, named)
        if upgrade and head.method == b"PRI":
            raise BadHead("HTTP/2 is not spoken here")
        return head

    def response(self, raw: bytes) -> ResponseHead:
        """Read a response's head, up to and with its empty line. Raises `BadHead`."""
        if raw.count(b"\n") != raw.count(b"\r\n") or b"\0" in raw:
            raise BadHead("stray line end in the engine's response head")
        lines = raw[:-4].split(b"\r\n")
        start = _STATUS_LINE.fullmatch(lines[0])
        if start is None:
            raise BadHead("bad status line from the engine")
        http11 = start[1] == b"1"
        head = ResponseHead(lines[0][9:], int(start[2]), http11)
        del lines[0]
        plain = self._plain_response
        keep = head.lines
        named: list[bytes] = []
        for line in lines:
            if line in plain:
                keep.append(line)
                continue
            name, colon, value = line.partition(b":")
            if not colon or not name or name[0] in b" \t":
                raise BadHead("bad header line from the engine")
            name = name.lower()
            field = _RESPONSE.get(name)
            if field is None:
                keep.append(line)
                _remember(plain, line)
            elif field is _Field.LENGTH:
                value = value.strip(b" \t")
                if not value.isdigit() or len(value) > 18:
                    raise BadHead("bad Content-Length from the engine")
                if head.length != CHUNKED:
                    if head.length >= 0 and head.length != int(value):
                        raise BadHead("two lengths from the engine")
                    head.length = int(value)
            elif field is _Field.CONTENT_TYPE:
                head.content_type = value.strip(b" \t").lower()
                keep.append(line)
            elif field is _Field.CODING:
                if value.strip(b" \t").lower() != b"chunked":
                    raise BadHead("unknown Transfer-Encoding from the engine")
                head.length = CHUNKED
            elif field is _Field.CONNECTION:
                named += _tokens(value)
            elif field is _Field.KEEP_ALIVE:
                timeout = _TIMEOUT.search(value)
                head.idle = int(timeout[1]) if timeout is not None else None
            elif field is _Field.CONTENT_ENCODING:
                head.encoded = value.strip(b" \t").lower() != b"identity"
                keep.append(line)
        if named:
            if b"close" in named:
                head.keep_alive = False
            elif b"keep-alive" in named:
                head.keep_alive = True
            head.lines = _without(keep, named)
        if head.status in (204, 304):
            head.length = 0
        elif head.length == UNTIL_CLOSE:
            head.keep_alive = False
        return head


def without(lines: list[bytes], name: bytes) -> list[bytes]:
    """Return the header lines but those called ``name`` (in lower case)."""
    return _without(lines, [name])


def find(raw: bytes, name: bytes) -> bytes | None:
    """Return the first value of the header ``name`` (in lower case) in header lines that are not hot."""
    for line in raw.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip(b" \t")
    return None


class _Deaf:
    """Takes no callbacks, so that the parser makes no objects."""

    __slots__ = ()


_DEAF: Final = _Deaf()


def _remember(plain: set[bytes], line: bytes) -> None:
    if len(line) <= _MAX_REMEMBERED_LINE:
        if len(plain) >= _REMEMBERED:
            plain.clear()
        plain.add(line)


def _tokens(value: bytes) -> list[bytes]:
    return [token.strip(b" \t").lower() for token in value.split(b",")]


def _without(lines: list[bytes], names: list[bytes]) -> list[bytes]:
    return [line for line in lines if line.partition(b":")[0].lower() not in names]
