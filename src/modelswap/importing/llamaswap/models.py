"""One model of llama-swap's: its command line as an engine of ours, a container, or any command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from modelswap.importing import containers, secrets, servers
from modelswap.importing.containers import Context
from modelswap.importing.llamaswap import dockerrun
from modelswap.importing.llamaswap.dockerrun import DockerRun, Existing
from modelswap.importing.llamaswap.macros import Macros, without_comments
from modelswap.importing.result import CannotImport, Kind
from modelswap.importing.sections import Section
from modelswap.importing.servers import Server
from modelswap.importing.words import Options, program, split

_HERE: Final = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0", ""})
_PORT: Final = "${PORT}"


@dataclass(slots=True)
class Taken:
    """One model: what our config says of it, and who serves what for the summary."""

    model: dict[str, Any]
    title: str
    loads: str
    host: str


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where llama-swap sends requests to: ``port`` is None where it picks one itself."""

    host: str
    port: int | None

    @property
    def here(self) -> bool:
        """Whether that is this machine."""
        return self.host in _HERE


def take(name: str, section: Section, macros: Macros, context: Context) -> Taken | None:
    """Return the model ``name``; None if nothing of ours can serve it (which is noted). Raises `CannotImport`."""
    command = section.text("cmd")
    if not command:
        raise CannotImport(
            f"{section.key('cmd')}: is missing", "every model of llama-swap's has one; is it its config?"
        )
    words = _words(macros.command(command), section.key("cmd"))
    env = dict(_pair(macros.text(each)) for each in section.texts("env"))
    if words and program(words[0]) == "env":
        words = words[1:]
        while words and re.match(r"[A-Za-z_]\w*=", words[0]):
            env |= [_pair(words.pop(0))]
    if not words:
        raise CannotImport(f"{section.key('cmd')}: says no command", "mend it, then import")
    proxy = _proxy(macros.text(section.text("proxy") or f"http://localhost:{_PORT}"), section.key("proxy"), context)
    ready = macros.text(section.text("checkEndpoint") or "/health")
    container = dockerrun.parse(name, words)
    if isinstance(container, Existing):
        return _existing(container, proxy, ready, context)
    if isinstance(container, DockerRun):
        return _run(container, env, ready, context)
    if not proxy.here:
        context.note(Kind.LOST, f"is served at {proxy.host}; modelswap reaches only what it starts itself")
        return None
    return _process(words, env, proxy, ready, context)


def _words(text: str, where: str) -> list[str]:
    joined = "\n".join(re.sub(r"\\\s*$", " ", line) for line in without_comments(text).splitlines())
    if re.search(r"(?:^|[\s\"'])[A-Za-z]:\\", joined):
        # Windows: a backslash is part of a path there, not a quote.
        joined = joined.replace("\\", "\\\\")
    return split(joined, where)


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _proxy(url: str, key: str, context: Context) -> Proxy:
    plain = url.replace(_PORT, "0")
    try:
        parts = urlsplit(plain if "://" in plain else f"http://{plain}")
        port = parts.port
    except ValueError:
        raise CannotImport(f"{key}: not a URL", "mend it, then import") from None
    if parts.path not in ("", "/"):
        text = f"requests keep their own paths; {parts.path} is not put before them"
        context.imported.note(Kind.LOST, key, text)
    return Proxy(parts.hostname or "", port or None)


def _process(words: list[str], env: dict[str, str], proxy: Proxy, ready: str, context: Context) -> Taken:
    server = servers.recognise("", [], words, env)
    if server and server.facts.engine != "custom" and server.model and not server.in_shell and not server.many:
        model = _engine(server, env, ready, context)
    else:
        model = _custom(words, env, proxy, ready, context)
        if server is not None and server.model and server.kind != "tgi":
            model["model"] = containers.served_name(server)
        if server is not None and server.key:
            model["api_key"] = context.vault.reference(server.facts.key, server.key, context.key)
    if _without_gpu(server, env):
        model["device"] = "none"
        context.note(Kind.CHANGED, "uses no GPU: runs beside the others, and is never swapped out (device: none)")
    if server is None:
        return Taken(model, "custom", " ".join(model["command"]), "process")
    return Taken(model, server.facts.title, server.model or "", "process")


def _engine(server: Server, env: dict[str, str], ready: str, context: Context) -> dict[str, Any]:
    facts = server.facts
    model: dict[str, Any] = {"engine": facts.engine, "model": server.model}
    path = server.model or ""
    if server.kind == "llamacpp" and path.endswith(".gguf") and not re.match(r"/|~|\$\{|[A-Za-z]:", path):
        text = f"{path} is looked for where modelswap is started; give the whole path, or say cwd"
        context.note(Kind.ACTION, text, "cmd")
    if server.program not in (("llama-server",), ("vllm", "serve"), ("sglang", "serve")):
        model["program"] = list(server.program)
    owner = context.key.rpartition(".")[2]
    model["args"] = containers.hidden(list(server.args), owner, facts.key, context)
    model["env"] = _secretless({key: value for key, value in env.items() if key not in server.env}, context)
    model["adapters"] = list(server.adapters)
    if containers.ranks(server):
        model["canary"] = "none"
    if server.key:
        model["api_key"] = _key(server, owner, context)
    if ready not in ("/health", "/v1/models", "/", "none"):
        context.note(Kind.CHANGED, f"modelswap asks {facts.title} in its own way whether it is ready", "checkEndpoint")
    return model


def _key(server: Server, owner: str, context: Context) -> str:
    reference = context.vault.reference(server.facts.key, server.key or "", owner)
    if reference != server.key:
        name = secrets.references(reference)[0][0]
        context.note(Kind.ACTION, f"put the key into the environment as {name}; it is not copied", "cmd")
    return reference


