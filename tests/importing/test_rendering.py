"""What is written loads again as what it was, and is pleasant to read."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from modelswap.importing.render import Comments, render
from modelswap.importing.secrets import Vault, escaped, is_secret, references
from modelswap.spec.load import loads

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
WORDS = st.one_of(
    TEXTS,
    st.sampled_from(
        ["8192", "0.90", "on", "null", "~", "", "-", "--x", "a: b", "a #b", "{host}", "[x]", "1:30", "=", "<<"]
    ),
    st.sampled_from(
        ["*a", "&a", "!a", "%a", "@a", "`a", "'", '"', "\\", "a:", "é", "\u2028", "\x85", "\ufeff", "no", "0x1f"]
    ),
)


@given(
    st.lists(WORDS, max_size=30),
    st.dictionaries(st.from_regex(r"[A-Z_]{1,9}", fullmatch=True), WORDS, max_size=8),
    WORDS,
)
def test_every_text_comes_back(args: list[str], env: dict[str, str], model: str) -> None:
    """Whatever stands in a command line, an environment or a name is the same after writing and loading."""
    config: dict[str, Any] = {
        "models": {
            "m": {
                "engine": "vllm",
                "model": escaped(model) or "x",
                "args": [escaped(each) for each in args],
                "env": {name: escaped(value) for name, value in env.items()},
            }
        }
    }
    loaded = loads(render(config, {}, ["head"], ["foot"]), {}).models["m"]
    assert loaded.args == args
    assert loaded.env == env
    assert loaded.model == (model or "x")


@given(st.from_regex(r"[\w./:@+-]{1,30}", fullmatch=True).filter(lambda name: not name.startswith("-")))
def test_every_name_comes_back(name: str) -> None:
    """A model may be called 8000, yes or qwen2.5:7b."""
    config = {"models": {name: {"engine": "vllm", "model": "x", "concurrency": 5}}}
    assert list(loads(render(config, {}, [], []), {}).models) == [name]


def test_it_is_pleasant_to_read() -> None:
    """Short lists on a line, long ones broken between options, comments above their keys, quotes only where needed."""
    config = {
        "models": {
            "qwen2.5:7b": {
                "engine": "vllm",
                "args": ["--max-model-len", "8192", "--chat-template", "a b"],
                "aliases": ["org/name", "8000"],
                "ulimits": {"memlock": -1},
                "gpus": ["0"],
                "api_key": "${KEY}",
            },
            "b": {"command": [word for n in range(9) for word in (f"--option-{n}", "value")], "concurrency": 3},
        },
        "docker": {"project": "x"},
    }
    comments: Comments = {("models", "b"): ["said"], ("docker", "project"): ["why", ""]}
    assert render(config, comments, ["one", "two"], ["end"]) == (
        "# one\n# two\n\nmodels:\n"
        "  qwen2.5:7b:\n    engine: vllm\n"
        '    args: [--max-model-len, 8192, --chat-template, "a b"]\n'
        '    aliases: [org/name, "8000"]\n    ulimits:\n      memlock: -1\n    gpus: ["0"]\n    api_key: "${KEY}"\n\n'
        "  # said\n  b:\n    command: [\n"
        "      --option-0, value, --option-1, value, --option-2, value, --option-3, value, --option-4, value,\n"
        "      --option-5, value, --option-6, value, --option-7, value, --option-8, value,\n    ]\n"
        "    concurrency: 3\n\n"
        "docker:\n  # why\n  #\n  project: x\n\n# end\n"
    )
    assert yaml.safe_load(render(config, comments, [], []))["models"]["b"]["concurrency"] == 3


def test_which_variables_are_secret() -> None:
    """Names with a key, token or password in them, and values that look like one; sizes and files aren't."""
    secret = [
        ("HF_TOKEN", "x"),
        ("OPENAI_API_KEY", "x"),
        ("DB_PASSWORD", "x"),
        ("X", "hf_0123456789"),
        ("U", "a://b:c@d"),
    ]
    plain = [
        ("MAX_TOKENS", "5"),
        ("TLS_KEY_FILE", "x"),
        ("KEY", "/etc/key"),
        ("HF_TOKEN", ""),
        ("TOKEN_LIMIT", "9"),
        ("X", "y"),
    ]
    assert all(is_secret(name, value) for name, value in secret)
    assert not any(is_secret(name, value) for name, value in plain)


def test_references_and_their_names() -> None:
    """A reference stays one; a literal gets the name, or one of its owner's if another literal has that."""
    vault = Vault()
    assert vault.reference("KEY", "${OTHER:-}", "a") == "${OTHER:-}"
    assert vault.reference("KEY", "1", "a") == "${KEY}"
    assert vault.reference("KEY", "2", "b-c.d") == "${B_C_D_KEY}"
    assert vault.reference("KEY", "3", "4x") == "${_4X_KEY}"
    assert references("${A} ${B:-x} $${C} ${D:-}") == [("A", True), ("B", False), ("D", False)]
