"""The likeliest answer to a fixed prompt, token by token: what tells a model from its ruins.

An engine woken wrongly may answer fluent nonsense with status 200. Greedy answers of one model on one machine begin
alike, until some rounding tips a choice between two tokens that are nearly as likely; so beginnings are compared.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import aiohttp

from modelswap.engines import http as ask
from modelswap.engines.base import Address
from modelswap.spec.config import Model

PROMPT: Final = "Here is a short story about a lighthouse keeper and the sea. One morning,"
_PATHS: Final = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}
_WORD: Final = re.compile(r"\s*\S+")
# What engines answer with that have no such path, or don't do that.
_NOT_HERE: Final = frozenset((400, 404, 405, 422, 501))


def agreeing(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many tokens two answers have in common at their beginning."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


async def answer(
    http: aiohttp.ClientSession, name: str, model: Model, address: Address, tokens: int, default: str | None
) -> tuple[str, ...] | None:
    """Return up to ``tokens`` tokens; words where the engine doesn't tell its tokens.

    ``model.canary`` says whether to ask for a completion or in a chat, else ``default`` (None: not at all). An engine
    that has no completions is asked in a chat, without its tokens if it doesn't tell those. Returns None for models
    that make no text, or that aren't to be asked (``canary: none``); raises `modelswap.engines.base.CanaryFailed`,
    `aiohttp.ClientError` and `TimeoutError` (after 300 s).
    """
    kind = model.canary or default
    if kind not in _PATHS:
        return None
    kinds = (kind,) if model.canary else (kind, *(other for other in _PATHS if other != kind))
    first = None
    for each in kinds:
        for with_tokens in (True, False):
            body = {"model": name, **_request(each, tokens, with_tokens=with_tokens)}
            reply = await ask.post(http, model, address, _PATHS[each], body, ask.CANARY)
            if reply.status not in _NOT_HERE:
                ask.judge(reply, each)
                return _tokens(reply.json()["choices"][0])[:tokens]
            first = first or reply
    if first is not None and model.canary:
        ask.judge(first, kind)
    return None


def _request(kind: str, tokens: int, *, with_tokens: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "seed": 0}
    if kind == "chat":
        return {"messages": [{"role": "user", "content": PROMPT}], **body} | ({"logprobs": True} if with_tokens else {})
    return {"prompt": PROMPT, **body} | ({"logprobs": 1} if with_tokens else {})


def _tokens(choice: Any) -> tuple[str, ...]:
    """Return the tokens in a choice, in OpenAI's shape for completions or for chats; else its words."""
    if not isinstance(choice, dict):
        return ()
    said = choice.get("logprobs")
    if isinstance(said, dict):
        listed = said.get("tokens")
        if isinstance(listed, list) and listed and all(isinstance(token, str) for token in listed):
            return tuple(listed)
        content = said.get("content")
        if isinstance(content, list) and content and all(isinstance(item, dict) for item in content):
            return tuple(str(item.get("token")) for item in content)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    return tuple(_WORD.findall(text)) if isinstance(text, str) else ()
