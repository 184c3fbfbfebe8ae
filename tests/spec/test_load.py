"""What a good config file becomes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import BaseModel

from modelswap.spec import example
from modelswap.spec.config import Config, Device, Docker, Gateway, Hook, Hooks, Model, Orchestrator, Scheduling
from modelswap.spec.errors import ConfigError
from modelswap.spec.load import load, loads


def test_the_smallest_file_has_every_default() -> None:
    """One model with an engine and a model is a whole config."""
    config = loads("models: {a: {engine: vllm, model: org/name}}", {})
    assert config.models["a"].model == "org/name"
    assert (config.gateway.port, config.orchestrator.port) == (8080, 8888)
    assert config.models["a"].args == [] and config.models["a"].priority == 0


def test_the_example_loads_without_any_variable_and_says_the_defaults() -> None:
    """The packaged example is right as it stands, and what it shows as defaults are the defaults."""
    config = loads(example.text(), {})
    assert set(config.models) == {"mistral", "coder", "small", "vision", "embedder", "qwen", "llama", "phi"}
    plain = Config(models=config.models)
    assert config.gateway == plain.gateway
    assert config.orchestrator == plain.orchestrator
    assert config.scheduling == plain.scheduling
    assert config.device == plain.device
    assert config.docker == plain.docker


def test_the_example_names_every_key() -> None:
    """Whoever reads the example has seen each key there is, at least in a comment."""
    text = example.text()
    sections: list[type[BaseModel]] = [Config, Model, Hook, Hooks, Gateway, Orchestrator, Scheduling, Device, Docker]
    for section in sections:
        for key in section.model_fields:
            assert f"{key}:" in text or key == "ledger", key


@pytest.mark.parametrize(
    ("written", "read"), [("on", "on"), ("off", "off"), ("auto", "auto"), ('"on"', "on"), ('"${SLEEP}"', "on")]
)
def test_sleep_is_on_or_off_in_words(written: str, read: str) -> None:
    """YAML takes a plain ``on`` for true; where that is a word of ours, it is the word."""
    assert loads(f"models: {{a: {{model: m, sleep: {written}}}}}", {"SLEEP": "on"}).models["a"].sleep == read


def test_hooks_are_read_whole() -> None:
    """Commands are lists of words as written, bodies JSON with the types that YAML gives them."""
    text = """
models:
  a:
    model: m
    hooks:
      before_load: [{command: [tell, 8, yes]}]
      after_load: [{url: /slots/0, body: {n: 8, deep: [true, null, {x: "1"}]}, on_failure: fail}]
      after_unload: [{url: "https://h:1/x?t=${T}", method: PUT, timeout: 0.5}]
"""
    hooks = loads(text, {"T": "secret"}).models["a"].hooks
    assert hooks.before_load == [Hook(command=["tell", "8", "yes"])]
    (after,) = hooks.after_load
    assert (after.method, after.timeout, after.on_failure) == ("POST", 30.0, "fail")
    assert after.body == {"n": 8, "deep": [True, None, {"x": "1"}]}
    assert hooks.after_unload == [Hook(url="https://h:1/x?t=secret", method="PUT", timeout=0.5)]
    assert hooks.before_unload == []


def test_load_reads_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Editors on Windows begin UTF-8 files with a mark."""
    file = tmp_path / "modelswap.yaml"
    file.write_bytes(b"\xef\xbb\xbfmodels: {a: {model: m}}\n")
    assert load(file, {}).models["a"].model == "m"


