"""What a config file must keep to beyond the types of its values.

The rules look at the plain values, so that they speak up also where another part of the file is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from modelswap.spec import containers, hooks
from modelswap.spec.errors import Path, dotted
from modelswap.spec.tree import Tree

LONGEST_NAME: Final = 200
_SLEEPERS: Final = ("vllm", "sglang")
_NEEDS_MODEL: Final = {
    "vllm": "a Hugging Face id or a folder",
    "llamacpp": "a GGUF file or a Hugging Face id",
    "openvino": "a GGUF file or a folder",
    "sglang": "a Hugging Face id or a folder",
}


def check(tree: Tree) -> None:
    """Add a problem to ``tree`` for every rule its values break."""
    if not isinstance(tree.value, dict):
        return
    models = tree.value.get("models")
    if isinstance(models, dict):
        if not models:
            tree.add(
                ("models",), "names no model", "add one: models: {my-model: {engine: vllm, model: …}}", at_key=True
            )
        for name, model in models.items():
            path: Path = ("models", name)
            if isinstance(model, dict):
                _by_engine(tree, path, model)
                containers.check(tree, path, model)
                hooks.check(tree, path, model)
                _swaps(tree, path, model)
                _values(tree, path, model)
        _names(tree, models)
        containers.check_all(tree, models)
    _ports(tree)
    containers.check_docker(tree, tree.value.get("docker"))


def _by_engine(tree: Tree, path: Path, model: dict[str, Any]) -> None:
    engine = model.get("engine", "vllm")
    process = not any(model.get(key) is not None for key in containers.HOSTS)
    if engine == "custom":
        if process and model.get("command") is None:
            hint = 'e.g. command: [my-server, --listen, "127.0.0.1:{port}"]'
            tree.add(path, "engine 'custom' needs a 'command'", hint, at_key=True)
        if process and model.get("program") is not None:
            tree.add((*path, "program"), "not for engine 'custom'", "its 'command' says all", at_key=True)
    elif isinstance(engine, str) and engine in _NEEDS_MODEL:
        wanted = process or model.get("image") is not None
        if wanted and model.get("model") in (None, "") and (*path, "model") not in tree.unreadable:
            why = "" if "engine" in model else " (the engine when none is given)"
            tree.add(path, f"engine '{engine}'{why} needs a 'model'", f"say model: {_NEEDS_MODEL[engine]}", at_key=True)
        if model.get("command") is not None and wanted:
            hint = f"options go into 'args', another program into '{'program' if process else 'entrypoint'}'"
            tree.add((*path, "command"), f"only for engine 'custom', not '{engine}'", hint, at_key=True)
        if "ready" in model:
            tree.add((*path, "ready"), f"only for engine 'custom', not '{engine}'", "leave it out", at_key=True)
    for key in ("command", "program"):
        words = model.get(key)
        if isinstance(words, list) and (not words or words[0] == "") and (*path, key, 0) not in tree.unreadable:
            tree.add((*path, key), "names no program", f"e.g. {key}: [my-server]", at_key=True)


def _swaps(tree: Tree, path: Path, model: dict[str, Any]) -> None:
    engine = model.get("engine", "vllm")
    if model.get("sleep") == "on":
        if engine not in _SLEEPERS:
            tree.add((*path, "sleep"), f"engine '{engine}' has no sleep", "leave it out: it is stopped and started")
        elif model.get("device") == "none":
            tree.add((*path, "sleep"), "this model is never swapped out (device: none)", "leave it out")
    if model.get("pin") is True and model.get("device") == "none":
        tree.add((*path, "pin"), "this model is never swapped out (device: none)", "leave it out", at_key=True)
    if "idle" in model and model.get("ttl") is None and model.get("idle") != "keep":
        tree.add((*path, "idle"), "says what happens after 'ttl', which is not given", "e.g. ttl: 1800", at_key=True)


def _values(tree: Tree, path: Path, model: dict[str, Any]) -> None:
    key = model.get("api_key")
    if isinstance(key, str) and not (key.isascii() and key.isprintable()):
        hint = "check that it doesn't end in a newline"
        tree.add((*path, "api_key"), "holds characters that can't be sent in an HTTP header", hint)
    env = model.get("env")
    if isinstance(env, dict):
        for name in env:
            if not name or "=" in name or "\0" in name or not name.isprintable():
                tree.add((*path, "env", name), "not a name for an environment variable", at_key=True)


def _names(tree: Tree, models: dict[str, Any]) -> None:
    taken: dict[str, Path] = {}
    for path, name in sorted(_all_names(models), key=lambda item: len(item[0])):
        at_key = len(path) == 2
        if path in tree.unreadable:
            continue
        if fault := _fault(name):
            tree.add(path, f"not a name that requests can use: {fault}", at_key=at_key)
        elif name in taken:
            place = tree.values.get(taken[name]) if len(taken[name]) > 2 else tree.keys.get(taken[name])
            where = f" on line {place.line}" if place else ""
            message = f"the name '{name}' is taken already by {dotted(taken[name])}{where}"
            tree.add(path, message, "every name, alias and adapter must be the only one of its kind", at_key=at_key)
        else:
            taken[name] = path


def _all_names(models: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    for name, model in models.items():
        yield ("models", name), name
        if not isinstance(model, dict):
            continue
        for key in ("aliases", "adapters"):
            names = model.get(key)
            for index, other in enumerate(names if isinstance(names, list) else ()):
                if isinstance(other, str):
                    yield ("models", name, key, index), other


def _fault(name: str) -> str | None:
    if not name:
        return "it is empty"
    if len(name) > LONGEST_NAME:
        return f"it has {len(name)} characters, and {LONGEST_NAME} are the most"
    if any(character.isspace() for character in name):
        return "it holds a space"
    if not name.isprintable():
        return "it holds a character that can't be printed"
    if name.startswith("-"):
        return "it begins with '-'"
    return None


def _ports(tree: Tree) -> None:
    def address(section: str, port: int) -> tuple[Any, Any]:
        values = tree.value.get(section)
        values = values if isinstance(values, dict) else {}
        return values.get("host", "127.0.0.1"), values.get("port", port)

    gateway, orchestrator = address("gateway", 8080), address("orchestrator", 8888)
    if gateway == orchestrator and gateway[1] != 0:
        path = ("orchestrator", "port") if ("orchestrator", "port") in tree.values else ("gateway", "port")
        tree.add(path, "gateway and orchestrator can't share one port", "give one of them another")
