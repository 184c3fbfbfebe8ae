"""Whatever is thrown at the loader, it answers with a config or a `ConfigError`."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelswap.spec.config import Config, Model
from modelswap.spec.digest import definition
from modelswap.spec.errors import ConfigError
from modelswap.spec.load import loads

ENV = {"A": "one", "N": "3", "EMPTY": "", "ODD": "\udc80", "NUL": "a\0b"}
WORDS = st.sampled_from(
    [
        *Config.model_fields,
        *Model.model_fields,
        *[
            "/a:/b:ro",
            "v-1:/c",
            ":",
            "host",
            "all",
            "unix:///x",
            "tcp://h:1",
            "host.x:host-gateway",
            "memlock",
            "a/b:c",
        ],
        *["vllm", "llamacpp", "custom", "openvino", "alises", "a", "b", "<<", "/health", "12GiB", "-1"],
        *["${A}", "${N}", "${NONE}", "${NONE:-x}", "$${", "${", "${ODD}", "${NUL}"],
        "",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=4)
)
SNIPPETS = st.sampled_from(
    [
        *(word + " " for word in ["-", "?", ":", "&a", "*a", "<<:", "!!int", "!!binary", "!!set", "!x"]),
        *[
            "models:",
            "[",
            "]",
            "{",
            "}",
            ",",
            "'",
            '"',
            "---",
            "...",
            "#",
            "~",
            "0x",
            "1e999",
            ".nan",
            "${A}",
            "${",
            "a",
            "\\U",
            "1:1",
            "=",
            "0b",
            "2024-13-99",
        ],
        *("\n", "  ", "\t", "|\n", ">-\n", "%YAML 1.1\n", "%TAG ! x\n", "model: m\n", "engine: vllm\n"),
        *("\ufeff", "\x85"),
    ]
)


def survives(text: str) -> None:
    """Load ``text``; anything but a config or a `ConfigError` fails the test."""
    try:
        config = loads(text, ENV)
    except ConfigError as error:
        if not error.problems:
            raise
        return
    for name, model in config.models.items():
        assert definition(name, model) == definition(name, model)


@settings(deadline=None, max_examples=150)
@given(st.text())
@example("\ud800")
@example('"\\UFFFFFFFF"')
@example('models: {a: {model: "\\uD800"}}')
def test_any_text(text: str) -> None:
    """No text at all brings the loader down."""
    survives(text)


@settings(deadline=None, max_examples=200)
@given(st.lists(SNIPPETS, max_size=25).map("".join))
@example("%YAML 1." + "9" * 5000 + "\n---\na")
@example("a: !!bool x")
@example("a: !!int x")
@example("a: !!int ''")
@example("{{a: b}: c}")
@example("? |\n x\n: y")
@example("[<<]")
@example("{<<: {<<: [a]}}")
def test_yaml_in_pieces(text: str) -> None:
    """Pieces of YAML in any order don't either."""
    survives(text)


@settings(deadline=None, max_examples=200)
@given(ANYTHING)
def test_any_yaml(value: Any) -> None:
    """Well-formed YAML of any shape doesn't either."""
    survives(yaml.safe_dump(value))


@settings(deadline=None, max_examples=200)
@given(
    st.fixed_dictionaries(
        {"models": st.dictionaries(st.sampled_from("abc"), st.dictionaries(WORDS, SCALARS | st.lists(SCALARS)))},
        optional={name: st.dictionaries(WORDS, SCALARS) for name in Config.model_fields if name != "models"},
    )
)
@example({"models": {"a": {"engine": []}}, "gateway": {"port": {}, "host": []}})
def test_any_nearly_right_config(value: Any) -> None:
    """Files that are nearly right, with any value in any key, don't either."""
    survives(yaml.safe_dump(value))
