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
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final

import aiohttp

from modelswap.engines import compiling, greedy, options, vllm_causes, vllm_sleep, vllm_standby
from modelswap.engines import http as ask
from modelswap.engines.base import Address, Diagnosis, Launch, Readiness, StandbyPlan
from modelswap.engines.compiling import Cache
from modelswap.engines.programs import NotInstalled, folder, local, on_path, only_wraps
from modelswap.spec.config import Model

_MODULE: Final = "vllm.entrypoints.openai.api_server"
_IMAGE_PROGRAM: Final = ("vllm", "serve")
_PORT: Final = 8000
_KEY: Final = "VLLM_API_KEY"
_CONTAINER: Final = {
    *("image", "entrypoint", "volumes", "network", "gpus", "device", "devices", "shm_size", "ipc", "ulimits"),
    *("extra_hosts", "port"),
}
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
        if model.sleep == "on":
            argv.append(vllm_sleep.FLAG)
            env[vllm_sleep.DEV_MODE] = "1"
        if model.api_key:
            env[_KEY] = model.api_key.get_secret_value()
        return Launch(tuple(argv), env, folder(model))

    def slots(self, model: Model) -> int:
        """Return ``--max-num-seqs``, by default 256."""
        return model.concurrency or options.whole(options.value(model.args, "--max-num-seqs")) or _SLOTS

    def standby(self, model: Model, launch: Launch, weights: Path | None = None) -> StandbyPlan | None:
        """Return how one waits in the Python that ``launch`` would start, with the same environment.

        The API key isn't part of it: that is read when the server starts. For a container, neither is anything that
        its command alone says.
        """
        inside = model.runtime == "managed"
        python, program = _image_interpreter(launch) if inside else _interpreter(launch)
        if not python:
            return None
        env = {name: value for name, value in launch.env.items() if name != _KEY}
        cwd = None if inside else _matters(launch, python)
        spelled = json.dumps([python, program, sorted(env.items()), cwd, _container(model) if inside else None])
        key = f"vllm-{hashlib.sha256(spelled.encode()).hexdigest()[:12]}"
        script = [vllm_standby.PROGRAM + program] if program else []
        hints = (*script, *_architectures(weights or (None if inside else _own_folder(model))))
        return StandbyPlan(key, python, Path(vllm_standby.__file__), env, hints, model if inside else None, cwd)

    def caches(self) -> tuple[Cache, ...]:
        """Return its own, and those of the libraries that it compiles with."""
        return compiling.VLLM

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
        if vllm_sleep.pools(model):
            await ask.canary(http, called, model, address, "embedding")
        elif model.runtime == "adopted":
            await ask.canary(http, called, model, address, "completion", "chat", "embedding")
        else:
            await ask.canary(http, called, model, address, "completion", "chat")

    def sleep_levels(self, model: Model) -> tuple[int, ...]:
        """Return what the model's arguments allow, see `vllm_sleep.levels`."""
        return vllm_sleep.levels(model)

    async def sleep(self, http: aiohttp.ClientSession, model: Model, address: Address, level: int) -> None:
        """Have it sleep, if nothing runs."""
        await vllm_sleep.sleep(http, model, address, level, await self.running(http, model, address))

    async def wake(self, http: aiohttp.ClientSession, model: Model, address: Address, level: int) -> None:
        """Wake it, and after level 2 have it read its weights again."""
        await vllm_sleep.wake(http, model, address, level)

    async def asleep(self, http: aiohttp.ClientSession, model: Model, address: Address) -> bool | None:
        """Return what ``/is_sleeping`` says."""
        return await vllm_sleep.asleep(http, model, address)

    async def greedy(
        self, http: aiohttp.ClientSession, name: str, model: Model, address: Address, tokens: int
    ) -> tuple[str, ...] | None:
        """Ask for a completion, unless ``args`` make it a pooling model."""
        kind = None if vllm_sleep.pools(model) else "completion"
        return await greedy.answer(http, self.upstream_name(name, model) or name, model, address, tokens, kind)

    def diagnose(self, exit_code: int | None, log: Sequence[str]) -> Diagnosis:
        """Look for the known causes, else for the exception that began it all."""
        return vllm_causes.diagnose(exit_code, log)


def _interpreter(launch: Launch) -> tuple[tuple[str, ...], str]:
    """Return the command of the Python that ``launch`` runs vLLM in; empty if that can't be told.

    Where only the place itself knows which one a script runs in, the script is returned, too, and asked there.
    """
    if "-m" in launch.argv:
        before = launch.argv[: launch.argv.index("-m")]
        return before if before and launch.argv[len(before) + 1 : len(before) + 2] == (_MODULE,) else (), ""
    if "serve" not in launch.argv:
        return (), ""
    *wrapper, program = launch.argv[: launch.argv.index("serve")]
    if wrapper and os.sep not in program:
        return (*wrapper, "python"), program  # uv run vllm serve
    python = vllm_standby.interpreter(program, launch.env.get("PATH") or os.environ.get("PATH"))
    return (*wrapper, *python) if python else (), ""


def _image_interpreter(launch: Launch) -> tuple[tuple[str, ...], str]:
    """Return the command of an image's Python as `_interpreter` does; only the container can look at its scripts."""
    if "-m" in launch.argv:
        return _interpreter(launch)
    if "serve" not in launch.argv:
        return (), ""
    *wrapper, program = launch.argv[: launch.argv.index("serve")]
    return (*wrapper, "python3"), program


def _matters(launch: Launch, python: Sequence[str]) -> str | None:
    """Return the working folder if the Python or what it imports is found from there."""
    found_from = [python[0] if os.sep in python[0] else os.sep]
    found_from += (launch.env.get("PYTHONPATH") or os.environ.get("PYTHONPATH") or os.sep).split(os.pathsep)
    return None if all(Path(path).is_absolute() for path in found_from) else launch.cwd


def _container(model: Model) -> list[object]:
    """Return what of a model makes a difference to its container, beside its command and environment."""
    from_hub = not (model.model or "").startswith(("/", "."))  # those get the Hugging Face cache
    return [from_hub, model.model_dump(mode="json", include=_CONTAINER)]


def _own_folder(model: Model) -> Path | None:
    found = local(model.model or "", model)
    return None if found is None else (model.cwd or Path()) / found


def _architectures(weights: Path | None) -> tuple[str, ...]:
    """Return what the ``config.json`` in a model's folder names; empty if that can't be read."""
    if weights is None:
        return ()
    try:
        named = json.loads((weights / "config.json").read_bytes())["architectures"]
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
