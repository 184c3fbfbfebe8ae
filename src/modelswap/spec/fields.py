"""The kinds of values that the config file's sections are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, WithJsonSchema


def _size(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("wants a size such as 12GiB, 500MB or a number of bytes")
    return value


def _off(value: object) -> object:
    if value is False or value == "false":  # a variable's value is always a text
        return None
    if value is not None and not isinstance(value, str):
        raise ValueError("wants a volume's name, a folder, or false for none")
    return value


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from error


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
SomeSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]
Bytes = Annotated[
    ByteSize,
    BeforeValidator(_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": "^\\s*[0-9]*\\.?[0-9]+\\s*([kKmMgGtTpPeE]?[iI]?[bB]?|[bB]it)\\s*$"},
            ],
            "examples": ["12GiB", "500MB"],
        }
    ),
]
Cache = Annotated[
    str | None,
    BeforeValidator(_off),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"const": False}, {"type": "null"}]}),
]
"""A volume's name or a folder; None, written ``false``, for none."""
# YAML has no paths, so these alone are made from text in strict mode.
Location = Annotated[Path, Field(strict=False), AfterValidator(_at_home)]
