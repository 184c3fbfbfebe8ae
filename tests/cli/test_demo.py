"""The demo from end to end on simulated engines, and what it prepares before it starts."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from modelswap.cli import demo
from modelswap.cli.failure import ExitCode, Failure
from modelswap.spec.load import load
from tests.ports import free_port

DEADLINE = 90.0


def plain() -> tuple[Console, io.StringIO]:
    """Return a console that is no terminal, and what is printed on it."""
    out = io.StringIO()
    return Console(file=out, width=100), out


def ports() -> tuple[int, int]:
    """Return two free ports."""
    return free_port(), free_port()


def test_the_config_it_writes_is_right(tmp_path: Path) -> None:
    """Both models load the same weights under different arguments, with a state folder for these ports alone."""
    config = load(demo.write_config(tmp_path / "demo", tmp_path / "w.gguf", 18080, 18888))
    chat, coder = config.models[demo.CHAT], config.models[demo.CODER]
    assert chat.model == coder.model == str(tmp_path / "w.gguf")
    assert chat.args != coder.args
    assert (config.gateway.port, config.orchestrator.port) == (18080, 18888)
    assert config.orchestrator.state_dir == tmp_path / "demo" / "state-18080"


def test_ports_that_are_free_are_used() -> None:
    """Without need, nothing is said and nothing changed."""
    console, out = plain()
    wanted = ports()
    assert demo.choose_ports(*wanted, console) == wanted
    assert out.getvalue() == ""


def test_ports_that_are_taken_are_replaced_and_told() -> None:
    """A taken gateway port, and an orchestrator port equal to the gateway's, give way to free ones."""
    console, out = plain()
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        chosen = demo.choose_ports(taken, taken, console)
    assert taken not in chosen
    assert chosen[0] != chosen[1]
    assert f"port {taken} is taken by" in out.getvalue()
    assert f"the gateway uses {chosen[0]} instead" in out.getvalue()


def test_without_the_engine_the_remedy_is_told(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing OpenVINO GenAI is one line and a pip command."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = command("demo", "--once")
    assert ran.code == 1
    assert "OpenVINO GenAI, is not installed" in ran.err
    assert "pip install 'modelswap[openvino]'" in ran.err


def test_weights_that_can_not_be_had_are_told(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The reason comes from the weights' own error."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setenv("MODELSWAP_WEIGHTS", str(tmp_path / "none.gguf"))
    ran = command("demo", "--once")
    assert ran.code == 1
    assert "none.gguf" in ran.err


def write_simulated(folder: Path, gateway: int, orchestrator: int, extra: tuple[str, ...] = ()) -> Path:
    """Write a config with the demo's models on simulated engines."""
    engine = [sys.executable, "-m", "modelswap.testing.engine", "--port", "{port}", *extra]
    models = {name: {"engine": "custom", "command": [*engine, "--model", name]} for name in (demo.CHAT, demo.CODER)}
    config = {
        "models": models,
        "gateway": {"port": gateway},
        "orchestrator": {"port": orchestrator, "state_dir": str(folder / "state")},
        "scheduling": {"linger": 0.0},
        "device": {"kind": "slot"},
    }
    path = folder / "modelswap.yaml"
    path.write_text(json.dumps(config))
    return path


def test_once_shows_the_answers_and_the_table_and_ends(tmp_path: Path) -> None:
    """Requests force swaps, every answer is printed, the table has a row for each, and the status is 0."""
    console, out = plain()
    path = write_simulated(tmp_path, *ports())
    assert demo.present(console, path, tmp_path / "log", once=True) == ExitCode.OK
    text = out.getvalue()
    rows = [line.split() for line in text.partition("What happened")[2].splitlines() if "smol-" in line]
    requests = [model for turn in demo.TURNS for model, _ in turn]
    assert [row[1] for row in rows] == requests
    assert {row[2] for row in rows} == {"cold", "resident"}
    for turn in demo.TURNS:
        for _, prompt in turn:
            assert prompt in text
    assert "serving" in (tmp_path / "log").read_text()


def test_a_failed_request_is_shown_and_is_exit_code_1(tmp_path: Path) -> None:
    """An engine that can't start fails the demo with the engine's own words."""
    console, out = plain()
    path = write_simulated(tmp_path, *ports(), extra=("--no-such-option",))
    assert demo.present(console, path, tmp_path / "log", once=True) == ExitCode.FAILED
    assert "failed:" in out.getvalue()
    assert "--no-such-option" in out.getvalue()


def test_services_that_can_not_start_show_their_log(tmp_path: Path) -> None:
    """What the services said is in the error, since their log went to a file."""
    console, _ = plain()
    path = write_simulated(tmp_path, *ports())
    state = tmp_path / "state"
    state.mkdir()
    (state / "token").mkdir()
    with pytest.raises(Failure) as failed:
        demo.present(console, path, tmp_path / "log", once=True)
    assert failed.value.code == ExitCode.USAGE


STAY = """
import sys
from pathlib import Path
from rich.console import Console
from modelswap.cli.demo import present
path = Path(sys.argv[1])
sys.exit(present(Console(width=100), path, path.with_name("log"), once=False))
"""


def test_it_stays_up_until_ctrl_c(tmp_path: Path) -> None:
    """After the table it says what to try, and Ctrl-C ends it with status 0."""
    path = write_simulated(tmp_path, *ports())
    argv = [sys.executable, "-u", "-c", STAY, str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUTF8": "1"}) as process:
        too_late = threading.Timer(DEADLINE, process.kill)
        too_late.start()
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if "Ctrl-C stops everything" in line:
                    process.send_signal(signal.SIGINT)
            assert process.wait() == 0
        finally:
            too_late.cancel()
            process.kill()
    text = "".join(lines)
    assert "curl http://127.0.0.1:" in text
    assert text.endswith("stopped\n")
