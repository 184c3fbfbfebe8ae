"""What is read of heads, what is dropped, and which are refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelswap.gateway.headers import CHUNKED, UNTIL_CLOSE, BadHead, likeness, number, read_request, read_response


def _request(*lines: str, start: str = "POST /v1/completions HTTP/1.1") -> bytes:
    return "\r\n".join([start, *lines, "", ""]).encode("latin-1")


def _response(*lines: str, start: str = "HTTP/1.1 200 OK") -> bytes:
    return "\r\n".join([start, *lines, "", ""]).encode("latin-1")


def test_request_loses_hops_and_credentials() -> None:
    """Hop-by-hop headers, those Connection names, credentials, host and framing stay behind; the rest goes on."""
    head, length = read_request(
        _request(
            "Host: gateway",
            "Authorization: Bearer secret",
            "X-Api-Key: secret",
            "api-key: secret",
            "Cookie: secret",
            "Connection: keep-alive, X-Mine",
            "X-Mine: 1",
            "Keep-Alive: timeout=5",
            "TE: trailers",
            "Trailer: x",
            "Upgrade: h2c",
            "HTTP2-Settings: x",
            "Proxy-Authorization: secret",
            "Proxy-Connection: keep-alive",
            "Expect: 100-continue",
            "Content-Length: 12",
            "X-Request-Id: mine",
            "Accept: */*",
            "traceparent: 00-abc",
        )
    )
    assert length == 12
    assert head.kept == b"Accept: */*\r\ntraceparent: 00-abc\r\n"
    assert head.request_id == b"mine"
    assert head.expects
    assert head.keep_alive
    assert head.route is not None
    assert head.route.target == b"/v1/completions"


@pytest.mark.parametrize(
    ("start", "lines", "keeps"),
    [
        ("POST / HTTP/1.1", (), True),
        ("POST / HTTP/1.1", ("Connection: Close",), False),
        ("POST / HTTP/1.1", ("Connection: x", "connection: y , close"), False),
        ("POST / HTTP/1.0", (), False),
        ("POST / HTTP/1.0", ("Connection: keep-alive",), False),
    ],
)
def test_keeps_a_connection_when_it_may(start: str, lines: tuple[str, ...], keeps: bool) -> None:
    """HTTP/1.1 connections stay open unless one side says otherwise; those of 1.0 end."""
    assert read_request(_request(*lines, start=start))[0].keep_alive is keeps


@pytest.mark.parametrize(
    "raw",
    [
        _request("Content-Length: 3", "Transfer-Encoding: chunked"),
        _request("Transfer-Encoding: chunked", "Content-Length: 3"),
        _request("Content-Length: 3", "Content-Length: 3"),
        _request("Content-Length: 3, 3"),
        _request("Content-Length: +3"),
        _request("Content-Length: 3_0"),
        _request("Content-Length: 99999999999999999999"),
        _request("Content-Length:"),
        _request("Transfer-Encoding: chunked, chunked"),
        _request("Transfer-Encoding: gzip, chunked"),
        _request("Transfer-Encoding: identity"),
        _request("Transfer-Encoding: chunked", start="POST / HTTP/1.0"),
        _request("Host: a", " folded: b"),
        _request("Content-Length : 3"),
        _request("X: a\0b"),
        _request("X: a\rb"),
        _request("X: a\nContent-Length: 3"),
        _request("no colon"),
        _request(start="POST  / HTTP/1.1"),
        _request(start="POST / HTTP/2.0"),
        _request(start="POST / HTTP/1.2"),
        _request(start="PRI * HTTP/2.0"),
        _request(start="CONNECT a:1 HTTP/1.1"),
        _request(start="NONSENSE / HTTP/1.1"),
        _request(start="POST /\x7f HTTP/1.1"),
    ],
)
def test_doubtful_request_is_refused(raw: bytes) -> None:
    """Whatever two parsers could frame differently is refused."""
    with pytest.raises(BadHead):
        read_request(raw)


def test_response_loses_hops() -> None:
    """An engine's hop-by-hop headers and request id stay behind, and its framing is told apart from them."""
    head, length = read_response(
        _response(
            "Date: now",
            "Connection: keep-alive, X-Mine",
            "X-Mine: 1",
            "Keep-Alive: timeout=3, max=5",
            "Proxy-Authenticate: x",
            "x-request-id: theirs",
            "Content-Type: Text/Event-Stream; charset=utf-8",
            "Transfer-Encoding: chunked",
            "Content-Length: 5",
        )
    )
    assert length == CHUNKED
    assert head.kept == b"HTTP/1.1 200 OK\r\nDate: now\r\nContent-Type: Text/Event-Stream; charset=utf-8\r\n"
    assert head.is_event_stream
    assert head.reusable == 2.0


