"""OpenVINO GenAI, the embedded engine: `modelswap.engines.openvino_server`, run by our own Python.

It generates one answer at a time, on the CPU unless ``--device`` says otherwise.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from modelswap.engines.base import Address, CanaryFailed, Diagnosis, Launch, Readiness
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.spec.config import Model

_MODULE: Final = "modelswap.engines.openvino_server"
_LIBRARY: Final = "openvino_genai"
_STOP_GRACE: Final = 10.0

# What the log shows when memory ran out: Python's words, C++'s, and the C library's.
_NO_MEMORY: Final = re.compile(r"out of host memory|MemoryError|bad_alloc|Cannot allocate memory")
_ERROR: Final = re.compile(r"^error: (?P<reason>.+)$")


class OpenVino:
    """See `Engine`. ``env`` is where the place of the cache is read from."""

    kind = "openvino"

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self._env = env

    def launch(self, name: str, model: Model, address: Address) -> Launch:
        """See `Engine.launch`."""
        if model.program is None and importlib.util.find_spec(_LIBRARY) is None:
            raise _cannot_start("the openvino engine isn't installed: pip install 'modelswap[openvino]'")
        if model.model is None:
            raise _cannot_start(f"{name}: `model` must name a GGUF file or an OpenVINO IR folder")
        if model.adapters:
            raise _cannot_start(f"{name}: the openvino engine has no adapters")
        if model.canary == "embedding":
            raise _cannot_start(f"{name}: the openvino engine makes no embeddings; use `canary: chat`")
        path = Path(os.path.abspath((model.cwd or Path()) / Path(model.model).expanduser()))  # noqa: PTH100 - keeps links
        if not path.exists():
            raise _cannot_start(f"{name}: there is no {path} (give a GGUF file or an OpenVINO IR folder)")
        served = [word for served_name in (name, *model.aliases) for word in ("--served-name", served_name)]
        return Launch(
            argv=(
                *(model.program or (sys.executable, "-m", _MODULE)),
                *("--model", str(path)),
                *served,
                *("--host", address.host, "--port", str(address.port)),
                *("--cache-dir", str(_cache(self._env))),
                # The rest of the grace is for the process to end.
                *("--grace", f"{max(0.0, self.stop_grace(model) - 1.0):g}"),
                *model.args,
            ),
            env=dict(model.env),
            cwd=str(model.cwd) if model.cwd else None,
        )

    def slots(self, model: Model) -> int:
        """See `Engine.slots`."""
        return model.concurrency or 1

    def upstream_name(self, name: str, model: Model) -> str | None:
        """See `Engine.upstream_name`."""
        return None

    def stop_grace(self, model: Model) -> float:
        """See `Engine.stop_grace`."""
        return _STOP_GRACE if model.stop_grace is None else model.stop_grace

    def device_bytes(self, model: Model, total: int) -> int | None:
        """See `Engine.device_bytes`: on the CPU it takes none of the device's memory."""
        return 0 if _device(model.args).upper().startswith("CPU") else None

    async def readiness(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> Readiness:
        """See `Engine.readiness`."""
        headers = _headers(model)
        try:
            async with http.get(f"{address.url}/health", headers=headers) as response:
                if response.status != 200:
                    return Readiness(False, "loading")
        except aiohttp.ClientConnectorError:
            return Readiness(False, "starting")
        async with http.get(f"{address.url}/v1/models", headers=headers) as response:
            served = _names(await response.read()) if response.status == 200 else set()
        if missing := {name, *model.aliases} - served:
            known = ", ".join(sorted(served)) or "nothing that can be read"
            return Readiness(False, problem=f"{address.url} serves {known}, not {', '.join(sorted(missing))}")
        return Readiness(True, "ready", slots=self.slots(model))

    async def running(self, http: aiohttp.ClientSession, model: Model, address: Address) -> int | None:
        """See `Engine.running`."""
        async with http.get(f"{address.url}/metrics", headers=_headers(model)) as response:
            if response.status != 200:
                return None
            counts = re.findall(r"^openvino_requests_(?:running|waiting) (\d+)$", await response.text(), re.MULTILINE)
        return sum(map(int, counts)) if len(counts) == 2 else None

    async def healthy(self, http: aiohttp.ClientSession, model: Model, address: Address) -> bool:
        """See `Engine.healthy`."""
        async with http.get(f"{address.url}/health", headers=_headers(model)) as response:
            return response.status == 200

    async def canary(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> None:
        """See `Engine.canary`: one token, in a chat unless the model says otherwise."""
        if model.canary == "none":
            return
        body: dict[str, Any] = {"model": name, "max_tokens": 1, "temperature": 0}
        if model.canary == "completion":
            path, body = "/v1/completions", body | {"prompt": "Hello"}
        else:
            path, body = "/v1/chat/completions", body | {"messages": [{"role": "user", "content": "Hello"}]}
        async with http.post(f"{address.url}{path}", json=body, headers=_headers(model)) as response:
            answer = await response.read()
            if response.status != 200:
                said = answer[:500].decode(errors="replace")
                raise CanaryFailed(f"{path} answered {response.status}: {said}")
        if _tokens(answer) < 1:
            raise CanaryFailed(f"{path} answered without a token: {answer[:500].decode(errors='replace')}")

    def diagnose(self, exit_code: int | None, log: Sequence[str]) -> Diagnosis:
        """See `Engine.diagnose`."""
        text = "\n".join(log)
        if _NO_MEMORY.search(text) or exit_code == -9:
            why = "killed, most likely because the machine ran" if exit_code == -9 else "ran"
            return Diagnosis(f"{why} out of host memory: free some, or use a smaller model", permanent=False)
        if "address already in use" in text.lower():
            return Diagnosis("another program listens on its port", permanent=False)
        if "No module named" in text and _LIBRARY in text:
            return Diagnosis("openvino_genai isn't installed: pip install 'modelswap[openvino]'", permanent=True)
        reasons = [match["reason"] for line in log if (match := _ERROR.match(line))]
        if reasons:
            return Diagnosis(reasons[-1], permanent=True)
        if usage := [line for line in log if ": error: " in line]:
            return Diagnosis(f"its arguments are wrong: {usage[-1].partition(': error: ')[2]}", permanent=True)
        if exit_code == -11:
            cache = _cache(self._env)
            reason = f"crashed (signal 11): the model's file may be damaged; if it isn't, remove {cache} and try again"
            return Diagnosis(reason, permanent=True)
        if exit_code is None:
            return Diagnosis("still loading when its time was up", permanent=False)
        how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with status {exit_code}"
        return Diagnosis(f"the openvino engine {how}", permanent=False)


def _cannot_start(message: str) -> ModelswapError:
    return ModelswapError(message, code=Code.MODEL_START_FAILED)


def _cache(env: Mapping[str, str]) -> Path:
    base = Path(env.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "modelswap" / "openvino"


def _device(args: Sequence[str]) -> str:
    device = "CPU"
    for word, following in zip(args, [*args[1:], ""], strict=True):
        if word == "--device":
            device = following
        elif word.startswith("--device="):
            device = word.partition("=")[2]
    return device


def _headers(model: Model) -> dict[str, str]:
    return {"Authorization": f"Bearer {model.api_key.get_secret_value()}"} if model.api_key else {}


class _Served(msgspec.Struct):
    id: str


class _ServedList(msgspec.Struct):
    data: list[_Served]


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Answer(msgspec.Struct):
    usage: _Usage


def _names(body: bytes) -> set[str]:
    try:
        return {served.id for served in msgspec.json.decode(body, type=_ServedList).data}
    except msgspec.DecodeError:
        return set()


def _tokens(body: bytes) -> int:
    try:
        return msgspec.json.decode(body, type=_Answer).usage.completion_tokens
    except msgspec.DecodeError:
        return 0
