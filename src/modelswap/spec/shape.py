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
    for wanted in _wanted(path):
        if isinstance(wanted, type) and issubclass(wanted, BaseModel):
            return tuple(wanted.model_fields)
    return ()


def choices(path: Path) -> tuple[str, ...]:
    """Return the words allowed at ``path`` where it wants one of several (besides a list, maybe); else none."""
    return tuple(str(word) for wanted in _wanted(path) if get_origin(wanted) is Literal for word in get_args(wanted))


def also_lists(path: Path) -> bool:
    """Return whether ``path`` wants a word or a list."""
    return len(_wanted(path)) > 1 and any(get_origin(wanted) is list for wanted in _wanted(path))


def takes_text(path: Path) -> bool:
    """Return whether a text is a right value at ``path``."""
    return any(
        wanted in (str, FilePath, SecretStr, ByteSize) or get_origin(wanted) is Literal for wanted in _wanted(path)
    )


def takes_scalars_as_written(path: Path) -> bool:
    """Return whether ``path`` is an item of a list, or a value of a mapping, of texts.

    There ``8192`` and ``on`` need no quotes: command lines and environments know nothing but text.
    """
    return (
        bool(path) and str in _wanted(path) and any(get_origin(wanted) in (list, dict) for wanted in _wanted(path[:-1]))
    )


@functools.cache
def _wanted(path: Path) -> tuple[Any, ...]:
    """Return the types that are right at ``path``; none where nothing may stand."""
    if not path:
        return (Config,)
    found: list[Any] = []
    for parent in _wanted(path[:-1]):
        if isinstance(parent, type) and issubclass(parent, BaseModel):
            field = parent.model_fields.get(str(path[-1]))
            found += _bare(field.annotation) if field else ()
        elif get_origin(parent) in (list, dict):
            found += _bare(get_args(parent)[-1])
    return tuple(found)


def _bare(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(
            bare for argument in get_args(annotation) if argument is not type(None) for bare in _bare(argument)
        )
    return (annotation,)
