"""A server in a container, as a model of ours: adopted as it is, or managed from its image."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Final

from modelswap.importing import secrets
from modelswap.importing.result import Imported, Kind
from modelswap.importing.secrets import Vault
from modelswap.importing.servers import Server, split_image
from modelswap.importing.service import Service
from modelswap.importing.words import Options

_GPU_VARIABLES: Final = frozenset({"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"})
_SECRET_OPTIONS: Final = re.compile(
    r"--(?:api-key|hf-token|huggingface-token|token|admin-api-key)(?:=(?P<value>.*))?|-hft"
)
_SLOTS: Final = {"vllm": "--max-num-seqs", "sglang": "--max-running-requests"}
SHARES: Final = {"vllm": ("--gpu-memory-utilization", 0.85), "sglang": ("--mem-fraction-static", 0.75)}
"""The option that says a share of the GPU, and how much of it is no reason to speak about it."""
_SLEEP: Final = {
    "vllm": ("--enable-sleep-mode",),
    "sglang": ("--enable-memory-saver", "--enable-weights-cpu-backup"),
}
_ON_GPU: Final = re.compile(r"cuda|rocm|vulkan|intel|musa|sycl|gpu|hip|openvino")


@dataclass(slots=True)
class Context:
    """What a conversion writes to: the outcome, and the names of secrets. ``key`` is the service's key.

    ``command_key`` and ``env_key`` are the keys within it that say its command line and its environment.
    """

    imported: Imported
    vault: Vault = field(default_factory=Vault)
    key: str = ""
    command_key: str = "command"
    env_key: str = "environment"

    def note(self, kind: Kind, text: str, *parts: str) -> None:
        """Note something about a key of the service."""
        self.imported.note(kind, ".".join(part for part in (self.key, *parts) if part), text)


def adopted(service: Service, server: Server, context: Context) -> dict[str, Any]:
    """Return the model for a container that exists; who it is (``compose_service``, ``container``) the caller adds."""
    facts = server.facts
    model: dict[str, Any] = {"engine": facts.engine}
    if (name := served_name(server)) is not None:
        model["model"] = name
    elif not server.many and server.kind != "tgi":
        context.note(Kind.ACTION, "say model: the name that it serves (its /v1/models tells)", context.command_key)
    port = inner_port(service, server)
    if facts.engine == "custom" or port != facts.port:
        model["port"] = port
    if facts.engine == "custom":
        model["ready"] = facts.ready
    _tell(model, server, service, context)
    model["adapters"] = list(server.adapters)
    _finish(model, service, server, context)
    return model


def _tell(model: dict[str, Any], server: Server, service: Service, context: Context) -> None:
    """Say of somebody else's container what modelswap would otherwise read in the engine's arguments."""
    options = Options(server.args)
    if server.kind in _SLOTS and (slots := options.peek(_SLOTS[server.kind])) and slots.isdigit():
        model["concurrency"] = int(slots)
    if (canary := _canary(server, service)) is not None:
        model["canary"] = canary
    if server.kind in SHARES:
        _share(options, *SHARES[server.kind], context)
    develops = server.kind == "sglang" or service.env.get("VLLM_SERVER_DEV_MODE") in ("1", "true", "True")
    if (
        server.kind in _SLEEP
        and develops
        and all(options.has(flag) for flag in _SLEEP[server.kind])
        and (not without_gpu(service, server))
    ):
        model["sleep"] = "on"


def _canary(server: Server, service: Service | None = None) -> str | None:
    """Return the request that its arguments and its environment say it can answer; None where it makes text."""
    options = Options(server.args)

    def told(variable: str) -> bool:
        value = service.env.get(variable) if service is not None else None
        return value is not None and value.lower() in ("1", "true", "on", "enabled")

    match server.kind:
        case "vllm" if ranks(server):
            return "none"
        case "vllm" if options.peek("--runner") == "pooling" or options.peek("--task") in ("embed", "embedding"):
            return "embedding"
        case "llamacpp" if options.has("--rerank", "--reranking") or told("LLAMA_ARG_RERANKING"):
            return "none"
        case "llamacpp" if options.has("--embedding", "--embeddings") or told("LLAMA_ARG_EMBEDDINGS"):
            return "embedding"
        case "sglang" if options.has("--is-embedding"):
            return "embedding"
    return None


def ranks(server: Server) -> bool:
    """Return whether its arguments make vLLM serve a reranker or a classifier, which answers none of our canaries."""
    options = Options(server.args)
    said = {options.peek("--task"), options.peek("--convert")}
    return server.kind == "vllm" and not said.isdisjoint({"classify", "score", "reward"})


def _share(options: Options, option: str, usual: float, context: Context) -> None:
    share = options.peek(option)
    if share and re.fullmatch(r"0?\.\d+", share) and float(share) < usual:
        percent = f"{float(share):.0%}"
        text = f"it takes {percent} of the GPU; say how much that is, e.g. memory: 20GiB, or all of it must be free"
        context.note(Kind.ACTION, text, context.command_key)


def managed(service: Service, server: Server, context: Context) -> dict[str, Any]:
    """Return the model for a container that modelswap makes from the service's image."""
    facts = server.facts
    plain = facts.engine != "custom" and server.model is not None and not server.in_shell and not server.many
    model: dict[str, Any] = {"engine": facts.engine if plain else "custom"}
    if plain:
        model["model"] = server.model
    elif (name := served_name(server)) is not None:
        model["model"] = name
    model["image"] = service.image
    if plain:
        if server.program:
            model["entrypoint"] = list(server.program)
        model["args"] = hidden(list(server.args), service.name, server.facts.key, context)
        model["adapters"] = list(server.adapters)
        if ranks(server):
            model["canary"] = "none"
        elif server.kind == "llamacpp" and (canary := _canary(server, service)) and _canary(server) is None:
            model["canary"] = canary
        _own_options(server, context)
    else:
        _as_it_was(model, service, server, context)
    # What the engine is told by other means; one that is started as it was needs all of it.
    model["env"] = environment(service, server, context, without=server.env if plain else frozenset())
    model["volumes"] = [f"{each.source}:{each.target}{':ro' * each.read_only}" for each in service.volumes]
    model |= _gpus(service)
    if service.chosen is not None and service.gpus == "all":
        model["gpus"] = service.chosen
        model["env"].pop("CUDA_VISIBLE_DEVICES")
    for key in ("devices", "shm_size", "ipc", "ulimits", "network", "extra_hosts", "pull"):
        model[key] = getattr(service, key)
    if service.folder is not None:
        model["cwd"] = service.folder
    _finish(model, service, server, context)
    return {key: value for key, value in model.items() if value not in (None, [], {})}


