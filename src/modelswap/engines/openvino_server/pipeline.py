"""What the server needs of a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import msgspec

from modelswap.protocol.errors import Code, ModelswapError


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str


class Prompt(msgspec.Struct, frozen=True):
    """``messages`` go through the model's chat template; without any, ``text`` is continued as it is."""

    text: str = ""
    messages: tuple[Message, ...] = ()


class Params(msgspec.Struct, frozen=True, kw_only=True):
    """How to generate. None leaves a setting to the model's own defaults; ``temperature`` 0 is greedy."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: tuple[str, ...] = ()


class Result(msgspec.Struct, frozen=True):
    """How a generation ended, and the exact counts of tokens read and generated (an end token counts)."""

    finish: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


class InvalidPrompt(ModelswapError):
    """The model can't take this prompt: empty, longer than its context, or refused by its chat template."""

    code = Code.BAD_REQUEST


class GenerationFailed(ModelswapError):
    """The model failed while it generated."""

    code = Code.INTERNAL


class CannotLoad(Exception):
    """The model can't be loaded; the message says why and what to do."""


class Pipeline(Protocol):
    """A loaded model. Used by one thread at a time."""

    def generate(self, prompt: Prompt, params: Params, on_text: Callable[[str], bool]) -> Result:
        """Generate until the model ends or ``max_tokens`` are reached.

        ``on_text`` is called for every token with the text that became certain (often empty where a character spans
        tokens); once it returns False, generation stops before the next token. Stop strings are the caller's business.
        Raises `InvalidPrompt`, or whatever the library throws.
        """
        ...
