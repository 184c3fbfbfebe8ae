"""A streamed chat completion over OpenAI's API, with the times that a user notices."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

CUT: Final = " […]"
"""Told in place of the rest of an answer that was longer than asked for."""


@dataclass(slots=True, kw_only=True)
class Reply:
    """One answer. Times are Unix seconds; ``first`` is when its first text came, ``tokens`` what the engine counted."""

    model: str
    prompt: str
    sent: float
    first: float | None = None
    ended: float | None = None
    tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def first_token_seconds(self) -> float | None:
        """How long the client waited for the first text, all told."""
        return None if self.first is None else self.first - self.sent

    @property
    def tokens_per_second(self) -> float | None:
        """The pace after the first token; None if there is too little to tell."""
        if self.first is None or self.ended is None or self.tokens < 2 or self.ended <= self.first:
            return None
        return (self.tokens - 1) / (self.ended - self.first)


async def stream_chat(
    http: aiohttp.ClientSession,
    url: str,
    model: str,
    prompt: str,
    *,
    max_tokens: int,
    on_text: Callable[[str], None],
) -> Reply:
    """Ask ``model`` through the gateway at ``url``; whatever fails is told in the reply's ``error``."""
    reply = Reply(model=model, prompt=prompt, sent=time.time())
    request = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with http.post(f"{url}/v1/chat/completions", json=request) as answer:
            if answer.status != 200:
                reply.error = _message(await answer.text()) or f"status {answer.status}"
            else:
                await _read(answer, reply, on_text)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        reply.error = str(error) or type(error).__name__
    reply.ended = time.time()
    return reply


async def _read(answer: aiohttp.ClientResponse, reply: Reply, on_text: Callable[[str], None]) -> None:
    async for line in answer.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            reply.error = str(chunk["error"].get("message", chunk["error"]))
            return
        if usage := chunk.get("usage"):
            reply.tokens = int(usage.get("completion_tokens", 0))
        text = "".join(_text(choice) for choice in chunk.get("choices", []))
        if text:
            reply.first = reply.first or time.time()
            reply.text += text
            on_text(text)
        if any(choice.get("finish_reason") == "length" for choice in chunk.get("choices", [])):
            on_text(CUT)
    reply.error = reply.error or "the answer ended early"


def _text(choice: dict[str, Any]) -> str:
    return (choice.get("delta") or {}).get("content") or ""


def _message(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.strip()[:500]
