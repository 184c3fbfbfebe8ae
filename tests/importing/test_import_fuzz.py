"""Files that are wrong somewhere: every one is imported, or refused with a reason."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from modelswap.importing import report
from modelswap.importing.llamaswap.convert import convert
from modelswap.importing.result import CannotImport, Imported
from modelswap.spec.errors import ConfigError
from tests.importing.reading import compose, plain
from tests.importing.test_compose_files import EVERYTHING, leaves

JUNK: list[Any] = [
    None,
    "",
    "text",
    5,
    [],
    {},
    ["a", {"b": ["c"]}],
    {"a": {"b": None}},
    [None],
    "${",
    "a: 'b",
    "-",
    [[]],
]


def adopted(text: str) -> Imported:
    """Import compose, adopted."""
    return compose(text)


def managed(text: str) -> Imported:
    """Import compose, managed."""
    return compose(text, manage=True)


def swapped(text: str) -> Imported:
    """Import llama-swap."""
    return convert(text, "f")


SERVICE = {"services": {"llm": yaml.safe_load(EVERYTHING), "db": {"image": "postgres"}}}


@pytest.mark.long
@pytest.mark.parametrize(
    ("whole", "importer"),
    [
        pytest.param(SERVICE, adopted, id="service-adopted"),
        pytest.param(SERVICE, managed, id="service-managed"),
        pytest.param(plain("zoo.yaml"), managed, id="zoo"),
        pytest.param(plain("llama-swap.yaml"), swapped, id="llama-swap"),
    ],
)
def test_junk_anywhere_is_imported_or_refused(whole: Any, importer: Callable[[str], Imported]) -> None:
    """No value in any place ends in anything but a result or one of the two errors with a message."""
    refusals: list[str] = []
    places = list(itertools.product(leaves(yaml.safe_load(yaml.safe_dump(whole)), ()), JUNK))
    # All of them take a minute and a half; a different part of them with another seed.
    for path, junk in random.Random(20).sample(places, 120):
        broken = copy.deepcopy(whole)
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = junk
        try:
            imported = importer(yaml.safe_dump(broken, sort_keys=False))
            report.verify(report.text(imported, "x"), imported, {}, "x")
        except (CannotImport, ConfigError) as error:
            refusals.append(str(error))
    assert all(refusals)
