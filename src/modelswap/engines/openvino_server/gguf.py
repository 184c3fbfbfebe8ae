"""What a GGUF file says of itself, read from its head.

OpenVINO's own reader crashes on a file that ends early (a download that broke off), so the size is checked first.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, Final

import msgspec

from modelswap.engines.openvino_server.pipeline import CannotLoad

MAGIC: Final = b"GGUF"

# GGUF's value types that have a fixed size, with the names that struct has for them.
_SCALARS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING: Final = 8
_ARRAY: Final = 9

# Elements and bytes per block of the tensor types that are common; others are measured by where they begin.
_BLOCKS: Final = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    8: (32, 34),  # Q8_0
    12: (256, 144),  # Q4_K
    14: (256, 210),  # Q6_K
    30: (1, 2),  # BF16
}


class Facts(msgspec.Struct, frozen=True):
    """``architecture`` as GGUF names it; ``context`` in tokens, None where the file doesn't say."""

    architecture: str
    context: int | None


def read(path: Path) -> Facts:
    """Return the facts; raises `CannotLoad` for a file that is no GGUF or ends too early, `OSError` as usual."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise CannotLoad("it is not a GGUF file (give a .gguf file or an OpenVINO IR folder)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                head = _Reader(data)
                facts = head.facts()
                needed = head.needed()
            except (struct.error, UnicodeDecodeError, LookupError, OverflowError):
                raise CannotLoad(f"the GGUF file is damaged or ends too early ({size} bytes): fetch it again") from None
    if size < needed:
        raise CannotLoad(f"the GGUF file ends too early ({size} bytes of {needed}): fetch it again")
    return facts


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = len(MAGIC)
        self._take("<I")
        self._tensors = self._take("<Q")
        self._pairs = self._take("<Q")
        self._alignment = 32

    def facts(self) -> Facts:
        values: dict[str, Any] = {}
        for _ in range(self._pairs):
            key = self._string()
            kind = self._take("<I")
            if kind == _ARRAY:
                self._skip_array()
            else:
                values[key] = self._string() if kind == _STRING else self._take(_SCALARS[kind])
        self._alignment = values.get("general.alignment", self._alignment)
        architecture = str(values.get("general.architecture", "unknown"))
        context = values.get(f"{architecture}.context_length")
        return Facts(architecture, context if isinstance(context, int) else None)

    def needed(self) -> int:
        """Return the size that the file must have at least; to be called after `facts`."""
        end = 0
        for _ in range(self._tensors):
            self._string()
            elements = 1
            for _ in range(self._take("<I")):
                elements *= self._take("<Q")
            block, size = _BLOCKS.get(self._take("<I"), (1, 0))
            end = max(end, self._take("<Q") + elements // block * size)
        return -(-self._at // self._alignment) * self._alignment + end

    def _take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        start = self._at + 8
        self._at = start + self._take("<Q")
        return self._data[start : self._at].decode()

    def _skip_array(self) -> None:
        kind = self._take("<I")
        count = self._take("<Q")
        if kind == _STRING:
            for _ in range(count):
                self._at += 8 + struct.unpack_from("<Q", self._data, self._at)[0]
        else:
            self._at += count * struct.calcsize(_SCALARS[kind])
