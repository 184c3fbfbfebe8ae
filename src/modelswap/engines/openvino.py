"""OpenVINO GenAI, the embedded engine: `modelswap.engines.openvino_server`, run by our own Python.

It generates one answer at a time, on the CPU unless ``--device`` says otherwise.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import aiohttp

from modelswap.engines import greedy, options
from modelswap.engines import http as ask
from modelswap.engines.base import Address, CannotSleep, CannotWake, Diagnosis, Launch, Readiness
from modelswap.engines.diagnosis import cause, explain
from modelswap.engines.programs import NoSuchModel, NotInstalled, folder, local
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.spec.config import Model

_MODULE: Final = "modelswap.engines.openvino_server"
_LIBRARY: Final = "openvino_genai"
_STOP_GRACE: Final = 10.0
_COUNTS: Final = ("openvino_requests_running", "openvino_requests_waiting")


class CannotServe(ModelswapError):
    """The config asks the embedded engine for something that it doesn't do."""

    code = Code.MODEL_BROKEN


class OpenVino:
    """The `Engine` for the embedded server. ``env`` is where the place of its cache is read from."""

    kind = "openvino"

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self._env = env

    def launch(self, name: str, model: Model, address: Address, program: Sequence[str] | None = None) -> Launch:
        """Return the command line; our options come last, so that they win over the same ones in ``args``."""
        # Looked for and never imported: it takes 0.2 s and 100 MB.
        if model.program is None and importlib.util.find_spec(_LIBRARY) is None:
            raise NotInstalled("the openvino engine isn't installed: pip install 'modelswap[openvino]'")
        if model.adapters:
            raise CannotServe(f"{name}: the openvino engine has no adapters; remove them, or use vllm or llamacpp")
        if model.canary == "embedding":
            raise CannotServe(f"{name}: the openvino engine makes no embeddings; use canary: chat")
        argv = [
            *(model.program or (sys.executable, "-m", _MODULE)),
            "--cache-dir",
            str(cache_folder(self._env)),
            *model.args,
        ]
        argv += ["--model", str(_weights(model))]
        for served in (name, *model.aliases):
            argv += ["--served-name", served]
        argv += ["--host", address.host, "--port", str(address.port)]
        # What remains of the grace is for the process to end.
        argv += ["--grace", f"{max(0.0, self.stop_grace(model) - 1.0):g}"]
        return Launch(tuple(argv), dict(model.env), folder(model))

    def slots(self, model: Model) -> int:
        """Return 1: it has one thread that generates."""
        return model.concurrency or 1

    def standby(self, model: Model, launch: Launch, weights: Path | None = None) -> None:
        """Return None: it has none."""

    def caches(self) -> tuple[()]:
        """Return none: it runs in no container."""
        return ()

    def port(self) -> int:
        """Return 8000."""
        return 8000

    def upstream_name(self, name: str, model: Model) -> None:
        """Return None: it is started with our name and all aliases."""

    def stop_grace(self, model: Model) -> float:
        """Return 10 s by default; idle, it ends within milliseconds."""
        return _STOP_GRACE if model.stop_grace is None else model.stop_grace

    def device_bytes(self, model: Model, total: int) -> int | None:
        """Return what the config says, or 0 for the CPU, which needs none of the device's memory."""
        if model.memory is not None:
            return int(model.memory)
        return 0 if (options.value(model.args, "--device") or "CPU").upper().startswith("CPU") else None

    async def readiness(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> Readiness:
        """Ask ``/health``, and once that is well, whether it serves our name."""
        try:
            if await ask.status(http, model, address, "/health") != 200:
                return Readiness(ready=False, stage="loading")
            served = await ask.served_names(http, model, address)
        except aiohttp.ClientConnectorError:
            return Readiness(ready=False, stage="starting")
        return ask.named(served, {name, *model.aliases}, name)

    async def running(self, http: aiohttp.ClientSession, model: Model, address: Address) -> int | None:
        """Return the requests that generate or wait, from ``/metrics``."""
        return await ask.gauges(http, model, address, _COUNTS)

    async def healthy(self, http: aiohttp.ClientSession, model: Model, address: Address) -> bool:
        """Return whether ``/health`` answers 200."""
        return await ask.status(http, model, address, "/health") == 200

    async def canary(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> None:
        """Ask for one token in a chat, unless the config says otherwise."""
        await ask.canary(http, name, model, address, "chat")

    def sleep_levels(self, model: Model) -> tuple[int, ...]:
        """Return none: it starts as fast as it would wake."""
        return ()

    async def sleep(self, http: aiohttp.ClientSession, model: Model, address: Address, level: int) -> None:
        """Refuse."""
        raise CannotSleep(f"engine '{self.kind}' has no sleep")

    async def wake(self, http: aiohttp.ClientSession, model: Model, address: Address, level: int) -> None:
        """Refuse."""
        raise CannotWake(f"engine '{self.kind}' has no sleep")

    async def asleep(self, http: aiohttp.ClientSession, model: Model, address: Address) -> None:
        """Return None: it never sleeps."""

    async def greedy(
        self, http: aiohttp.ClientSession, name: str, model: Model, address: Address, tokens: int
    ) -> tuple[str, ...] | None:
        """Ask in a chat."""
        return await greedy.answer(http, name, model, address, tokens, "chat")

    def diagnose(self, exit_code: int | None, log: Sequence[str]) -> Diagnosis:
        """Look for the known causes, which the server names itself; else for the last error line."""
        found = explain(_CAUSES, exit_code, log)
        if exit_code in {-signal.SIGSEGV, -signal.SIGBUS}:
            remedy = f"the model's file may be damaged; if it isn't, remove {cache_folder(self._env)} and try again"
            return Diagnosis(f"{found.reason}; {remedy}", permanent=True)
        return found


def _weights(model: Model) -> Path:
    if model.model is None:
        raise NoSuchModel("'model' must name a GGUF file or an OpenVINO IR folder")
    if (path := local(model.model, model)) is None:
        raise NoSuchModel(
            f"there is no {model.model}; 'model' must name a GGUF file or an OpenVINO IR folder on this machine"
        )
    return path


def cache_folder(env: Mapping[str, str]) -> Path:
    """Return where converted models are kept unless ``--cache-dir`` says otherwise."""
    base = Path(env.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "modelswap" / "openvino"


_CAUSES: Final = (
    cause(
        r"out of host memory|MemoryError|bad_alloc|Cannot allocate memory",
        "it ran out of host memory: free some, or use a smaller model",
        permanent=False,
    ),
    cause(r"(?m)^error: (cannot (?:load|import) .+)$", "it {0}"),
    cause(r"(?m)^usage: (?s:.*)error: (.+)$", "it doesn't accept args: {0}"),
)
