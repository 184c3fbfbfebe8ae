"""SGLang.

Read in the sources of SGLang 0.5 (`python/sglang/srt/entrypoints/http_server.py`, `server_args.py`,
`managers/scheduler_update_weights_mixin.py`, `managers/scheduler.py`):

- ``python -m sglang.launch_server`` and ``sglang serve`` take the same options. ``--served-model-name`` takes one name;
  requests may use any, but ``name:adapter`` means a LoRA adapter.
- ``--api-key`` is read from the command line only, where everybody on the machine can see it: we start it without.
  With one, all but ``/health`` and ``/metrics`` is guarded.
- It listens once the model is loaded. ``/health`` and ``/health_generate`` answer 503 until it has warmed up; then they
  have a token generated if nothing else runs. Asleep they would hang.
- ``/server_info`` (older: ``/get_server_info``) asks the scheduler, and generates nothing.
- ``/v1/loads`` and (older) ``/get_load`` count requests as they are now, ``/metrics`` as at the last log line.
- ``--mem-fraction-static`` is the share of memory for weights and KV cache; its default depends on the GPU.
- ``/release_memory_occupation`` and ``/resume_memory_occupation`` take a JSON object. Releasing asserts that nothing
  runs: the scheduler dies if something does, and if it is told twice. Memory may be back later than the answer. Without
  ``--enable-weights-cpu-backup`` the weights are lost; without ``--enable-memory-saver`` nothing is given back.
- SIGTERM is looked at every 5 s, then what still runs is waited for.
- Its images have no entrypoint but NVIDIA's, which only wraps.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import aiohttp

from modelswap.engines import compiling, greedy, hub_causes, options
from modelswap.engines import http as ask
from modelswap.engines.base import Address, CannotSleep, CannotWake, Diagnosis, Launch, Readiness, WakeOutOfMemory
from modelswap.engines.compiling import Cache
from modelswap.engines.diagnosis import cause, clean, explain
from modelswap.engines.programs import NotInstalled, folder, local, on_path, only_wraps
from modelswap.spec.config import Model

_MODULE: Final = "sglang.launch_server"
_IMAGE_PROGRAM: Final = ("python3", "-m", _MODULE)
_PORT: Final = 30000
_SLOTS: Final = 256
_SHARE: Final = 0.85
_STOP_GRACE: Final = 15.0
_SLEEP: Final = ("--enable-memory-saver", "--enable-weights-cpu-backup")
_REMEDY: Final = f"it needs {' and '.join(_SLEEP)} (sleep: on)"
_INFO: Final = ("/server_info", "/get_server_info")
_LOADS: Final = ("/v1/loads?include=core", "/get_load")


class SGLang:
    """The `Engine` for SGLang's OpenAI server."""

    kind = "sglang"

    def launch(self, name: str, model: Model, address: Address, program: Sequence[str] | None = None) -> Launch:
        """Return the command line; our options come last, so that they win over the same ones in ``args``."""
        weights = model.model or ""
        if program is None:
            program = _program(model)
            if (path := local(weights, model)) is not None:
                weights = str(path)
        elif only_wraps(program):
            program = (*program, *_IMAGE_PROGRAM)
        else:
            program = _served(program)
        argv = [*program, "--model-path", weights, *model.args, "--served-model-name", _plain(name)]
        if model.sleep == "on":
            argv += [flag for flag in _SLEEP if not options.given(model.args, flag)]
        argv += ["--host", address.host, "--port", str(address.port)]
        return Launch(tuple(argv), dict(model.env), folder(model))

    def slots(self, model: Model) -> int:
        """Return ``--max-running-requests``, by default 256: it queues what is more."""
        return model.concurrency or options.whole(options.value(model.args, "--max-running-requests")) or _SLOTS

    def standby(self, model: Model, launch: Launch, weights: Path | None = None) -> None:
        """Return None: it has none."""

    def caches(self) -> tuple[Cache, ...]:
        """Return its own, and those of the libraries that it compiles with."""
        return compiling.SGLANG

    def port(self) -> int:
        """Return SGLang's default, 30000."""
        return _PORT

    def upstream_name(self, name: str, model: Model) -> str:
        """Return the one name it was given."""
        return _plain(name) if model.runtime != "adopted" else model.model or name

    def stop_grace(self, model: Model) -> float:
        """Return 15 s by default: it may take 5 s to notice."""
        return _STOP_GRACE if model.stop_grace is None else model.stop_grace

    def device_bytes(self, model: Model, total: int) -> int | None:
        """Return ``--mem-fraction-static`` (0.85 if not given) of ``total``; unknown for somebody else's container."""
        if model.memory is not None:
            return int(model.memory)
        if model.runtime == "adopted":
            return None
        given = options.share(options.value(model.args, "--mem-fraction-static", "--mem-fraction"))
        return round((given or _SHARE) * total)

    async def readiness(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> Readiness:
        """Ask ``/health``, which is 503 until it has warmed up, then ``/v1/models``. Never asked of a sleeping one."""
        try:
            if await ask.status(http, model, address, "/health") != 200:
                return Readiness(ready=False, stage="loading")
            names = await ask.served_names(http, model, address)
        except aiohttp.ClientConnectorError:
            return Readiness(ready=False, stage="starting")
        if model.runtime == "adopted" and model.model is None and isinstance(names, set):
            return Readiness(ready=True, stage="ready")
        expected = self.upstream_name(name, model)
        return ask.named(names, {expected}, expected)

    async def running(self, http: aiohttp.ClientSession, model: Model, address: Address) -> int | None:
        """Return running plus waiting requests, as the scheduler counts them now."""
        for path in _LOADS:
            reply = await ask.get(http, model, address, path)
            if reply.status == 200 and (count := _count(reply.json())) is not None:
                return count
        return None

    async def healthy(self, http: aiohttp.ClientSession, model: Model, address: Address) -> bool:
        """Return whether its scheduler answers; nothing is generated, so that it may sleep or be about to."""
        status = 404
        for path in _INFO:
            status = await ask.status(http, model, address, path)
            if status != 404:
                break
        return status == 200

    async def canary(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> None:
        """Ask for one token, or for an embedding where ``args`` make it an embedder."""
        called = self.upstream_name(name, model)
        if _embeds(model):
            await ask.canary(http, called, model, address, "embedding")
        elif model.runtime == "adopted":
            await ask.canary(http, called, model, address, "completion", "chat", "embedding")
        else:
            await ask.canary(http, called, model, address, "completion", "chat")

    def sleep_levels(self, model: Model) -> tuple[int, ...]:
        """Return 1, which is what release and resume amount to, if its weights are kept; none for embedders."""
        if model.device == "none" or model.sleep == "off" or _embeds(model):
            return ()
        own = model.runtime != "adopted" and all(options.given(model.args, flag) for flag in _SLEEP)
        return (1,) if model.sleep == "on" or own else ()

    async def sleep(self, http: aiohttp.ClientSession, model: Model, address: Address, level: int) -> None:
        """Have it release its memory, if nothing runs; it can't be asked whether it did."""
        if busy := await self.running(http, model, address):
            raise CannotSleep(f"{busy} requests still run or wait in it, and releasing its memory would crash it")
        reply = await ask.post(http, model, address, "/release_memory_occupation", {}, ask.PATIENT)
        if reply.status != 200:
            raise CannotSleep(f"release was answered with {reply.status}: {ask.complaint(reply)}; {_REMEDY}")

    async def wake(self, http: aiohttp.ClientSession, model: Model, address: Address, level: int) -> None:
        """Have it take its memory back."""
        reply = await ask.post(http, model, address, "/resume_memory_occupation", {}, ask.PATIENT)
        if reply.status == 200:
            return
        said = f"resume was answered with {reply.status}: {ask.complaint(reply)}"
        raise WakeOutOfMemory(said) if ask.out_of_memory(reply) else CannotWake(said)

    async def asleep(self, http: aiohttp.ClientSession, model: Model, address: Address) -> None:
        """Return None: it can't tell."""

    async def greedy(
        self, http: aiohttp.ClientSession, name: str, model: Model, address: Address, tokens: int
    ) -> tuple[str, ...] | None:
        """Ask for a completion, unless it is an embedder."""
        kind = None if _embeds(model) else "completion"
        return await greedy.answer(http, self.upstream_name(name, model), model, address, tokens, kind)

    def diagnose(self, exit_code: int | None, log: Sequence[str]) -> Diagnosis:
        """Look for the known causes, else for the last exception."""
        return explain(_CAUSES, exit_code, [clean(line) for line in log])


def _plain(name: str) -> str:
    return name.replace(":", "-")


def _embeds(model: Model) -> bool:
    return options.given(model.args, "--is-embedding") or model.canary == "embedding"


def _program(model: Model) -> list[str]:
    if model.program:
        return _served(model.program)
    if importlib.util.find_spec("sglang") is not None:
        return [sys.executable, "-m", _MODULE]
    if found := on_path("sglang", model):
        return [found, "serve"]
    raise NotInstalled(
        "SGLang is not installed: neither is 'sglang' on PATH, nor can this Python import it. Install it"
        f" (pip install sglang) or say where it is, e.g. program: [/path/to/venv/bin/python, -m, {_MODULE}]"
    )


def _served(program: Sequence[str]) -> list[str]:
    return [*program, "serve"] if PurePosixPath(program[-1]).name == "sglang" else list(program)


def _count(answer: Any) -> int | None:
    """Return the requests in an answer of `_LOADS`: a list with an entry for each replica, bare or as ``loads``."""
    entries = answer.get("loads") if isinstance(answer, dict) else answer
    if not isinstance(entries, list) or not entries:
        return None
    total = 0
    for entry in entries:
        if not isinstance(entry, dict):
            return None
        split = [entry.get("num_running_reqs"), entry.get("num_waiting_reqs")]
        counts = split if split[0] is not None else [entry.get("num_reqs")]
        if not all(isinstance(count, int) for count in counts):
            return None
        total += sum(count for count in counts if isinstance(count, int))
    return total


_CAUSES: Final = (
    cause(
        r"Not enough memory(?: to allocate KV cache)?\.[^\n]*increase --mem-fraction-static|"
        r"Not enough memory to allocate KV cache",
        "the weights leave no device memory for the KV cache; raise --mem-fraction-static in args,"
        " or use a smaller or quantised model",
    ),
    cause(
        r"The memory capacity is unbalanced",
        "another program holds memory of the GPU; end it, or lower --mem-fraction-static in args",
        # Whoever holds it may leave.
        permanent=False,
    ),
    cause(
        r"CUDA out of memory\. Tried to allocate ([\d.]+ \w+)",
        "the device ran out of memory: {0} more were wanted; use a smaller or quantised model, or a smaller"
        " --mem-fraction-static or --cuda-graph-max-bs in args",
    ),
    cause(
        r"No module named '?torch_memory_saver|torch[-_]memory[-_]saver is not installed",
        "sleep needs torch_memory_saver in the engine's Python (pip install torch-memory-saver); or say sleep: off",
    ),
    *hub_causes.ARGUMENTS,
    *hub_causes.HUB,
    *hub_causes.OFFLINE,
    *hub_causes.TRANSFORMERS,
    cause(
        r"No module named '?sglang\b",
        "the Python in 'program' has no sglang; install it there, or name the right Python",
    ),
    cause(
        r"No CUDA GPUs are available|No accelerator \([^)]*\) is available|NVIDIA driver on your system is too old",
        "SGLang finds no usable GPU; check nvidia-smi (AMD: rocminfo) and the driver",
    ),
)
