"""Real weights for a test engine: a seeded file of them, and what an engine does with them on a device.

An answer depends on every byte: each token comes out of a chain of matrix products over all tensors, moved on by a
checksum of all bits, so that a wake which brought back anything else answers something else.

Runs in the engines' Python, so it needs nothing of modelswap.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional

from bench.gpu_layout import FILE, VOCABULARY, head, shapes

STAGING: Final = 128 << 20
"""Bytes of each of the two pinned buffers that the file goes through on its way to the device."""
_MODULUS: Final = (1 << 61) - 1


def make(folder: Path, size: int, seed: int, device: str) -> int:
    """Write a model's file into ``folder`` unless it is there, and return its size in bytes.

    ``device`` makes the numbers, which differ between devices.
    """
    path = folder / FILE
    if path.is_file():
        return path.stat().st_size
    folder.mkdir(parents=True, exist_ok=True)
    wanted = shapes(size)
    beginning, begins, end = head(wanted)
    draft = path.with_suffix(".part")
    with draft.open("w+b") as file:
        file.write(beginning)
        file.truncate(end)
        file.flush()
        with mmap.mmap(file.fileno(), 0) as mapped:
            generator = torch.Generator(device).manual_seed(seed)
            for name, shape in wanted.items():
                made = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
                into = torch.frombuffer(mapped, dtype=torch.bfloat16, count=made.numel(), offset=begins[name])
                into.view(shape).copy_(made / math.sqrt(shape[1]))
                del into  # the file can't be unmapped while a tensor lies in it
    draft.replace(path)
    return path.stat().st_size


class Weights:
    """One model's tensors: on the device, in host memory, or only in the file. Not for two threads at once."""

    def __init__(self, folder: Path, device: str) -> None:
        self.path = folder / FILE
        self.device = device
        self._cuda = device != "cpu"
        self._there: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}

    @property
    def size(self) -> int:
        """Bytes of the file, which is the tensors' but for some kilobytes."""
        return self.path.stat().st_size

    def load(self) -> None:
        """Read the file into the tensors on the device, which are made if there are none."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
            # A private mapping is writable, as tensors want it, and shares the page cache all the same.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
                stage = _Stage() if self._cuda else None
                for name, told in header.items():
                    count, begin = math.prod(told["shape"]), 8 + length + told["data_offsets"][0]
                    stored = torch.frombuffer(mapped, dtype=torch.bfloat16, count=count, offset=begin)
                    if name not in self._there:
                        self._there[name] = torch.empty(told["shape"], dtype=torch.bfloat16, device=self.device)
                    into = self._there[name].view(-1)
                    if stage is None:
                        into.copy_(stored)
                    else:
                        stage.copy(stored, into)
                    del stored
                if stage is not None:
                    stage.end()

    def offload(self) -> None:
        """Copy the tensors to (pinned) host memory and free them on the device: sleep level 1.

        PyTorch keeps what it has pinned, so that only the first time is slow.
        """
        for name, tensor in self._there.items():
            self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._cuda)
            self._kept[name].copy_(tensor, non_blocking=True)
        self.drop()

    def restore(self) -> None:
        """Copy back what was offloaded; what was dropped comes back as zeros until it is loaded."""
        back = {}
        for name, kept in self._kept.items():
            back[name] = torch.empty(kept.shape, dtype=kept.dtype, device=self.device)
            back[name].copy_(kept, non_blocking=True)
        self._settle()
        self._there, self._kept = back, {}

    def drop(self) -> None:
        """Free the tensors on the device: sleep level 2."""
        self._settle()
        self._there = {}
        if self._cuda:
            torch.cuda.empty_cache()

    def blank(self) -> None:
        """Make tensors of zeros on the device: what level 2 wakes to before the weights are read again."""
        with self.path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        self._there = {
            name: torch.zeros(told["shape"], dtype=torch.bfloat16, device=self.device) for name, told in header.items()
        }

    def checksum(self) -> int:
        """Return a number that any changed bit changes: sums of all rows' words, each row weighted by its place."""
        total = 0
        for name, tensor in self._there.items():
            sums = tensor.view(torch.int32).sum(dim=1)
            places = torch.arange(1, len(sums) + 1, device=self.device)
            # Whole numbers: the same in any order, also where 64 bits overflow.
            total = (total * 1000003 + int((sums * places).sum()) + zlib.crc32(name.encode())) % _MODULUS
        return total

    def answer(self, prompt: str) -> Generator[int]:
        """Yield the tokens of the answer to ``prompt``, for ever."""
        there, checksum = self._there, self.checksum()
        token = zlib.crc32(prompt.encode()) % VOCABULARY
        layers = range(sum(name.endswith(".q") for name in there))
        state = there["embed"][token][None]
        for step in itertools.count():
            for number in layers:
                state = _layer(state, *(there[f"{number}.{name}"] for name in ("q", "k", "v", "o")))
                gate, up, down = (there[f"{number}.{name}"] for name in ("gate", "up", "down"))
                x = _normed(state)
                state = state + functional.linear(
                    functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down
                )
            best = int(functional.linear(_normed(state), there["head"]).argmax())
            token = (best + zlib.crc32(f"{checksum} {step}".encode())) % VOCABULARY
            yield token
            state = _normed(state) + there["embed"][token][None]

    def _settle(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


class _Stage:
    """Two pinned buffers, of which one is filled while the other is copied to the device."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(STAGING, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._turn = 0

    def copy(self, stored: Any, into: Any) -> None:
        """Begin to copy ``stored`` (host memory) to ``into`` (device memory)."""
        for source, target in zip(
            stored.view(torch.uint8).split(STAGING), into.view(torch.uint8).split(STAGING), strict=True
        ):
            buffer, copied = self._buffers[self._turn], self._copied[self._turn]
            copied.synchronize()
            part = buffer[: len(source)]
            part.copy_(source)
            target.copy_(part, non_blocking=True)
            copied.record()
            self._turn = 1 - self._turn

    def end(self) -> None:
        """Wait until all has arrived."""
        torch.cuda.synchronize()


def _layer(state: Any, q: Any, k: Any, v: Any, o: Any) -> Any:
    x = _normed(state)
    mixed = torch.tanh(functional.linear(x, q) * functional.linear(x, k)) + functional.linear(x, v)
    return state + functional.linear(mixed, o)


def _normed(state: Any) -> Any:
    return functional.rms_norm(state, state.shape[-1:])
