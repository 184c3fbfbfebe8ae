"""What the config file may hold at a path, read off the pydantic models."""

from __future__ import annotations

import functools
import types
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ByteSize, SecretStr

from modelswap.spec.config import Config
from modelswap.spec.errors import Path


def keys(path: Path) -> tuple[str, ...]:
    """Return the keys that the section at ``path`` knows; empty where there is no such section."""
    wanted = _wanted(path)
    if isinstance(wanted, type) and issubclass(wanted, BaseModel):
        return tuple(wanted.model_fields)
    return ()


def choices(path: Path) -> tuple[str, ...]:
    """Return the only values allowed at ``path``; empty where others are."""
    wanted = _wanted(path)
    return tuple(map(str, get_args(wanted))) if get_origin(wanted) is Literal else ()


def takes_text(path: Path) -> bool:
    """Return whether a text is a right value at ``path``."""
    wanted = _wanted(path)
    return wanted in (str, FilePath, SecretStr, ByteSize) or get_origin(wanted) is Literal


def takes_scalars_as_written(path: Path) -> bool:
    """Return whether ``path`` is an item of a list, or a value of a mapping, of texts.

    There ``8192`` and ``on`` need no quotes: command lines and environments know nothing but text.
    """
    return bool(path) and _wanted(path) is str and get_origin(_wanted(path[:-1])) in (list, dict)


@functools.cache
def _wanted(path: Path) -> Any:
    if not path:
        return Config
    parent = _wanted(path[:-1])
    if isinstance(parent, type) and issubclass(parent, BaseModel):
        field = parent.model_fields.get(str(path[-1]))
        return _bare(field.annotation) if field else None
    origin, arguments = get_origin(parent), get_args(parent)
    return _bare(arguments[-1]) if origin in (list, dict) and arguments else None


def _bare(annotation: Any) -> Any:
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _bare(next(argument for argument in get_args(annotation) if argument is not type(None)))
    return annotation
