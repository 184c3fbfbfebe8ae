"""Which LLM server a command line or an image is, and what its options say.

Facts about programs that have an engine of their own here are in `engines.vllm`, `engines.llamacpp` and
`engines.sglang`. The others:

- TGI (``text-generation-launcher``): ``--model-id`` or ``MODEL_ID``, ``--hostname``, ``--port`` or ``PORT`` (80 in its
  image), answers to any model name.
- Ollama (``ollama serve``): port 11434, one server for many models; ``/api/version`` answers once it is up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

import msgspec

from modelswap.importing.words import Options, program, script

Kind = Literal["vllm", "llamacpp", "sglang", "tgi", "ollama", "other"]


class Facts(msgspec.Struct, frozen=True):
    """What holds for every server of a kind."""

    title: str
    engine: str
    port: int
    ready: str = "/health"
    key: str = "API_KEY"


FACTS: Final[dict[str, Facts]] = {
    "vllm": Facts("vLLM", "vllm", 8000, key="VLLM_API_KEY"),
    "llamacpp": Facts("llama.cpp", "llamacpp", 8080, key="LLAMA_API_KEY"),
    "sglang": Facts("SGLang", "sglang", 30000, key="SGLANG_API_KEY"),
    "tgi": Facts("TGI", "custom", 80, key="TGI_API_KEY"),
    "other": Facts("another server", "custom", 8000),
    "ollama": Facts("Ollama", "custom", 11434, ready="/api/version", key="OLLAMA_API_KEY"),
}


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """One server as its command line and environment describe it.

    ``program`` are the words before its options, empty where the image says them. ``args`` are the options that
    modelswap doesn't set itself, ``words`` all of them. ``env`` names the variables that said something of this.
    ``in_shell``: it was found inside a shell's script. ``many``: it serves several models and loads them by itself.
    """

    kind: Kind
    program: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    model: str | None = None
    names: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    port: int | None = None
    key: str | None = None
    env: frozenset[str] = frozenset()
    in_shell: bool = False
    many: bool = False

    @property
    def facts(self) -> Facts:
        """What holds for every server of its kind."""
        return FACTS[self.kind]


def recognise(image: str, entrypoint: Sequence[str], command: Sequence[str], env: Mapping[str, str]) -> Server | None:
    """Return the server that a command line starts, or else an image with ``command`` for it; None if unknown."""
    words = [*entrypoint, *command]
    commands = script(words)
    for each in commands if commands is not None else [words]:
        if found := _by_words(each):
            return _read(*found, env, in_shell=commands is not None)
    kind = by_image(image)
    if kind is None:
        return None
    if commands is not None:
        return _read(kind, [], [], env, in_shell=True)
    if kind == "vllm" and not entrypoint and command[:1] == ["serve"]:
        return _read(kind, ["vllm", "serve"], list(command[1:]), env)
    return _read(kind, list(entrypoint), list(command), env)


def by_image(image: str) -> Kind | None:
    """Return what an image called ``image`` serves with; None if that is unknown."""
    path, tag = split_image(image)
    repository = path.rpartition("/")[2]
    if re.search(r"router|proxy|gateway|webui|exporter|production-stack", path):
        return None
    if "sglang" in path:
        return "sglang"
    if repository == "text-generation-inference":
        return "tgi"
    if repository == "ollama":
        return "ollama"
    if "llama-server" in repository or (
        re.fullmatch(r"(?:ik[._-])?llama[._-]?cpp(?!.*python).*", repository)
        and re.match(r"server|full|\Z|latest", tag)
    ):
        return "llamacpp"
    return "vllm" if re.search(r"(?:^|[-_])vllm(?:$|[-_])", repository) else None


def split_image(image: str) -> tuple[str, str]:
    """Return an image's path and tag, without registry port and digest."""
    name = image.partition("@")[0].lower()
    head, colon, tag = name.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (name, "")


def _by_words(words: list[str]) -> tuple[Kind, list[str], list[str]] | None:
    for index, word in enumerate(words):
        after = words[index + 1] if index + 1 < len(words) else ""
        name = program(word)
        kind: Kind | None = None
        size = 2
        if (name == "vllm" and after == "serve") or (word == "-m" and after == "vllm.entrypoints.openai.api_server"):
            kind = "vllm"
        elif (name == "sglang" and after == "serve") or (word == "-m" and after == "sglang.launch_server"):
            kind = "sglang"
        elif name == "ollama" and after == "serve":
            kind = "ollama"
        elif name.startswith("llama-server"):
            kind, size = "llamacpp", 1
        elif name == "text-generation-launcher":
            kind, size = "tgi", 1
        if kind is not None:
            return kind, words[: index + size], words[index + size :]
    return None


