"""Each thing that can be wrong with a config file: the place, the key, the words, the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelswap.spec.errors import ConfigError, Problem, dotted
from modelswap.spec.load import load, loads


def problems(text: str, env: dict[str, str] | None = None) -> list[str]:
    """Return what is said about ``text``, one line a problem."""
    with pytest.raises(ConfigError) as caught:
        loads(text, env or {}, "m.yaml")
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return [str(problem) for problem in caught.value.problems]


ONE = [
    pytest.param(
        "models:\n  coder:\n    model: m\n    alises: [x]",
        "m.yaml:4: models.coder.alises: unknown key; did you mean 'aliases'?",
        id="unknown key",
    ),
    pytest.param(
        "models: {a: {model: m}}\ngatewy: {}",
        "m.yaml:2: gatewy: unknown key; did you mean 'gateway'?",
        id="unknown section",
    ),
    pytest.param(
        "models: {a: {model: m}}\nscheduling:\n  Max-Wait: 3",
        "m.yaml:3: scheduling.Max-Wait: unknown key; did you mean 'max_wait'?",
        id="unknown key, other spelling",
    ),
    pytest.param(
        "models: {a: {model: m}}\ndevice: {zzz: 1}",
        "m.yaml:2: device.zzz: unknown key; the keys here are kind, index, ledger, release_timeout, on_release_timeout,"
        " host_memory, read_ahead",
        id="unknown key, none near",
    ),
    pytest.param(
        "models:\n  a:\n    engine: vlm\n    model: m",
        "m.yaml:3: models.a.engine: wants one of vllm, llamacpp, openvino, sglang, custom, found the text 'vlm';"
        " did you mean 'vllm'?",
        id="unknown engine",
    ),
    pytest.param(
        "models: {a: {model: m, args: --x}}",
        "m.yaml:1: models.a.args: wants a list, found the text '--x'; write it as a list: [first, second]",
        id="text for list",
    ),
    pytest.param(
        "models: {a: {model: 7}}",
        "m.yaml:1: models.a.model: wants a text, found the number 7; put it in quotes",
        id="number for text",
    ),
    pytest.param(
        "models: {a: {model: m}}\ngateway:\n  port: '80'",
        "m.yaml:3: gateway.port: wants a whole number, found the text '80'; write it without quotes",
        id="text for number",
    ),
    pytest.param(
        "models: {a: {model: m}}\ngateway: {workers: 1.5}",
        "m.yaml:2: gateway.workers: wants a whole number, found the number 1.5",
        id="fraction for whole",
    ),
    pytest.param(
        "models: {a: {model: m}}\ngateway: {workers: true}",
        "m.yaml:2: gateway.workers: wants a whole number, found true",
        id="true for number",
    ),
    pytest.param(
        "models: {a: {model: m}}\ngateway: {idle_timeout: [1]}",
        "m.yaml:2: gateway.idle_timeout: wants a number, found a list",
        id="list for number",
    ),
    pytest.param(
        "models: {a: {model: m}}\ngateway: {idle_timeout: .inf}",
        "m.yaml:2: gateway.idle_timeout: wants a finite number, found the number inf",
        id="infinite",
    ),
    pytest.param(
        "models: {a: {model: m, priority: 400}}",
        "m.yaml:1: models.a.priority: must be at most 100, found the number 400",
        id="too large",
    ),
    pytest.param(
        "models: {a: {model: m}}\norchestrator: {term: 0}",
        "m.yaml:2: orchestrator.term: must be more than 0, found the number 0",
        id="too small",
    ),
    pytest.param(
        "models: {a: {model: m, memory: 12Gx}}",
        "m.yaml:1: models.a.memory: wants a size such as 12GiB, 500MB or a number of bytes, found the text '12Gx'",
        id="no size",
    ),
    pytest.param(
        "models: {a: {engine: custom, command: [x], ready: health}}",
        "m.yaml:1: models.a.ready: must begin with '/', found the text 'health'",
        id="no path",
    ),
    pytest.param(
        "models: {a: {model: m, env: {A: }}}",
        "m.yaml:1: models.a.env.A: wants a text, found nothing; give a value, or leave the key out",
        id="nothing",
    ),
    pytest.param(
        "models: {a: {model: m, canary: yes}}",
        "m.yaml:1: models.a.canary: wants one of completion, chat, embedding, none, found true",
        id="true for choice",
    ),
    pytest.param(
        "models:\n  a: {model: m}\n  b:",
        "m.yaml:3: models.b: wants a mapping (key: value), found nothing; give a value, or leave the key out",
        id="model of nothing",
    ),
    pytest.param(
        "models:\n  a: {model: m}\n  a: {model: n}",
        "m.yaml:3: models.a: duplicate key, first given on line 2; keep one of them",
        id="duplicate model",
    ),
    pytest.param(
        "models:\n  a:\n    model: m\n    args: []\n    model: n",
        "m.yaml:5: models.a.model: duplicate key, first given on line 3; keep one of them",
        id="duplicate key",
    ),
    pytest.param(
        "models:\n  a: {model: m}\n  b:\n    model: m\n    aliases:\n    - x\n    - a",
        "m.yaml:7: models.b.aliases[1]: the name 'a' is taken already by models.a on line 2;"
        " every name, alias and adapter must be the only one of its kind",
        id="alias is a model",
    ),
    pytest.param(
        "models:\n  a: {model: m, aliases: [x]}\n  b: {model: m, adapters: [x]}",
        "m.yaml:3: models.b.adapters[0]: the name 'x' is taken already by models.a.aliases[0] on line 2;"
        " every name, alias and adapter must be the only one of its kind",
        id="adapter is an alias",
    ),
    pytest.param(
        "models: {a: {model: m, aliases: [x, x]}}",
        "m.yaml:1: models.a.aliases[1]: the name 'x' is taken already by models.a.aliases[0] on line 1;"
        " every name, alias and adapter must be the only one of its kind",
        id="alias twice",
    ),
    pytest.param(
        "models:\n  a:\n    model: ${HUB_MODEL}",
        "m.yaml:3: models.a.model: the environment variable HUB_MODEL is not set;"
        " set it before starting (export HUB_MODEL=…) or give a default: ${HUB_MODEL:-…}",
        id="missing variable",
    ),
    pytest.param(
        "models:\n  a:\n    model: m\n    args: ['${1x}']",
        "m.yaml:4: models.a.args[0]: has a '${' that begins no variable;"
        " write ${NAME}, ${NAME:-default}, or $${ for a plain ${",
        id="bad variable",
    ),
    pytest.param(
        "models:\n  a:\n    model: m${X",
        "m.yaml:3: models.a.model: has a '${' that begins no variable;"
        " write ${NAME}, ${NAME:-default}, or $${ for a plain ${",
        id="open variable",
    ),
    pytest.param(
        "models: {a: {model: m, env: {A: ${X}}}}",
        "m.yaml:1: not YAML: expected ',' or '}', but got '{'; put \"${…}\" in quotes where it stands in {} or []",
        id="variable without quotes in braces",
    ),
    pytest.param(
        "models:\n\ta: 1",
        "m.yaml:2: not YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs",
        id="tab",
    ),
    pytest.param("models: {a: [}", "m.yaml:1: not YAML: expected the node content, but found '}'", id="not YAML"),
    pytest.param("models: {a: \x07}", "m.yaml:1: not YAML: special characters are not allowed", id="control"),
    pytest.param("a: 1\n---\nb: 2", "m.yaml:2: not YAML: but found another document", id="two documents"),
    pytest.param("models: &x {a: *x}", "m.yaml:1: not YAML: an alias (*) stands inside its own anchor (&)", id="cycle"),
    pytest.param(
        "models: &x {<<: *x}", "m.yaml:1: not YAML: an alias (*) stands inside its own anchor (&)", id="merge"
    ),
    pytest.param("models: {a: {<<: 3, model: m}}", "m.yaml:1: models.a: '<<' wants a mapping, such as *an_anchor"),
    pytest.param("models: {a: {[b]: c, model: m}}", "m.yaml:1: models.a: a key must be a text", id="list as key"),
    pytest.param("[" * 5000, "m.yaml: nested too deeply", id="deep"),
    pytest.param(
        "models: {a: {model: !secret m}}",
        "m.yaml:1: models.a.model: has a tag that means nothing here: !secret; leave it out",
        id="tag",
    ),
    pytest.param(
        "models: {a: !!python/object:os.system {model: m}}",
        "m.yaml:1: models.a: has a tag that means nothing here: tag:yaml.org,2002:python/object:os.system;"
        " leave it out",
        id="python tag",
    ),
    pytest.param(
        'models: {a: {model: "m\\0"}}',
        "m.yaml:1: models.a.model: holds characters that no program can be given",
        id="NUL",
    ),
    pytest.param("", "m.yaml: empty; a commented one to start from: python -m modelswap.spec.example > m.yaml", id="0"),
    pytest.param("- a", "m.yaml:1: wants a mapping (key: value), found a list", id="list"),
    pytest.param(
        "gateway: {}", "m.yaml:1: models: this key is missing; see python -m modelswap.spec.example", id="no models"
    ),
    pytest.param(
        "models: {}",
        "m.yaml:1: models: names no model; add one: models: {my-model: {engine: vllm, model: …}}",
        id="empty models",
    ),
    pytest.param(
        "models:\n  a: {engine: custom}",
        "m.yaml:2: models.a: engine 'custom' needs a 'command';"
        ' e.g. command: [my-server, --listen, "127.0.0.1:{port}"]',
        id="custom without command",
    ),
    pytest.param(
        "models:\n  a: {engine: custom, command: []}",
        "m.yaml:2: models.a.command: names no program; e.g. command: [my-server]",
        id="empty command",
    ),
    pytest.param(
        "models: {a: {engine: custom, command: [x], program: [y]}}",
        "m.yaml:1: models.a.program: not for engine 'custom'; its 'command' says all",
        id="program for custom",
    ),
    pytest.param(
        "models: {a: {engine: vllm, model: m, command: [x]}}",
        "m.yaml:1: models.a.command: only for engine 'custom', not 'vllm';"
        " options go into 'args', another program into 'program'",
        id="command for vllm",
    ),
    pytest.param(
        "models: {a: {engine: llamacpp, model: m, ready: /x}}",
        "m.yaml:1: models.a.ready: only for engine 'custom', not 'llamacpp'; leave it out",
        id="ready for llamacpp",
    ),
    pytest.param(
        "models: {a: {engine: llamacpp}}",
        "m.yaml:1: models.a: engine 'llamacpp' needs a 'model'; say model: a GGUF file or a Hugging Face id",
        id="llamacpp without model",
    ),
    pytest.param(
        "models: {a: {}}",
        "m.yaml:1: models.a: engine 'vllm' (the engine when none is given) needs a 'model';"
        " say model: a Hugging Face id or a folder",
        id="nothing said",
    ),
    pytest.param(
        "models: {'a b': {model: m}}",
        "m.yaml:1: models.a b: not a name that requests can use: it holds a space",
        id="space in name",
    ),
    pytest.param(
        "models: {a: {model: m, aliases: ['']}}",
        "m.yaml:1: models.a.aliases[0]: not a name that requests can use: it is empty",
        id="empty name",
    ),
    pytest.param(
        f"models: {{a: {{model: m, aliases: [{'x' * 201}]}}}}",
        "m.yaml:1: models.a.aliases[0]: not a name that requests can use: it has 201 characters, and 200 are the most",
        id="long name",
    ),
    pytest.param(
        'models: {a: {model: m, aliases: ["a\\x01"]}}',
        "m.yaml:1: models.a.aliases[0]: not a name that requests can use: it holds a character that can't be printed",
        id="control in name",
    ),
    pytest.param(
        "models: {a: {model: m, aliases: [--x]}}",
        "m.yaml:1: models.a.aliases[0]: not a name that requests can use: it begins with '-'",
        id="option as name",
    ),
    pytest.param(
        'models: {a: {model: m, api_key: "sesame\\n"}}',
        "m.yaml:1: models.a.api_key: holds characters that can't be sent in an HTTP header;"
        " check that it doesn't end in a newline",
        id="key with newline",
    ),
    pytest.param(
        "models: {a: {model: m, env: {A=B: c}}}",
        "m.yaml:1: models.a.env.A=B: not a name for an environment variable",
        id="bad variable name",
    ),
    pytest.param(
        "models: {a: {model: m}}\norchestrator: {port: 8080}",
        "m.yaml:2: orchestrator.port: gateway and orchestrator can't share one port; give one of them another",
        id="one port",
    ),
    pytest.param(
        "models: {a: {model: m}}\ndevice: {kind: simulated}",
        "m.yaml:2: device: 'ledger' goes with kind: simulated, and that needs it",
        id="simulated without ledger",
    ),
    pytest.param(
        "models: {a: {model: m, cwd: ~nobody-of-this-name/x}}",
        "m.yaml:1: models.a.cwd: Could not determine home directory.",
        id="nobody's home",
    ),
]


@pytest.mark.parametrize(("text", "expected"), ONE)
def test_one_problem_is_told_once_with_its_place_and_remedy(text: str, expected: str) -> None:
    """Each mistake gives exactly its own line."""
    assert problems(text) == [expected]


def test_all_problems_are_told_at_once_in_the_files_order() -> None:
    """One run shows everything there is to mend, types, rules and variables alike."""
    text = """\
