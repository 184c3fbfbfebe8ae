"""Asking an engine over HTTP: what the adapters share."""

from __future__ import annotations

import re
from typing import Any, Final

import aiohttp
import msgspec

from modelswap.engines.base import Address, CanaryFailed, Readiness
from modelswap.spec.config import Model

# An answer that takes longer than this tells as much as none does.
PROBE: Final = aiohttp.ClientTimeout(total=10)
# The first request may compile kernels.
CANARY: Final = aiohttp.ClientTimeout(total=300)
# For what takes as long as it takes; whoever waits limits it.
PATIENT: Final = aiohttp.ClientTimeout(total=None, sock_connect=10)
_MOST_BYTES: Final = 4 * 1024 * 1024
_OUT_OF_MEMORY: Final = re.compile(r"out of memory|OutOfMemory|CUDA error|HIP error|cuMem", re.IGNORECASE)
_PROMPT: Final = "Hello"


class Reply(msgspec.Struct, frozen=True):
    """An engine's answer, cut off at 4 MiB."""

    status: int
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON; None if it isn't."""
        try:
            return msgspec.json.decode(self.body)
        except msgspec.DecodeError:
            return None


def auth(model: Model) -> dict[str, str]:
    """Return the headers that carry the model's key."""
    return {"authorization": f"Bearer {model.api_key.get_secret_value()}"} if model.api_key else {}


async def get(http: aiohttp.ClientSession, model: Model, address: Address, path: str) -> Reply:
    """Ask once, within 10 s, following no redirects; raises `aiohttp.ClientError`, `TimeoutError`."""
    async with http.get(
        address.url + path, headers=auth(model), timeout=PROBE, allow_redirects=False, raise_for_status=False
    ) as response:
        return Reply(response.status, await _read(response))


async def post(
    http: aiohttp.ClientSession,
    model: Model,
    address: Address,
    path: str,
    body: dict[str, Any] | None,
    timeout: aiohttp.ClientTimeout,
) -> Reply:
    """Post ``body`` as JSON (None: nothing) once; raises `aiohttp.ClientError`, `TimeoutError`."""
    async with http.post(
        address.url + path,
        json=body,
        headers=auth(model),
        timeout=timeout,
        allow_redirects=False,
        raise_for_status=False,
    ) as response:
        return Reply(response.status, await _read(response))


async def status(http: aiohttp.ClientSession, model: Model, address: Address, path: str) -> int:
    """Return the status that ``path`` answers with; reads no body. Raises as `get` does."""
    async with http.get(
        address.url + path, headers=auth(model), timeout=PROBE, allow_redirects=False, raise_for_status=False
    ) as response:
        return response.status


async def served_names(http: aiohttp.ClientSession, model: Model, address: Address) -> set[str] | Reply:
    """Return the ids and aliases in ``/v1/models``; the answer itself if it isn't such a list."""
    reply = await get(http, model, address, "/v1/models")
    answer = reply.json()
    entries = answer.get("data") if isinstance(answer, dict) else None
    if reply.status != 200 or not isinstance(entries, list):
        return reply
    names: set[str] = set()
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("id"), str):
            names.add(entry["id"])
            aliases = entry.get("aliases")
            names.update(alias for alias in aliases if isinstance(alias, str)) if isinstance(aliases, list) else None
    return names


def named(served: set[str] | Reply, ours: set[str], name: str) -> Readiness:
    """Return ready if one of ``ours`` is ``served``; else that it still loads, or why it never will be ready."""
    if isinstance(served, Reply):
        if served.status in (401, 403):
            return Readiness(ready=False, problem=f"it refuses our api_key ({served.status} from /v1/models)")
        return Readiness(ready=False, stage="loading")
    if served & ours:
        return Readiness(ready=True, stage="ready")
    return Readiness(ready=False, problem=f"it serves {', '.join(sorted(served)) or 'no model'}, not {name}")


async def gauges(http: aiohttp.ClientSession, model: Model, address: Address, names: tuple[str, ...]) -> int | None:
    """Return the sum of the Prometheus samples called ``names`` in ``/metrics``; None if one of them is missing."""
    reply = await get(http, model, address, "/metrics")
    if reply.status != 200:
        return None
    total, seen = 0.0, set[str]()
    for line in reply.body.decode(errors="replace").splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in names:
            try:
                total += float(line.rpartition(" ")[2])
            except ValueError:
                return None
            seen.add(name)
    return round(total) if len(seen) == len(names) else None


async def ask(http: aiohttp.ClientSession, name: str, model: Model, address: Address, kind: str) -> Reply:
    """Send the canary of ``kind`` (completion, chat or embedding) for ``name``; raises as `get` does, after 300 s."""
    path, request = _CANARIES[kind]
    return await post(http, model, address, path, {"model": name, **request}, CANARY)


def judge(reply: Reply, kind: str) -> None:
    """Raise `CanaryFailed` unless ``reply`` answers the canary of ``kind``."""
    if reply.status != 200:
        raise CanaryFailed(f"the {kind} canary was answered with {reply.status}: {complaint(reply)}")
    answer = reply.json()
    field = "data" if kind == "embedding" else "choices"
    items = answer.get(field) if isinstance(answer, dict) else None
    if not isinstance(items, list) or not items:
        raise CanaryFailed(f"the {kind} canary got no '{field}' in answer: {complaint(reply)}")


async def canary(
    http: aiohttp.ClientSession, name: str, model: Model, address: Address, default: str, *others: str
) -> None:
    """Send the configured canary, or the ``default``; raises `CanaryFailed`.

    Where nothing was configured and the engine says that it has no such thing (400, 404, 405, 501), ``others`` are
    tried in turn.
    """
    kind = model.canary or default
    if kind == "none":
        return
    reply = await ask(http, name, model, address, kind)
    if reply.status in (400, 404, 405, 501) and model.canary is None:
        for other in others:
            second = await ask(http, name, model, address, other)
            if second.status == 200:
                reply, kind = second, other
                break
    judge(reply, kind)


def out_of_memory(reply: Reply) -> bool:
    """Return whether a refusal is for want of device memory."""
    return reply.status >= 400 and _OUT_OF_MEMORY.search(complaint(reply)) is not None


def complaint(reply: Reply) -> str:
    """Return the message in an error answer, or the beginning of its body; at most 300 characters."""
    answer = reply.json()
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    text = message if isinstance(message, str) else reply.body[:1200].decode(errors="replace")
    return " ".join(text.split())[:300] or "(nothing)"


_CANARIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "completion": ("/v1/completions", {"prompt": _PROMPT, "max_tokens": 1, "temperature": 0}),
    "chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": _PROMPT}], "max_tokens": 1, "temperature": 0},
    ),
    "embedding": ("/v1/embeddings", {"input": _PROMPT}),
}


async def _read(response: aiohttp.ClientResponse) -> bytes:
    chunks = bytearray()
    async for chunk in response.content.iter_any():
        chunks += chunk
        if len(chunks) > _MOST_BYTES:
            break
    return bytes(chunks)