def _own_options(server: Server, context: Context) -> None:
    words = Options(server.words)
    for option in ("--host", "--port", "--served-model-name", "--alias", "-a"):
        if words.peek(option):
            context.note(Kind.CHANGED, "modelswap sets host, port and names itself", context.command_key)


def _as_it_was(model: dict[str, Any], service: Service, server: Server, context: Context) -> None:
    """Start it just as it was; our engine's knowledge of the program is lost."""
    facts = server.facts
    command = hidden(list(service.command), service.name, facts.key, context)
    if service.entrypoint:
        model["entrypoint"] = hidden(list(service.entrypoint), service.name, facts.key, context)
    if server.kind == "ollama" and not command and not service.entrypoint:
        command = ["serve"]
    if server.kind in ("sglang", "tgi") and not server.in_shell:
        command = _placed(command, "--port", "{port}")
        command = _placed(command, "--hostname" if server.kind == "tgi" else "--host", "{host}")
    if command:
        model["command"] = command
    model["port"] = inner_port(service, server)
    model["ready"] = facts.ready
    if facts.engine != "custom":
        why = (
            "a shell starts it" if server.in_shell else "it serves many models" if server.many else "it names no model"
        )
        text = f"{why}, so it is carried over as it is (engine: custom), without what modelswap knows of {facts.title}"
        context.note(Kind.CHANGED, text, context.command_key)


def _placed(words: list[str], option: str, place: str) -> list[str]:
    result = list(words)
    for index, word in enumerate(words):
        if word == option and index + 1 < len(words):
            result[index + 1] = place
        elif word.startswith(f"{option}="):
            result[index] = f"{option}={place}"
    return result


def _finish(model: dict[str, Any], service: Service, server: Server, context: Context) -> None:
    if server.key:
        literal = not secrets.references(server.key)
        model["api_key"] = context.vault.reference(server.facts.key, server.key, service.name)
        if literal:
            name = secrets.references(model["api_key"])[0][0]
            part = context.env_key if server.key in service.env.values() else context.command_key
            context.note(Kind.ACTION, f"put the key into the environment as {name}; it is not copied", part)
    if service.grace is not None:
        model["stop_grace"] = int(service.grace) if service.grace.is_integer() else service.grace
    if without_gpu(service, server):
        model["device"] = "none"
        context.note(Kind.CHANGED, "uses no GPU: runs beside the others, and is never swapped out (device: none)")
    elif service.gpus is None and not service.devices:
        context.note(Kind.CHANGED, "asks for no GPU; if it uses none, say device: none, and it runs beside the others")


