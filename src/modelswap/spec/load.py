"""From a YAML file to a `Config`, or to all that is wrong with it at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from modelswap.spec import rules, shape, tree
from modelswap.spec.config import Config
from modelswap.spec.errors import ConfigError, Path, Problem, nearest

_EXAMPLE: Final = "a commented one to start from: python -m modelswap.spec.example > {file}"


def load(path: FilePath, env: Mapping[str, str] = os.environ) -> Config:
    """Read the config file at ``path``, with ``${NAME}`` taken from ``env``; raises `ConfigError`."""
    file = str(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([Problem(file, None, None, "", "no such file", _EXAMPLE.format(file=file))]) from None
    except IsADirectoryError:
        raise ConfigError([Problem(file, None, None, "", "a folder, not a file", "name the file in it")]) from None
    except UnicodeDecodeError as error:
        message = f"not UTF-8 (byte {error.start})"
        raise ConfigError([Problem(file, None, None, "", message, "save it as UTF-8 text")]) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError([Problem(file, None, None, "", f"can't be read: {reason}")]) from None
    return loads(text, env, file)


def loads(text: str, env: Mapping[str, str] = os.environ, source: str = "modelswap.yaml") -> Config:
    """Read the config in ``text``; ``source`` names it in errors. Raises `ConfigError`."""
    found = tree.read(text, env, source)
    if found.empty:
        found.problems.append(Problem(source, None, None, "", "empty", _EXAMPLE.format(file=source)))
    if found.problems and found.value is None:
        raise ConfigError(found.problems)
    config = None
    try:
        config = Config.model_validate(found.value)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=True):
            _explain(found, detail)
    rules.check(found)
    if found.problems or config is None:
        raise ConfigError(found.problems)
    return config


def _explain(found: tree.Tree, detail: ErrorDetails) -> None:
    path = _written_path(found, detail["loc"])
    if any(path[:length] in found.unreadable for length in range(len(path) + 1)):
        return
    kind, context = detail["type"], detail.get("ctx", {})
    value = detail["input"]
    if shape.also_lists(path):
        if kind == "literal_error" and not isinstance(value, list):
            _word_or_list(found, path, value)
    elif kind == "extra_forbidden":
        _unknown_key(found, path)
    elif kind == "missing":
        found.add(path, "this key is missing", "see python -m modelswap.spec.example" if path == ("models",) else None)
    elif kind == "literal_error" and isinstance(value, str):
        allowed = shape.choices(path)
        close = nearest(value, allowed)
        hint = f"did you mean '{close}'?" if close else None
        found.add(path, f"wants one of {', '.join(allowed)}, found {_found(found, path, value)}", hint)
    elif kind == "value_error":
        found.add(path, str(context.get("error", detail["msg"])))
    elif kind in _LIMITS:
        found.add(path, f"{_LIMITS[kind](context)}, found {_found(found, path, value)}")
    else:
        _wrong_type(found, path, kind, value)


def _word_or_list(found: tree.Tree, path: Path, value: Any) -> None:
    words = shape.choices(path)
    close = nearest(value, words) if isinstance(value, str) else None
    hint = f"did you mean '{close}'?" if close else "write a list as [first, second]"
    found.add(path, f"wants one of {', '.join(words)}, or a list, found {_found(found, path, value)}", hint)


def _unknown_key(found: tree.Tree, path: Path) -> None:
    known = shape.keys(path[:-1])
    close = nearest(str(path[-1]), known)
    hint = f"did you mean '{close}'?" if close else f"the keys here are {', '.join(known)}"
    found.add(path, "unknown key", hint, at_key=True)


def _wrong_type(found: tree.Tree, path: Path, kind: str, value: Any) -> None:
    wanted = _WANTED.get(kind, "another value")
    if kind == "literal_error":
        wanted = f"one of {', '.join(shape.choices(path))}"
    hint = None
    if value is None:
        hint = "give a value, or leave the key out"
    elif kind == "string_type" and isinstance(value, (bool, int, float)):
        hint = "put it in quotes"
    elif kind == "list_type" and isinstance(value, str):
        hint = "write it as a list: [first, second]"
    elif kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        hint = "write it without quotes" if path not in found.replaced else "see the variable it comes from"
    found.add(path, f"wants {wanted}, found {_found(found, path, value)}", hint)


_WANTED: Final[dict[str, str]] = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
    "path_type": "a path",
    "byte_size": "a size such as 12GiB, 500MB or a number of bytes",
    "byte_size_unit": "a size such as 12GiB, 500MB or a number of bytes",
    "finite_number": "a finite number",
}

_LIMITS: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "greater_than": lambda context: f"must be more than {context['gt']:g}",
    "greater_than_equal": lambda context: f"must be at least {context['ge']:g}",
    "less_than": lambda context: f"must be less than {context['lt']:g}",
    "less_than_equal": lambda context: f"must be at most {context['le']:g}",
    "string_pattern_mismatch": lambda context: (
        "must begin with '/'" if context["pattern"] == "^/" else f"must match {context['pattern']}"
    ),
}


def _found(found: tree.Tree, path: Path, value: Any) -> str:
    """Describe ``value``, without showing what is, or may be, a secret."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a mapping"
        case list():
            return "a list"
    kind = {bool: "", str: "the text "}.get(type(value), "the number ")
    if path in found.replaced or "env" in path[2:3] or "api_key" in path[2:3]:
        return {"": "true or false", "the text ": "a text"}.get(kind, "a number")
    if isinstance(value, bool):
        return str(value).lower()
    shown = f"'{value}'" if isinstance(value, str) else _digits(value)
    return kind + (shown if len(shown) <= 60 else shown[:56] + "…'")


def _digits(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # an int of more digits than Python cares to print
        return "that is far too long"


def _written_path(found: tree.Tree, location: tuple[int | str, ...]) -> Path:
    """Return pydantic's location without the parts that are not in the file (``[key]`` and names of types)."""
    path: Path = ()
    for part in location:
        if isinstance(part, str) and shape.also_lists(path):
            continue
        if (*path, part) not in found.values and (*path, part) not in found.keys and part != location[-1]:
            continue
        path = (*path, part)
    return path