def test_variables_come_from_the_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an ``env``, the process's own environment is used, as it is at the time."""
    monkeypatch.setenv("MODELSWAP_TEST_MODEL", "from/env")
    assert loads("models: {a: {model: '${MODELSWAP_TEST_MODEL}'}}").models["a"].model == "from/env"
    assert "MODELSWAP_TEST_MODEL" in os.environ


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${A}", "one"),
        ("x${A}y${B}z", "xoneytwo wordsz"),
        ("${NONE:-other}", "other"),
        ("${NONE:-}", ""),
        ("${EMPTY:-other}", "other"),
        ("${EMPTY}", ""),
        ("${A:-other}", "one"),
        ("$${A}", "${A}"),
        ("$A $ {A} $", "$A $ {A} $"),
        ("${NESTED}", "${A}"),
        ("${NONE:-a:-b}", "a:-b"),
    ],
)
def test_variables_are_replaced_once(text: str, expected: str) -> None:
    """Each form of a variable gives its value, and values are not looked through again."""
    env = {"A": "one", "B": "two words", "EMPTY": "", "NESTED": "${A}"}
    config = loads(f"models: {{a: {{model: m, env: {{V: '{text}'}}}}}}", env)
    assert config.models["a"].env["V"] == expected


def test_a_variable_where_a_number_is_wanted_is_read_as_one() -> None:
    """``port: ${PORT}`` works, and a key made of digits stays a text."""
    text = "models: {a: {model: m, concurrency: '1'}}".replace("'1'", "3") + "\ngateway:\n  port: ${PORT}\n"
    assert loads(text, {"PORT": "81"}).gateway.port == 81
    text = "models:\n  a:\n    model: ${M}\n    api_key: ${KEY}\n    memory: ${MEMORY}\n"
    model = loads(text, {"M": "7", "KEY": "123", "MEMORY": "12GiB"}).models["a"]
    assert model.model == "7"
    assert model.api_key is not None and model.api_key.get_secret_value() == "123"
    assert model.memory == 12 * 1024**3


def test_command_lines_and_environments_need_no_quotes() -> None:
    """Numbers, ``on`` and the like stay as they were written where only texts can stand."""
    text = "models: {a: {model: m, args: [--n, 8192, 010, 0.90, on, 1:30, 2024-01-01, '007'], env: {A: 1, B: yes}}}"
    model = loads(text, {}).models["a"]
    assert model.args == ["--n", "8192", "010", "0.90", "on", "1:30", "2024-01-01", "007"]
    assert model.env == {"A": "1", "B": "yes"}


def test_model_names_may_look_like_anything() -> None:
    """Keys are texts, whatever YAML would make of them."""
    config = loads("models: {7: {model: m}, on: {model: m}, org/name:latest: {model: m}, 1.5: {model: m}}", {})
    assert list(config.models) == ["7", "on", "org/name:latest", "1.5"]


def test_anchors_and_merges() -> None:
    """What a section says itself goes before what is merged into it, earlier merges before later ones."""
    text = """
models:
  a: &a {engine: custom, command: [x], concurrency: 2, args: [p, q]}
  b: &b {<<: *a, concurrency: 3}
  c: {concurrency: 4, <<: [*b, *a], args: [r]}
"""
    models = loads(text, {}).models
    assert models["b"].concurrency == 3 and models["b"].command == ["x"]
    assert models["c"].concurrency == 4 and models["c"].args == ["r"]


def test_sizes_and_paths() -> None:
    """Sizes have units, paths may begin at home."""
    text = "models: {a: {model: m, memory: 1.5GB, cwd: ~/x}}\ngateway: {max_body: 1000}"
    config = loads(text, {})
    assert config.models["a"].memory == 1_500_000_000
    assert config.models["a"].cwd == Path("~/x").expanduser()
    assert config.gateway.max_body == 1000


def test_secrets_are_not_shown() -> None:
    """Neither the config's text nor an error about it shows a key."""
    config = loads("models: {a: {model: m, api_key: '${K}'}}", {"K": "hush-hush"})
    assert "hush" not in repr(config) and "hush" not in str(config)
    with pytest.raises(ConfigError) as caught:
        loads("models: {a: {model: m, api_key: ['${K}'], priority: '${K}', canary: '${K}'}}", {"K": "hush-hush"})
    assert "hush" not in str(caught.value) and "hush" not in repr(caught.value.problems)
    assert len(caught.value.problems) == 3