def _read(kind: Kind, before: list[str], words: list[str], env: Mapping[str, str], *, in_shell: bool = False) -> Server:
    read: Callable[[Options, _Env], Server]
    read = {"vllm": _vllm, "llamacpp": _llamacpp, "sglang": _sglang, "tgi": _tgi, "ollama": _ollama}[kind]
    server = read(Options(words), _Env(env))
    return msgspec.structs.replace(server, program=tuple(before), words=tuple(words), in_shell=in_shell)


class _Env:
    """An environment that knows which variables were asked for and found."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values
        self.found: set[str] = set()

    def value(self, *names: str) -> str | None:
        for name in names:
            if value := self._values.get(name):
                self.found.add(name)
                return value
        return None


def _vllm(options: Options, env: _Env) -> Server:
    model = options.first() or options.value("--model")
    options.value("--model")
    names = [each for word in options.values("--served-model-name") for each in word.split(",")]
    port = _port(options.value("--port"))
    options.value("--host")
    keys = options.values("--api-key")
    key = keys[0] if keys else env.value("VLLM_API_KEY")
    return Server(
        kind="vllm",
        model=_known(model),
        names=_names(names),
        adapters=_adapters(options),
        port=port,
        key=key,
        args=tuple(options.words),
        env=frozenset(env.found | {"VLLM_API_KEY"}),
    )


def _llamacpp(options: Options, env: _Env) -> Server:
    options.flag("--server")
    path = options.value("-m", "--model")
    repository = options.value("-hf", "-hfr", "--hf-repo")
    model = path or repository or env.value("LLAMA_ARG_MODEL") or env.value("LLAMA_ARG_HF_REPO")
    alias = options.value("-a", "--alias") or env.value("LLAMA_ARG_ALIAS") or ""
    port = _port(options.value("--port") or env.value("LLAMA_ARG_PORT"))
    options.value("--host")
    key = options.value("--api-key") or env.value("LLAMA_API_KEY")
    if path and repository:
        options.words += ["-hf", repository]
    router = model is None and options.has("--models-dir", "--models-preset", "--models-max")
    return Server(
        kind="llamacpp",
        model=_known(model),
        names=_names(alias.split(",")),
        port=port,
        key=key.partition(",")[0] if key else None,
        args=tuple(options.words),
        env=frozenset(env.found | {"LLAMA_ARG_HOST", "LLAMA_ARG_PORT", "LLAMA_API_KEY"}),
        many=router,
    )


def _sglang(options: Options, env: _Env) -> Server:
    model = options.first() if options.words[:1] and "/" in options.words[0] else None
    model = options.value("--model-path", "--model") or model
    options.value("--host")
    names = _names([options.value("--served-model-name") or ""])
    port = _port(options.value("--port"))
    # Stays: it can't be told its key in any other way.
    key = options.peek("--api-key")
    return Server(
        kind="sglang",
        model=_known(model),
        names=names,
        port=port,
        key=key,
        args=tuple(options.words),
        env=frozenset(env.found),
    )


def _tgi(options: Options, env: _Env) -> Server:
    return Server(
        kind="tgi",
        model=_known(options.value("--model-id") or env.value("MODEL_ID")),
        port=_port(options.value("--port", "-p") or env.value("PORT")),
        key=options.value("--api-key") or env.value("API_KEY"),
        env=frozenset(env.found),
    )


def _ollama(options: Options, env: _Env) -> Server:
    host = env.value("OLLAMA_HOST") or ""
    return Server(kind="ollama", port=_port(host.rpartition(":")[2]), env=frozenset(env.found), many=True)


def _names(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for each in names if _known(name := each.strip())))


def _adapters(options: Options) -> tuple[str, ...]:
    """Return the names in ``--lora-modules``: ``name=path``, or JSON with a ``name``."""
    modules = Options(options.words).values("--lora-modules")
    json = r'\{.*"name"\s*:\s*"([^"]+)".*\}'
    return _names([found[1] if (found := re.fullmatch(json, each)) else each.partition("=")[0] for each in modules])


def _known(text: str | None) -> str | None:
    """Return ``text``, unless a shell would have had to fill something in."""
    return None if not text or re.search(r"(?<!\$)\$(?!\{)", text.replace("$${", "$")) else text


def _port(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and 0 < int(text) < 65536 else None
