"""The demo's chat client, what it shows while it waits, and the table at the end."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import aiohttp
import pytest
from rich.console import Console

from modelswap.cli import demo_table
from modelswap.cli.chat import CUT, Reply, stream_chat
from modelswap.cli.client import AdminClient
from modelswap.cli.demo_screen import Ask, Screen, Wrapped, doing

STREAM = b"""\
: position 1

data: {"choices": [{"delta": {"role": "assistant"}}]}

data: {"choices": [{"delta": {"content": "Hel"}}]}

data: {"choices": [{"delta": {"content": "lo"}}]}

data: {"choices": [], "usage": {"completion_tokens": 2}}

data: [DONE]

"""


async def chat(url: str) -> tuple[Reply, str]:
    """Ask once, and return the reply with all text that was told."""
    told: list[str] = []
    async with aiohttp.ClientSession() as http:
        reply = await stream_chat(http, url, "m", "Hi", max_tokens=5, on_text=told.append)
    return reply, "".join(told)


async def test_a_streamed_answer_is_told_as_it_comes(fake: Any) -> None:
    """Text, token count and times are taken from the stream; comments in it are not."""
    fake.answers["POST /v1/chat/completions"] = (200, STREAM)
    reply, told = await chat(fake.url)
    assert (reply.text, told, reply.tokens, reply.error) == ("Hello", "Hello", 2, "")
    assert reply.first is not None
    assert reply.ended is not None
    assert reply.sent <= reply.first <= reply.ended
    assert fake.asked[0][1]["model"] == "m"


async def test_an_answer_that_was_cut_says_so(fake: Any) -> None:
    """An answer that reached its token limit doesn't look as if it had ended there; its text is left as it was."""
    cut = STREAM.replace(b'"delta": {"content": "lo"}', b'"delta": {"content": "lo"}, "finish_reason": "length"')
    fake.answers["POST /v1/chat/completions"] = (200, cut)
    reply, told = await chat(fake.url)
    assert (reply.text, told) == ("Hello", f"Hello{CUT}")


@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (503, b'{"error": {"message": "it is broken"}}', "it is broken"),
        (500, b"oops", "oops"),
        (200, b'data: {"error": {"message": "it died"}}\n\n', "it died"),
        (200, b'data: {"choices": [{"delta": {"content": "He"}}]}\n\n', "the answer ended early"),
    ],
)
async def test_a_failed_answer_says_why(fake: Any, status: int, content: bytes, expected: str) -> None:
    """Statuses, errors within the stream and a cut stream all end up in the reply's error."""
    fake.answers["POST /v1/chat/completions"] = (status, content)
    reply, _ = await chat(fake.url)
    assert reply.error == expected


async def test_nobody_there_is_a_failed_answer() -> None:
    """A connection that is refused is told, not raised."""
    reply, _ = await chat("http://127.0.0.1:1")
    assert reply.error


def reply(model: str, sent: float, first: float, *, ended: float = 0.0, tokens: int = 11, error: str = "") -> Reply:
    """Return a reply with these times."""
    return Reply(model=model, prompt="", sent=sent, first=first, ended=ended or first + 1, tokens=tokens, error=error)


SWAPS = [
    {"at": 13.0, "target": "b", "seconds": 2.0, "outcome": "ok", "mechanism": "cold"},
    {"at": 5.0, "target": "a", "seconds": 3.0, "outcome": "ok", "mechanism": "cold"},
    {"at": 5.0, "target": "b", "seconds": 3.0, "outcome": "failed", "mechanism": "cold"},
]


def test_each_request_is_shown_with_the_swap_it_waited_for() -> None:
    """A swap counts for a request if it ended between its sending and its first text; else it was resident."""
    replies = [reply("a", 1.0, 5.5), reply("a", 7.0, 7.2), reply("b", 10.0, 13.5)]
    rows = demo_table.rows(replies, SWAPS)
    assert [(row.mechanism, row.queue, row.swap) for row in rows] == [
        ("cold", 1.0, 3.0),
        ("resident", 0.0, None),
        ("cold", 1.0, 2.0),
    ]


def test_the_table_fits_80_columns_and_shows_failures() -> None:
    """Every column is readable on a small terminal."""
    out = io.StringIO()
    rows = demo_table.rows([reply("a", 1.0, 5.5), reply("smol-chat", 7.0, 7.2), reply("b", 8, 9, error="no")], SWAPS)
    Console(file=out, width=80).print(demo_table.table(rows))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for expected in ("queue wait", "tokens/s", "cold", "3.00 s", "4.50 s", "resident", "failed", "10"):
        assert expected in text


def test_doing_tells_the_swap_under_way() -> None:
    """While nothing streams, the user sees which step of the swap is being done."""
    swap = {"source": "a", "target": "b", "phase": "out", "seconds": 1.5}
    assert doing({"swaps": [swap]}) == "swapping to b: putting out a (1.50 s)"
    assert doing({"swaps": [{**swap, "target": None}]}) == "unloading: putting out a (1.50 s)"
    assert doing({}) == ""


async def test_answers_that_come_together_are_printed_one_after_the_other(fake: Any) -> None:
    """Two streams that overlap are not mixed on the screen, and the one that began first is first."""
    fake.answers["GET /status"] = (200, {})
    second_began = asyncio.Event()

    def asking(model: str, text: str, wait: asyncio.Event | None) -> Ask:
        async def ask(on_text: Any) -> Reply:
            for word in text.split():
                on_text(f"{word} ")
                if wait is None:
                    second_began.set()
                else:
                    await wait.wait()
            return reply(model, 1.0, 2.0)

        return ask

    out = io.StringIO()
    async with AdminClient(fake.url) as admin:
        screen = Screen(Console(file=out, width=80), admin)
        asks = [asking("a", "one two three", second_began), asking("b", "four five", None)]
        replies = await screen.show(asks, [("a", "count"), ("b", "go on")])
    assert [found.model for found in replies] == ["a", "b"]
    assert "a one two three" in out.getvalue()
    assert "b four five" in out.getvalue()
    assert "▶ a (at the same time): count" in out.getvalue()


def test_streamed_text_is_wrapped_between_words() -> None:
    """Pieces of words are put together, long lines broken at spaces, and the engine's own indentation kept."""
    written: list[str] = []
    wrapped = Wrapped(written.append, 12, indent=2, column=6)
    for piece in ("one tw", "o three", "\n", "  x = 1\nincomprehensible", "!"):
        wrapped.feed(piece)
    wrapped.end()
    assert "".join(written) == "one\n  two three\n    x = 1\n  incomprehensible!"