models:
  a:
    engine: vlm
    alises: [x]
  b:
    engine: custom
    env: {K: "${SECRET}"}
  b c: {model: m, priority: high}
gateway: {prt: 1}
"""
    said = problems(text)
    assert [line.split(": ")[1] for line in said] == [
        "models.a.engine",
        "models.a.alises",
        "models.b",
        "models.b.env.K",
        "models.b c",
        "models.b c.priority",
        "gateway.prt",
    ]


def test_what_came_from_the_environment_is_never_shown() -> None:
    """A wrong value from a variable is described by its kind alone."""
    said = problems("models:\n  a:\n    model: m\n    concurrency: ${N}\n", {"N": "hush"})
    assert said == [
        "m.yaml:4: models.a.concurrency: wants a whole number, found a text; see the variable it comes from"
    ]


def test_a_long_value_is_cut_short() -> None:
    """A message stays readable whatever was written."""
    (said,) = problems(f"models: {{a: {{model: m, engine: {'v' * 500}}}}}")
    assert len(said) < 200 and "…" in said


def test_an_endless_number_is_not_printed() -> None:
    """Python refuses to print a number of thousands of digits; the message doesn't try."""
    (said,) = problems("models: {a: {model: m}}\ngateway: {port: 0x" + "f" * 6000 + "}")
    assert said == "m.yaml:2: gateway.port: must be at most 65535, found the number that is far too long"