def _custom(words: list[str], env: dict[str, str], proxy: Proxy, ready: str, context: Context) -> dict[str, Any]:
    owner = context.key.rpartition(".")[2]
    placed = [_placed(word, proxy.port) for word in words]
    for option in ("--host", "--hostname", "--listen-host"):
        if (host := Options(placed).peek(option)) in ("0.0.0.0", "127.0.0.1", "localhost"):
            placed = [
                "{host}" if word == host else word.replace(f"{option}={host}", f"{option}={{host}}") for word in placed
            ]
    values = _secretless({key: _placed(value, proxy.port) for key, value in env.items()}, context)
    if not any("{port}" in each for each in (*placed, *values.values())):
        text = "put {port} into its command where it is told its port, or modelswap can't find it"
        context.note(Kind.ACTION, text, "cmd")
    model = {"engine": "custom", "command": containers.hidden(placed, owner, "API_KEY", context), "env": values}
    return model | _ready(ready, context)


def _placed(word: str, port: int | None) -> str:
    word = word.replace(_PORT, "{port}")
    if port is None:
        return word
    return re.sub(rf"(?:(?<=^)|(?<=[:=])){port}(?!\d)", "{port}", word)


def _ready(ready: str, context: Context) -> dict[str, Any]:
    if ready == "none":
        text = "modelswap always asks whether an engine is ready; /v1/models must answer 200"
        context.note(Kind.CHANGED, text, "checkEndpoint")
        return {"ready": "/v1/models"}
    return {} if ready == "/health" else {"ready": ready}


def _secretless(env: dict[str, str], context: Context) -> dict[str, str]:
    result: dict[str, str] = {}
    for name, value in env.items():
        if secrets.is_secret(name, value) and not secrets.references(value):
            result[name] = context.vault.reference(name, value, context.key.rpartition(".")[2])
            given = secrets.references(result[name])[0][0]
            context.note(Kind.ACTION, f"put {name} into the environment as {given}; it is not copied", "env", name)
        else:
            result[name] = containers.scrubbed(value, context.key.rpartition(".")[2], "API_KEY", context, "env")
    return result


def _without_gpu(server: Server | None, env: dict[str, str]) -> bool:
    if env.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return True
    if server is None:
        return False
    options = Options(server.args)
    if server.kind == "llamacpp":
        return (
            options.peek("-ngl", "--gpu-layers", "--n-gpu-layers") == "0" or options.peek("--device", "-dev") == "none"
        )
    return server.kind in ("vllm", "sglang") and options.peek("--device") == "cpu"


def _run(run: DockerRun, env: dict[str, str], ready: str, context: Context) -> Taken:
    service = run.service
    for option, why in service.lost:
        context.note(Kind.LOST, f"{option}: {why}", "cmd")
    for file in run.env_files:
        context.note(Kind.ACTION, f"--env-file {file}: say its variables in env", "cmd")
    if run.tool != "docker":
        context.note(Kind.CHANGED, f"modelswap speaks to Docker; for {run.tool} say docker.host, its socket", "cmd")
    # The variables of the `docker` command itself reach the container only where it passes them on.
    service.env = {key: env.get(key, value) if value is None else value for key, value in service.env.items()}
    if unused := sorted(set(env) - set(service.env)):
        context.note(Kind.LOST, f"{', '.join(unused)}: was for the {run.tool} command, not for the container", "env")
    known = {key: value for key, value in service.env.items() if value}
    server = servers.recognise(service.image, service.entrypoint or [], service.command, known)
    if server is None:
        model = containers.managed(service, Server(kind="other"), context) | _ready(ready, context)
        return Taken(model, "custom", "", f"image {service.image}")
    model = containers.managed(service, server, context)
    return Taken(model, server.facts.title, server.model or "", f"image {service.image}")


def _existing(existing: Existing, proxy: Proxy, ready: str, context: Context) -> Taken:
    where = {"compose_service" if existing.compose else "container": existing.name}
    model: dict[str, Any] = {"engine": "custom", **where, "ready": "/health"} | _ready(ready, context)
    if proxy.port is not None and not proxy.here:
        model["port"] = proxy.port
    else:
        context.note(Kind.ACTION, "say port: where it listens inside its container (8000 otherwise)", "cmd")
    context.note(
        Kind.ACTION, "say engine: vllm, llamacpp or sglang, if it is one, and model: the name it serves", "cmd"
    )
    what = "compose service" if existing.compose else "container"
    return Taken(model, "custom", "", f"{what} {existing.name}")


def stop(model: dict[str, Any], text: str, context: Context) -> None:
    """Have a ``cmdStop`` run before its model is stopped, unless modelswap does the same by itself."""
    words = _words(text, f"{context.key}.cmdStop")
    if not words or _stops(text, words):
        return
    if "${PID}" in text or _PORT in text:
        lost = "it is told neither PID nor port: the engine gets SIGTERM, and SIGKILL after stop_grace"
        context.note(Kind.LOST, lost, "cmdStop")
        return
    command = containers.hidden(words, context.key.rpartition(".")[2], "API_KEY", context)
    model["hooks"] = {"before_unload": [{"command": command}]}
    changed = "runs as a hook (before_unload); then what is left gets SIGTERM, and SIGKILL after stop_grace"
    context.note(Kind.CHANGED, changed, "cmdStop")


def _stops(command: str, words: Sequence[str]) -> bool:
    """Return whether it does no more than modelswap does by itself: a signal, or stopping a container."""
    tool = program(words[0])
    if tool in ("kill", "taskkill"):
        return "${PID}" in command
    return tool in ("docker", "podman", "docker-compose") and not {"stop", "kill", "rm", "down"}.isdisjoint(words)
