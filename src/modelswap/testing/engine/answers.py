"""The JSON that an engine answers with; each answer names the model and the instance it came from."""

from __future__ import annotations

import binascii
import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from modelswap.testing.engine.wire import Request

SMALL_BODY: Final = 64 * 1024
"""Up to this many bytes, ``/v1/echo`` returns the body itself."""

_WORDS: Final = ("the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and")


class Voice:
    """Speaks for one instance of one model."""

    def __init__(self, model: str, instance: str, names: tuple[str, ...]) -> None:
        self.model = model
        self.instance = instance
        self.names = names
        self._count = itertools.count()

    def pieces(self, count: int, *, wrong: bool, first_bytes: int | None, anonymous: bool = False) -> Iterator[str]:
        """Yield an answer's ``count`` pieces (tokens): first the model's name, then the instance's id, then words.

        ``anonymous``: without the instance's id, so that all instances answer the same.
        """
        for index in range(count):
            if wrong:
                piece = "\N{REPLACEMENT CHARACTER}!" * 3
            elif index == 0:
                piece = f"model={self.model}"
            elif index == 1 and not anonymous:
                piece = f" instance={self.instance}"
            else:
                piece = " " + _WORDS[index % len(_WORDS)]
            if index == 0 and first_bytes is not None:
                piece = piece.ljust(first_bytes, ".")
            yield piece

    def envelope(self, kind: str) -> dict[str, Any]:
        """Return the fields that every completion and chunk begins with."""
        return {
            "id": f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{self.instance}-{next(self._count)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": self.instance,
        }

    def completion(
        self, *, chat: bool, pieces: Sequence[str], finish: str, prompt: int, logprobs: bool = False
    ) -> bytes:
        """Return a whole chat or text completion; with ``logprobs`` each token is told."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        if chat:
            choice["message"] = {"role": "assistant", "content": "".join(pieces)}
        else:
            choice["text"] = "".join(pieces)
        if logprobs:
            told = [{"token": piece, "logprob": -0.1, "top_logprobs": []} for piece in pieces]
            choice["logprobs"] = {"content": told} if chat else {"tokens": list(pieces)}
        envelope = self.envelope("chat.completion" if chat else "text_completion")
        return msgspec.json.encode(envelope | {"choices": [choice], "usage": usage(prompt, len(pieces))})

    def embeddings(self, inputs: list[Any], prompt: int) -> bytes:
        """Return one small embedding for each input, the same for the same input and model."""
        data = [
            {"object": "embedding", "index": index, "embedding": self._embed(text)} for index, text in enumerate(inputs)
        ]
        return msgspec.json.encode(
            {"object": "list", "model": self.model, "system_fingerprint": self.instance, "data": data}
            | {"usage": {"prompt_tokens": prompt, "total_tokens": prompt}}
        )

    def echo(self, request: Request) -> bytes:
        """Return what arrived: raw headers in order, body as digest, length and, if small, base64."""
        return msgspec.json.encode(
            {
                "model": self.model,
                "instance": self.instance,
                "method": request.method,
                "target": request.target.decode("latin-1"),
                "version": request.version,
                "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in request.headers],
                "length": len(request.body),
                "sha256": hashlib.sha256(request.body).hexdigest(),
                "body": _base64(request.body) if len(request.body) <= SMALL_BODY else None,
            }
        )

    def models(self) -> bytes:
        """Return the list of names served."""
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "modelswap-sim", "root": self.model}
            for name in self.names
        ]
        return msgspec.json.encode({"object": "list", "data": data})

    def _embed(self, text: object) -> list[float]:
        digest = hashlib.sha256(self.model.encode() + b"\0" + msgspec.json.encode(text)).digest()
        return [byte / 255 for byte in digest[:8]]


def chunk(envelope: dict[str, Any], *, chat: bool, piece: str | None, finish: str | None) -> bytes:
    """Return one SSE event of a stream; ``piece`` None opens a chat or, with ``finish``, ends it."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
    if not chat:
        choice["text"] = piece or ""
    elif piece is not None:
        choice["delta"] = {"content": piece}
    else:
        choice["delta"] = {} if finish else {"role": "assistant", "content": ""}
    return event(envelope | {"choices": [choice]})


def event(data: dict[str, Any]) -> bytes:
    """Return ``data`` as one SSE event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Return OpenAI's usage counts."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def error(message: str, kind: str, status: int, param: str | None = None) -> bytes:
    """Return an error in vLLM's shape."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": status}})


def _base64(data: bytes) -> str:
    # Not the module of that name: importing it takes 8 ms, and an engine must start fast.
    return binascii.b2a_base64(data, newline=False).decode()
