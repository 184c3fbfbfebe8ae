"""Compose's variables: filled in by its rules, secrets excepted."""

from __future__ import annotations

import pytest

from modelswap.importing.compose.interpolate import Interpolation, dotenv
from modelswap.spec.load import loads

ENV = {"SET": "value", "EMPTY": "", "MONEY": "a${b}c", "HF_TOKEN": "hf_0123456789", "URL": "redis://me:pw@host/0"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("$SET ${SET}!", "value value!"),
        ("$$SET and 5$", "$SET and 5$"),
        ("$${SET}", "$${SET}"),
        ("${SET:-x} ${EMPTY:-x} ${EMPTY-x} ${NO:-x} ${NO-x}", "value x  x x"),
        ("${SET:+yes} ${NO:+yes} ${EMPTY:+yes} ${EMPTY+yes}", "yes   yes"),
        ("${NO:-${SET}/${ALSO_NO:-deep}}", "value/deep"),
        ("${SET:?why} ${NO:?why}", "value ${NO}"),
        ("${NO}", "${NO}"),
        ("${MONEY}", "a$${b}c"),
        ("${HF_TOKEN}", "${HF_TOKEN:-}"),
        ("${HF_TOKEN:-}", "${HF_TOKEN:-}"),
        ("${HF_TOKEN:?set it}", "${HF_TOKEN}"),
        ("${NO_API_KEY:-literal}", "${NO_API_KEY}"),
        ("${URL}", "${URL:-}"),
        ("${SET", "${SET".replace("${", "$${")),
        ("${1}", "$${1}"),
    ],
)
def test_references(text: str, expected: str) -> None:
    """Each form becomes what Compose makes of it, in our config's own syntax."""
    assert Interpolation(ENV).text(text) == expected


def test_it_remembers_what_it_did() -> None:
    """What was filled in, left to be set, and kept back is known afterwards; keys of mappings are left alone."""
    interpolation = Interpolation(ENV)
    value = interpolation.value({"$SET": ["${SET}", "${NO}", {"k": "${MY_SECRET:-s3cret}"}], "n": None})
    assert value == {"$SET": ["value", "${NO}", {"k": "${MY_SECRET}"}], "n": None}
    assert (interpolation.filled, interpolation.unset, interpolation.hidden) == ({"SET"}, {"NO"}, {"MY_SECRET"})


def test_the_outcome_means_the_same_to_our_config() -> None:
    """A text that was interpolated loads as the text that Compose would have used."""
    written = Interpolation(ENV).text("a ${MONEY} $$ $${x}")
    config = loads(f"models: {{m: {{model: x, args: ['{written}']}}}}", {})
    assert config.models["m"].args == ["a a${b}c $ ${x}"]


def test_dotenv() -> None:
    """Comments, quotes, `export`, empty values and references are read as Compose reads them."""
    text = (
        "# a comment\nA=1\nexport B = two words # said\nC='$A'\nD=\"x\\ny ${A}\"\nE=\nF=${A}-${NO:-d}$B\n"
        "G=a#b\n\nH: yaml\nbroken line\r\nI=crlf\r\n"
    )
    assert dotenv(text, {"A": "env"}) == {
        "A": "1", "B": "two words", "C": "$A", "D": "x\ny env", "E": "", "F": "env-dtwo words", "G": "a#b", "H": "yaml",
        "I": "crlf",
    }  # fmt: skip
