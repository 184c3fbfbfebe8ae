"""What the test engines' weights look like: the tensors of a model of some size, and its file's header.

The file is safetensors: eight bytes of the header's length, a JSON header, the tensors. Pure, and needs no PyTorch.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

FILE: Final = "model.safetensors"
VOCABULARY: Final = 8192
_HIDDEN: Final = (4096, 2048, 1024, 512, 256)
_LEAST_LAYERS: Final = 4


def shapes(size: int) -> dict[str, tuple[int, int]]:
    """Return the tensors of a model of about ``size`` bytes in bf16, as rows and columns.

    The layers are those of a common 8B model, narrower if there would be fewer than four of them. Raises `ValueError`.
    """
    for hidden in _HIDDEN:
        inner = hidden * 7 // 2
        ends = dict.fromkeys(("embed", "head"), (VOCABULARY, hidden))
        layer = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden))
        layer |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        layers = round((size - _bytes(ends)) / _bytes(layer))
        if layers >= _LEAST_LAYERS:
            return ends | {f"{number}.{name}": shape for number in range(layers) for name, shape in layer.items()}
    raise ValueError(f"{size} bytes are too few for a model; it takes 16 MiB")


def head(wanted: dict[str, tuple[int, int]]) -> tuple[bytes, dict[str, int], int]:
    """Return the beginning of a file, where in the file each tensor begins, and the bytes of it all."""
    told, end = dict[str, Any](), 0
    for name, shape in wanted.items():
        begin, end = end, end + 2 * math.prod(shape)
        told[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(told).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return (
        len(text).to_bytes(8, "little") + text,
        {name: first + each["data_offsets"][0] for name, each in told.items()},
        first + end,
    )


def _bytes(named: dict[str, tuple[int, int]]) -> int:
    return sum(2 * math.prod(shape) for shape in named.values())
