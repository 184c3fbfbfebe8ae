"""The paths the gateway knows, and which of them are relayed to engines."""

from __future__ import annotations

import re
from typing import Final

import msgspec

OTHER: Final = "other"
"""The metrics label of every path that isn't known."""


class Route(msgspec.Struct, frozen=True, eq=False):
    """Where a POST goes: its metrics ``label`` and the ``target`` that the engine is asked for."""

    label: str
    target: bytes


INFERENCE: Final = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
    "/v1/score",
    "/v1/classify",
    "/v1/pooling",
    "/v1/moderations",
    "/v1/tokenize",
    "/v1/detokenize",
    "/v1/images/generations",
    "/v1/audio/speech",
)
LOCAL: Final = ("/v1/models", "/health", "/status", "/metrics")
LABELS: Final = (*INFERENCE, *LOCAL, OTHER)

# These change an engine's state and are not inference; who may do that is the orchestrator's business.
_ADMIN: Final = frozenset({b"/v1/load_lora_adapter", b"/v1/unload_lora_adapter"})

_SHORTHANDS: Final = {"/chat/completions": "/v1/chat/completions"}
_KNOWN: Final[dict[bytes, Route]] = {
    path.encode(): Route(target, target.encode())
    for path, target in [*((path, path) for path in INFERENCE), *_SHORTHANDS.items()]
}
# No empty, dot or escaped segments, which an engine might read as another path than we do.
_OTHER_V1: Final = re.compile(rb"/v1(?:/[A-Za-z0-9_~:@\-][A-Za-z0-9_~:@\-.]*)+")
_ORIGIN: Final = re.compile(rb"[hH][tT][tT][pP][sS]?://[^/?#]*")


def split(target: bytes) -> tuple[bytes, bytes]:
    """Return a request target's path and its query (with the question mark), without scheme and host."""
    if target[:1] != b"/":
        origin = _ORIGIN.match(target)
        if origin is not None:
            target = target[origin.end() :] or b"/"
    path, mark, query = target.partition(b"?")
    return path, mark + query


def inference(target: bytes) -> Route | None:
    """Return where a POST to ``target`` is relayed to; None if it isn't an inference path."""
    route = _KNOWN.get(target)
    if route is not None:
        return route
    path, query = split(target)
    route = _KNOWN.get(path)
    if route is not None:
        return Route(route.label, route.target + query)
    if path.startswith(b"/v1/models") or path in _ADMIN or _OTHER_V1.fullmatch(path) is None:
        return None
    return Route(OTHER, path + query)


def is_inference(target: bytes) -> bool:
    """Whether the path is one of those that are known to take a POST (any other may not be)."""
    return split(target)[0] in _KNOWN