def test_aliases_that_multiply_are_stopped() -> None:
    """Anchors that would grow to millions of values end in an error, not in a full memory."""
    text = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    assert any("too many values" in line for line in problems(text))


def test_no_file_says_how_to_make_one(tmp_path: Path) -> None:
    """A missing file is answered with the command that writes one."""
    file = tmp_path / "modelswap.yaml"
    with pytest.raises(ConfigError) as caught:
        load(file, {})
    assert str(caught.value) == (
        f"{file}: no such file; a commented one to start from: python -m modelswap.spec.example > {file}"
    )
    assert caught.value.problems[0].line is None


def test_what_is_no_readable_file_is_told_so(tmp_path: Path) -> None:
    """A folder, a file in another encoding, and a name no system takes are errors of the same kind."""
    with pytest.raises(ConfigError, match="a folder, not a file"):
        load(tmp_path, {})
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("models: {é: {model: m}}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"not UTF-8 \(byte 9\); save it as UTF-8 text"):
        load(latin, {})
    with pytest.raises(ConfigError, match="can't be read"):
        load(Path("a\0b"), {})
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="can't be read"):
        load(tmp_path / "loop", {})


def test_problems_are_data() -> None:
    """A problem can be shown by other means than its text."""
    with pytest.raises(ConfigError) as caught:
        loads("models:\n  a: {model: m, alises: [x]}", {}, "m.yaml")
    assert caught.value.problems == (
        Problem("m.yaml", 2, 17, "models.a.alises", "unknown key", "did you mean 'aliases'?"),
    )
    assert dotted(("models", "a", "args", 3)) == "models.a.args[3]"
