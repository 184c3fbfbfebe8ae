from __future__ import annotations

import json
import math

import pytest

from bench.gpu_layout import head, shapes

GIB = 1 << 30


@pytest.mark.parametrize("size", [20 << 20, 50 << 20, GIB // 4, GIB, 8 * GIB, 30 * GIB])
def test_a_model_has_about_the_size_that_was_asked_for(size: int) -> None:
    """Whatever the size, it is met within an eighth, by at least four layers of seven tensors and two ends."""
    wanted = shapes(size)
    assert abs(sum(2 * math.prod(shape) for shape in wanted.values()) / size - 1) < 0.125
    assert len(wanted) >= 2 + 4 * 7
    assert (len(wanted) - 2) % 7 == 0


def test_large_models_have_the_layers_of_real_ones() -> None:
    """From some GiB on, layers are those of a common 8B model."""
    wanted = shapes(8 * GIB)
    assert wanted["0.q"] == (4096, 4096)
    assert wanted["16.up"] == (14336, 4096)
    assert wanted["16.down"] == (4096, 14336)


def test_too_few_bytes_are_refused() -> None:
    """Nothing sensible can be made of a megabyte."""
    with pytest.raises(ValueError, match="too few"):
        shapes(1 << 20)


def test_a_file_begins_as_safetensors_says() -> None:
    """The header's length is right, its offsets lie end to end, and tensors begin where it is said."""
    wanted = shapes(20 << 20)
    beginning, begins, end = head(wanted)
    length = int.from_bytes(beginning[:8], "little")
    assert len(beginning) == 8 + length
    assert length % 8 == 0
    told = json.loads(beginning[8:])
    assert list(told) == list(wanted)
    at = 0
    for name, each in told.items():
        assert each["data_offsets"] == [at, at + 2 * math.prod(wanted[name])]
        assert begins[name] == 8 + length + at
        at = each["data_offsets"][1]
    assert end == 8 + length + at
