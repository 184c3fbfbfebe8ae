"""What a config file may not say of sleep, idleness and hooks."""

from __future__ import annotations

import pytest

from modelswap.spec.errors import ConfigError
from modelswap.spec.load import loads


def problems(text: str) -> list[str]:
    """Return what is wrong with a model that says ``text``."""
    with pytest.raises(ConfigError) as caught:
        loads(f"models: {{a: {{{text}}}}}", {"TOKEN": "secret"}, "m.yaml")
    return [str(problem).removeprefix("m.yaml:1: models.a.") for problem in caught.value.problems]


def hook(text: str, moment: str = "after_load") -> str:
    """Return the one problem of a hook that says ``text``."""
    (problem,) = problems(f"model: m, hooks: {{{moment}: [{{{text}}}]}}")
    assert problem.startswith(f"hooks.{moment}[0]")
    return problem.removeprefix(f"hooks.{moment}[0]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: m, sleep: maybe", "sleep: wants one of auto, on, off, found the text 'maybe'"),
        ("model: m, sleep: true", "sleep: wants one of auto, on, off, found true"),
        (
            "model: m, engine: llamacpp, sleep: on",
            "sleep: engine 'llamacpp' has no sleep; leave it out: it is stopped and started",
        ),
        (
            "model: m, device: none, sleep: on",
            "sleep: this model is never swapped out (device: none); leave it out",
        ),
        ("model: m, device: none, pin: true", "pin: this model is never swapped out (device: none); leave it out"),
        ("model: m, idle: stop", "idle: says what happens after 'ttl', which is not given; e.g. ttl: 1800"),
        ("model: m, ttl: 0", "ttl: must be more than 0, found the number 0"),
        ("model: m, standby: 1", "standby: wants true or false, found the number 1"),
    ],
)
def test_what_makes_no_sense_is_told(text: str, expected: str) -> None:
    """Each mistake gives exactly its own line, with its remedy."""
    assert problems(text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("timeout: 3", ": has neither 'url' nor 'command'; give one of them"),
        ("url: /x, command: [x]", ": has both a 'url' and a 'command'; give one of them"),
        ("command: []", ".command: names no program; e.g. command: [/usr/local/bin/tell, loaded]"),
        ("command: rm -rf x", ".command: wants a list, found the text 'rm -rf x'; write it as a list: [first, second]"),
        ("command: [x], body: {a: 1}", ".body: only with 'url'; leave it out"),
        ("command: [x], method: GET", ".method: only with 'url'; leave it out"),
        (
            "url: ftp://x/y",
            ".url: not a URL that can be called; e.g. http://127.0.0.1:9000/loaded, or /path of the engine",
        ),
        ("url: /x, timeout: 0", ".timeout: must be more than 0, found the number 0"),
        ("url: /x, on_failure: retry", ".on_failure: wants one of ignore, fail, found the text 'retry'"),
        (
            "url: /x, shell: true",
            ".shell: unknown key; the keys here are url, method, body, command, timeout, on_failure",
        ),
        ("url: /x, body: text", ".body: wants a mapping (key: value), found the text 'text'"),
    ],
)
def test_hooks_that_cannot_work_are_told(text: str, expected: str) -> None:
    """Each mistake in a hook gives exactly its own line, with its place in the list."""
    assert hook(text) == expected


def test_hooks_without_an_engine_have_no_path_of_it() -> None:
    """Before the load and after the unload nobody listens."""
    assert hook("url: /x", "before_load") == ".url: a path of the engine, which doesn't run then; give a whole URL"
    assert hook("url: /x", "after_unload") == ".url: a path of the engine, which doesn't run then; give a whole URL"


def test_an_unload_is_not_called_off() -> None:
    """A failure policy that could not be kept is refused."""
    for moment in ("before_unload", "after_unload"):
        said = hook("command: [x], on_failure: fail", moment)
        assert said.startswith(f".on_failure: 'fail' is not for {moment}, which can't be called off;")


def test_a_wrong_url_may_hold_a_token_and_is_not_shown() -> None:
    """What came from the environment stays out of messages."""
    assert "secret" not in hook('url: "htp://h/${TOKEN}"')