@pytest.mark.parametrize(
    ("raw", "length", "reusable"),
    [
        (_response("Content-Length: 5"), 5, 4.0),
        (_response("content-length: 5", "Content-Length: 5"), 5, 4.0),
        (_response("Content-Length: 5", "Connection: close"), 5, None),
        (_response("Content-Length: 5", "Keep-Alive: timeout=1"), 5, None),
        (_response("Content-Length: 5", "Keep-Alive: timeout=60"), 5, 4.0),
        (_response("Content-Length: 5", start="HTTP/1.0 200 OK"), 5, None),
        (_response("Content-Length: 5", "Connection: Keep-Alive", start="HTTP/1.0 200 OK"), 5, 4.0),
        (_response(), UNTIL_CLOSE, None),
        (_response(start="HTTP/1.1 204 No Content"), 0, 4.0),
        (_response("Content-Length: 7", start="HTTP/1.1 304 Not Modified"), 0, 4.0),
        (_response("Content-Length: 7", start="HTTP/1.1 200"), 7, 4.0),
    ],
)
def test_response_framing(raw: bytes, length: int, reusable: float | None) -> None:
    """Length and reuse of the connection follow from version, status and headers."""
    head, found = read_response(raw)
    assert (found, head.reusable) == (length, reusable)


@pytest.mark.parametrize(
    "raw",
    [
        _response("Content-Length: 5", "Content-Length: 6"),
        _response("Content-Length: x"),
        _response("Transfer-Encoding: gzip"),
        _response("Host : a"),
        _response(" folded"),
        _response("no colon"),
        _response("X: a\nSet-Cookie: b"),
        _response("X: a\rb"),
        _response("X: a\0b"),
        _response(start="HTTP/2 200 OK"),
        _response(start="HTTP/1.1 20 OK"),
        _response(start="ICY 200 OK"),
    ],
)
def test_doubtful_response_is_refused(raw: bytes) -> None:
    """An engine's head that isn't plain HTTP/1 is refused."""
    with pytest.raises(BadHead):
        read_response(raw)


@settings(deadline=None)
@given(
    st.sampled_from(["Content-Length: ", "content-length:", "CONTENT-LENGTH: \t"]),
    st.integers(0, 10**9),
    st.integers(0, 10**9),
    st.lists(st.sampled_from(["A: 1", "X-Content-Length: 7", "B: content-length: 8", "Accept: */*"]), max_size=4),
    st.integers(0, 4),
)
def test_likeness_is_all_but_the_length(name: str, one: int, other: int, lines: list[str], at: int) -> None:
    """Two heads that differ in their length alone are alike, and around it nothing is left out."""
    lines.insert(at, f"{name}{one}")
    raw = _request("Host: a", *lines)
    prefix, at, end, suffix, size = likeness(raw)
    assert prefix + str(one).encode() + suffix == raw
    assert (at, end, size) == (len(prefix), len(raw) - len(suffix), len(suffix))
    again, length = read_request(prefix + str(other).encode() + suffix)
    assert length == other
    assert again.kept == read_request(raw)[0].kept


@pytest.mark.parametrize(
    ("digits", "length"),
    [
        (b"0", 0),
        (b"007", 7),
        (b"123456", 123456),
        (b"", -1),
        (b"-1", -1),
        (b"+1", -1),
        (b"1_0", -1),
        (b" 1", -1),
        (b"9" * 19, -1),
    ],
)
def test_only_digits_are_a_length(digits: bytes, length: int) -> None:
    """Nothing that Python, but not HTTP, takes for a number is one."""
    assert number(digits) == length