def served_name(server: Server) -> str | None:
    """Return what the server calls its model; None if nobody can tell, or if it answers to any name."""
    if server.many:
        return None
    if server.names:
        return server.names[0]
    if server.model and server.kind == "llamacpp" and server.model.endswith(".gguf"):
        return PurePosixPath(server.model).name
    return server.model


def inner_port(service: Service, server: Server) -> int:
    """Return where the server listens in its container."""
    if server.port is not None:
        return server.port
    usual = server.facts.port
    targets = [port.target for port in service.ports] + service.exposed
    # Where it listens that an image or a shell starts is for them to know.
    told = server.facts.engine != "custom" and server.model is not None and not server.in_shell
    return usual if usual in targets or not targets or told else targets[0]


def without_gpu(service: Service, server: Server) -> bool:
    """Return whether it can be told that the server uses no GPU."""
    if service.sees_no_gpu:
        return True
    if service.gpus is not None or service.devices:
        return False
    options = Options(server.args)
    path, tag = split_image(service.image)
    if server.kind == "llamacpp":
        layers = options.peek("-ngl", "--gpu-layers", "--n-gpu-layers") or service.env.get("LLAMA_ARG_N_GPU_LAYERS")
        return layers == "0" or (tag.startswith("server") and not _ON_GPU.search(tag))
    if server.kind == "sglang":
        return options.peek("--device") == "cpu"
    return server.kind == "vllm" and (options.peek("--device") == "cpu" or "cpu" in path.rpartition("/")[2] + tag)


def hidden(words: list[str], owner: str, key: str, context: Context) -> list[str]:
    """Return a command line whose secrets are references; an API key is in the variable ``key``."""
    result = list(words)
    for index, word in enumerate(words):
        match = _SECRET_OPTIONS.fullmatch(word)
        value = match["value"] if match else None
        name = "HF_TOKEN" if (match and "hf" in word) or "huggingface" in word else key
        if match and value is None and index + 1 < len(words):
            result[index + 1] = context.vault.reference(name, words[index + 1], owner)
        elif match and value:
            result[index] = f"{word.partition('=')[0]}={context.vault.reference(name, value, owner)}"
        elif result[index] == word and secrets.looks_secret(word):
            result[index] = context.vault.reference("SECRET", word, owner)
        elif result[index] == word and re.search(r"\s", word):
            result[index] = scrubbed(word, owner, key, context)
        if result != words:
            words = list(result)
    return result


def scrubbed(text: str, owner: str, key: str, context: Context, part: str = "") -> str:
    """Return a script, or options in one text, with references for the secrets in it, and note those."""
    result = context.vault.scrubbed(text, key, owner)
    for name, _ in secrets.references(result):
        if f"${{{name}}}" not in text:
            said = f"put its secret into the environment as {name}; it is not copied"
            context.note(Kind.ACTION, said, part or context.command_key)
    return result


def environment(
    service: Service, server: Server, context: Context, without: frozenset[str] = frozenset()
) -> dict[str, str]:
    """Return the container's environment but for ``without`` and what says GPUs; secrets are references."""
    result: dict[str, str] = {}
    for name, value in service.env.items():
        if name in without or name in _GPU_VARIABLES:
            continue
        if value is None:
            result[name] = f"${{{name}:-}}"
        elif secrets.is_secret(name, value) and not secrets.references(value):
            called = server.facts.key if value == server.key else name
            result[name] = context.vault.reference(called, value, service.name)
            given = secrets.references(result[name])[0][0]
            where = (context.env_key, name) if context.env_key == "environment" else (context.env_key,)
            context.note(Kind.ACTION, f"put {name} into the environment as {given}; it is not copied", *where)
        else:
            result[name] = scrubbed(value, service.name, server.facts.key, context, context.env_key)
    return result


def _gpus(service: Service) -> dict[str, Any]:
    match service.gpus:
        case None:
            return {}
        case "all":
            return {"gpus": "all"}
        case int(count):
            return {} if count == 1 else {"gpus": [str(index) for index in range(count)]}
    return {"gpus": list(service.gpus or [])}
