"""The engine of the user's own."""

from __future__ import annotations

import pytest

from modelswap.engines.base import Address
from modelswap.engines.custom import Custom
from modelswap.engines.options import given, value
from modelswap.protocol.errors import ModelswapError
from modelswap.spec.config import Model

ADDRESS = Address("127.0.0.1", 8123)


def test_host_and_port_are_replaced_everywhere_and_other_braces_stay() -> None:
    """JSON in an argument survives; command, args and values of env all get the address."""
    model = Model.model_validate(
        {
            "engine": "custom",
            "command": ["serve", "{host}:{port}", '{"a": {"b": 1}}'],
            "args": ["--url=http://{host}:{port}/{port}"],
            "env": {"PORT": "{port}", "X": "{x}"},
            "cwd": "/srv",
        }
    )
    launch = Custom().launch("ours", model, ADDRESS)
    assert launch.argv == ("serve", "127.0.0.1:8123", '{"a": {"b": 1}}', "--url=http://127.0.0.1:8123/8123")
    assert launch.env == {"PORT": "8123", "X": "{x}"}
    assert launch.cwd == "/srv"


def test_without_a_command_there_is_nothing_to_start() -> None:
    """A config that was not made by the loader is told the same."""
    with pytest.raises(ModelswapError, match=r"models\.ours: engine 'custom' needs a 'command'"):
        Custom().launch("ours", Model(engine="custom"), ADDRESS)


def test_the_server_knows_its_own_name_for_the_model() -> None:
    """``model`` is what requests are rewritten to, else our name."""
    assert Custom().upstream_name("ours", Model(engine="custom", model="llava")) == "llava"
    assert Custom().upstream_name("ours", Model(engine="custom")) == "ours"


def test_slots_are_four_by_default() -> None:
    """Nobody knows what a server takes at once; four is told in the docs."""
    assert Custom().slots(Model(engine="custom")) == 4


@pytest.mark.parametrize(
    ("exit_code", "log", "permanent", "said"),
    [
        (
            2,
            "usage: serve [-h] --port PORT\nserve: error: unrecognized arguments: --prt 3",
            True,
            "it doesn't accept its command line: unrecognized arguments: --prt 3; mend 'command' or 'args'",
        ),
        (1, "loading\nfatal: no weights\nbye", False, "it exited with status 1: fatal: no weights"),
        (1, "", False, "it exited with status 1 and said nothing"),
        (1, "\x1b[31mRuntimeError: boom\x1b[0m\n  at x", False, "it exited with status 1: RuntimeError: boom"),
        (None, "", False, "it did not become ready and said nothing"),
    ],
)
def test_its_last_words(exit_code: int | None, log: str, permanent: bool, said: str) -> None:
    """A wrong command line is wrong again; else the last line that sounds like an error is told."""
    diagnosis = Custom().diagnose(exit_code, log.splitlines())
    assert (diagnosis.reason, diagnosis.permanent) == (said, permanent)


def test_options_are_read_as_the_engines_read_them() -> None:
    """Both forms, dashes or underscores in long names, the last one wins, and short names are exact."""
    args = ["-n", "1", "--a-b=2", "--a_b", "3", "--last"]
    assert value(args, "--a-b") == "3"
    assert value(args, "-n") == "1"
    assert value(args, "--last") is None and given(args, "--last")
    assert value(args, "--none") is None and not given(args, "--none", "-m")
