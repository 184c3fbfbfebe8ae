"""llama.cpp's ``llama-server``.

Seen with ``llama-server`` built from llama.cpp 0.6.0-dev (ggml 0.26):

- ``--alias a,b,c`` takes several names; it reports the alphabetically first, and answers to any ``model`` at all.
- While the model loads, everything answers 503; ``/props`` then tells the alias and ``total_slots``. With a key, only
  ``/health`` is open to all.
- ``--api-key`` is also read from ``LLAMA_API_KEY``, ``--parallel`` from ``LLAMA_ARG_N_PARALLEL``; without it, or
  with -1, there are 4 slots (older ones: 1).
- ``/slots`` is on unless ``--no-slots`` is given and says ``is_processing`` for each; ``/metrics`` needs ``--metrics``
  and counts the deferred requests, too.
- llama.cpp's ``server`` images have the entrypoint ``/app/llama-server``, the ``full`` ones ``/app/tools.sh``, which
  wants ``--server`` first. They listen at 8080.
- SIGTERM ends it within 50 ms when idle. A build for another processor dies by SIGILL or SIGSEGV.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import aiohttp

from modelswap.engines import greedy, options
from modelswap.engines import http as ask
from modelswap.engines.base import Address, CannotSleep, CannotWake, Diagnosis, Launch, Readiness
from modelswap.engines.diagnosis import cause, explain
from modelswap.engines.programs import NoSuchModel, NotInstalled, folder, local, on_path, only_wraps
from modelswap.spec.config import Model

_PORT: Final = 8080
_STOP_GRACE: Final = 5.0
_LOADING: Final = Readiness(ready=False, stage="loading")


class LlamaCpp:
    """The `Engine` for ``llama-server``."""

    kind = "llamacpp"

    def launch(self, name: str, model: Model, address: Address, program: Sequence[str] | None = None) -> Launch:
        """Return the command line; our options come last, so that they win over the same ones in ``args``."""
        if program is None:
            argv = [*_program(model), *_weights(model.model or "", model), *model.args]
        else:
            argv = [*_program_inside(program), *_weights_inside(model.model or ""), *model.args]
        names = [each for each in (name, *model.aliases) if "," not in each]
        if names:
            argv += ["--alias", ",".join(names)]
        argv += ["--host", address.host, "--port", str(address.port)]
        env = dict(model.env)
        if model.api_key:
            env["LLAMA_API_KEY"] = model.api_key.get_secret_value()
        return Launch(tuple(argv), env, folder(model))

    def slots(self, model: Model) -> int:
        """Return ``--parallel``, by default 1 until it has said otherwise."""
        given = options.value(model.args, "--parallel", "-np", "--n-parallel")
        return model.concurrency or options.whole(given or model.env.get("LLAMA_ARG_N_PARALLEL")) or 1

    def standby(self, model: Model, launch: Launch, weights: Path | None = None) -> None:
        """Return None: it has none."""

    def caches(self) -> tuple[()]:
        """Return none: it comes compiled."""
        return ()

    def port(self) -> int:
        """Return llama-server's default, 8080."""
        return _PORT

    def upstream_name(self, name: str, model: Model) -> str | None:
        """Return None: it answers to any name at all; somebody else's container may be behind a router that doesn't."""
        return model.model if model.runtime == "adopted" else None

    def stop_grace(self, model: Model) -> float:
        """Return 5 s by default: it has nothing to save."""
        return _STOP_GRACE if model.stop_grace is None else model.stop_grace

    def device_bytes(self, model: Model, total: int) -> int | None:
        """Return what the config says; llama.cpp can't tell before it has loaded."""
        return int(model.memory) if model.memory is not None else None

    async def readiness(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> Readiness:
        """Ask ``/props`` alone, because this is asked every few milliseconds; older servers get the long way."""
        try:
            reply = await ask.get(http, model, address, "/props")
            if reply.status == 503:
                return _LOADING
            if reply.status in (401, 403):
                return Readiness(ready=False, problem=f"it refuses our api_key ({reply.status} from /props)")
            if reply.status == 200 and isinstance(props := reply.json(), dict) and "total_slots" in props:
                return _from_props(props, name, model)
            if await ask.status(http, model, address, "/health") != 200:
                return _LOADING
            names = await ask.served_names(http, model, address)
        except aiohttp.ClientConnectorError:
            return Readiness(ready=False, stage="starting")
        if _knows_any_name(model) and isinstance(names, set):
            return Readiness(ready=True, stage="ready")
        return ask.named(names, _known(name, model), name)

    async def running(self, http: aiohttp.ClientSession, model: Model, address: Address) -> int | None:
        """Return the requests it works on, and with ``--metrics`` those it has put off, too."""
        if options.given(model.args, "--metrics"):
            names = ("llamacpp:requests_processing", "llamacpp:requests_deferred")
            return await ask.gauges(http, model, address, names)
        reply = await ask.get(http, model, address, "/slots")
        slots = reply.json()
        if reply.status != 200 or not isinstance(slots, list):
            return None
        return sum(isinstance(slot, dict) and slot.get("is_processing") is True for slot in slots)

    async def healthy(self, http: aiohttp.ClientSession, model: Model, address: Address) -> bool:
        """Return whether ``/health`` answers 200."""
        return await ask.status(http, model, address, "/health") == 200

    async def canary(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> None:
        """Ask for one token, or for an embedding if ``args`` say so; a reranker isn't asked."""
        called = self.upstream_name(name, model) or name
        if options.given(model.args, "--rerank", "--reranking"):
            await ask.canary(http, called, model, address, "none")
        elif options.given(model.args, "--embedding", "--embeddings"):
            await ask.canary(http, called, model, address, "embedding")
        elif model.runtime == "adopted":
            await ask.canary(http, called, model, address, "completion", "chat", "embedding")
        else:
            await ask.canary(http, called, model, address, "completion", "chat")

    def sleep_levels(self, model: Model) -> tuple[int, ...]:
        """Return none: its own ``--sleep-idle-seconds`` wakes by itself, when it should not."""
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
        """Ask for a completion, unless ``args`` make it an embedder or a reranker."""
        kind = None if _makes_no_text(model) else "completion"
        return await greedy.answer(http, self.upstream_name(name, model) or name, model, address, tokens, kind)

    def diagnose(self, exit_code: int | None, log: Sequence[str]) -> Diagnosis:
        """Look for the known causes, else for the last error line."""
        return explain(_CAUSES, exit_code, log)


def _program(model: Model) -> list[str]:
    if model.program:
        return list(model.program)
    if found := on_path("llama-server", model):
        return [found]
    raise NotInstalled(
        "llama-server is not on PATH; install llama.cpp or say where it is, e.g. program: [/opt/llama/llama-server]"
    )


def _weights(text: str, model: Model) -> tuple[str, str]:
    if (path := local(text, model)) is not None:
        return "-m", str(path)
    if text.endswith(".gguf") or text.startswith(("/", "./", "../", "~")):
        seen_from = f" (seen from {model.cwd})" if model.cwd and not Path(text).is_absolute() else ""
        raise NoSuchModel(f"there is no file {text}{seen_from}; mend 'model', or put the file there")
    return "-hf", text


def _program_inside(entrypoint: Sequence[str]) -> list[str]:
    if only_wraps(entrypoint):
        return [*entrypoint, "llama-server"]
    tools = PurePosixPath(entrypoint[-1]).name == "tools.sh"
    return [*entrypoint, "--server"] if tools else list(entrypoint)


def _weights_inside(text: str) -> tuple[str, str]:
    return ("-m", text) if text.startswith("/") or text.endswith(".gguf") else ("-hf", text)


def _known(name: str, model: Model) -> set[str]:
    return {name, *model.aliases, *([model.model] if model.runtime == "adopted" and model.model else [])}


def _makes_no_text(model: Model) -> bool:
    return options.given(model.args, "--rerank", "--reranking", "--embedding", "--embeddings")


def _knows_any_name(model: Model) -> bool:
    """Return whether we weren't told how somebody else's container calls what it serves."""
    return model.runtime == "adopted" and model.model is None


def _from_props(props: dict[str, Any], name: str, model: Model) -> Readiness:
    alias, slots = props.get("model_alias"), props["total_slots"]
    ours = _known(name, model)
    sure = not any("," in each for each in ours) and not _knows_any_name(model)
    if sure and isinstance(alias, str) and alias and ours.isdisjoint(alias.split(",")):
        return Readiness(ready=False, problem=f"it serves {alias}, not {name}")
    return Readiness(ready=True, stage="ready", slots=slots if isinstance(slots, int) and slots > 0 else None)


_CAUSES: Final = (
    cause(r"(?m)error: (invalid argument: .+)$", "it doesn't know some of args: {0}"),
    cause(r'(?m)error while handling argument ("[^"]+": .+)$', "it doesn't accept args: {0}"),
    cause(
        r"failed to open GGUF file '?([^'\n]*?)'? ?\(No such file or directory\)",
        "there is no file {0}; mend 'model', or put the file there",
    ),
    cause(
        r"invalid magic characters|failed to read key-value pairs|not within (?:the )?file bounds"
        r"|file is corrupted or incomplete|failed to read (?:tensor|header)",
        "the model file is not a whole GGUF file; download it again (a broken download is the usual cause)",
    ),
    cause(
        r"unknown model architecture: '([^']+)'",
        "this llama-server doesn't know the architecture {0}; update llama.cpp, or use another model",
    ),
    cause(
        r"allocating ([\d.]+ \w+) on device (\d+): cudaMalloc failed: out of memory",
        "device {1} ran out of memory: {0} more were wanted; offload fewer layers (--n-gpu-layers), take a smaller"
        " --ctx-size, or a smaller model",
    ),
    cause(
        r"cudaMalloc failed: out of memory|unable to allocate (?:\S+) buffer|failed to allocate buffer for kv cache"
        r"|failed to allocate compute|CUDA error: out of memory",
        "it ran out of memory; offload fewer layers (--n-gpu-layers), take a smaller --ctx-size, or a smaller model",
    ),
    cause(
        r"exactly one out metadata, path_model, and file must be defined|HTTPS is not supported",
        "this llama-server can't download models (it was built without HTTPS); download the file, and give its path",
    ),
    cause(
        r"status code (?:returned )?40[13]|HTTP (?:status )?40[13]",
        "Hugging Face refuses the download; accept the model's licence and give a token:"
        ' env: {{HF_TOKEN: "${{HF_TOKEN}}"}}',
    ),
)
