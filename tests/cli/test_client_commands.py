"""The commands that talk to an orchestrator: what they print, and with which exit code they end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelswap.protocol.errors import Code, body

Run = Callable[..., Any]


def status() -> dict[str, Any]:
    """Return what ``GET /status`` answers in the middle of a swap."""
    return {
        "version": "0.1.0",
        "uptime_seconds": 75.0,
        "time": time.time(),
        "current_model": "mistral",
        "problems": [],
        "warnings": ["the database is read-only"],
        "models": [
            {
                "name": "mistral",
                "engine": "vllm",
                "aliases": ["m7"],
                "adapters": [],
                "device": "gpu0",
                "state": "ready",
                "resident": True,
                "waiting": 0,
                "oldest_wait": 0.0,
                "in_flight": 2,
                "swap_seconds": 12.5,
                "backoff_seconds": 0.0,
                "problem": "",
            },
            {
                "name": "llava",
                "engine": "custom",
                "device": "gpu0",
                "state": "failed",
                "resident": False,
                "waiting": 3,
                "oldest_wait": 4.5,
                "in_flight": 0,
                "swap_seconds": None,
                "backoff_seconds": 8.0,
                "problem": "exited with status 1: no such file",
            },
        ],
        "instances": [],
        "swaps": [
            {
                "device": "gpu0",
                "source": "mistral",
                "target": "llava",
                "phase": "drain",
                "seconds": 3.25,
                "phases": {},
            }
        ],
        "last_swaps": [
            {
                "at": time.time() - 30,
                "device": "gpu0",
                "source": None,
                "target": "mistral",
                "mechanism": "cold",
                "outcome": "ok",
                "seconds": 12.5,
                "queue": 0.0,
                "phases": {"drain": 0.0, "in": 12.4},
            }
        ],
        "devices": [
            {
                "name": "gpu0",
                "title": "A GPU",
                "kind": "nvml",
                "resident": "mistral",
                "problem": "",
                "memory": {"total": 24 * 2**30, "free": 6 * 2**30, "holders": []},
            }
        ],
        "gateways": [{"gateway": "a"}],
    }


def test_status_shows_everything_that_matters(fake: Any, command: Run) -> None:
    """Current model, queue, swap under way, last swaps, memory, warnings and failures are on the screen."""
    fake.answers["GET /status"] = (200, status())
    ran = command("status", "--url", fake.url)
    assert ran.code == 0
    for expected in (
        "current model: mistral\norchestrator ",
        "warning: the database is read-only",
        "swap under way: mistral → llava, waiting for running requests of mistral, 3.25 s so far",
        "ready, open",
        "failed, again in 8.00 s",
        "llava: exited with status 1: no such file",
        "nothing → mistral",
        "18.0 GiB of 24.0 GiB used",
    ):
        assert expected in ran.out


@pytest.mark.parametrize("columns", ["80", "120"])
def test_status_fits_the_terminal(fake: Any, command: Run, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    """No line is longer than the terminal is wide, so that no table falls apart."""
    monkeypatch.setenv("COLUMNS", columns)
    fake.answers["GET /status"] = (200, status())
    ran = command("status", "--url", fake.url)
    assert max(map(len, ran.out.splitlines())) <= int(columns)
    assert "…" not in ran.out


def test_status_of_an_idle_orchestrator_is_no_error(fake: Any, command: Run) -> None:
    """An orchestrator that has done nothing yet, and knows less than today's, can be shown, too."""
    fake.answers["GET /status"] = (200, {"current_model": None, "models": []})
    ran = command("status", "--url", fake.url)
    assert ran.code == 0
    assert "current model: none" in ran.out


def test_the_gateways_address_is_told_from_the_orchestrators(fake: Any, command: Run) -> None:
    """The gateway has a ``/status`` as well, of another shape."""
    fake.answers["GET /status"] = (200, {"current_model": "m", "orchestrator": {}, "models": {"m": {"state": "ready"}}})
    ran = command("status", "--url", fake.url)
    assert ran.code == 2
    assert "is not an orchestrator" in ran.err


def test_json_is_what_the_orchestrator_said(fake: Any, command: Run) -> None:
    """``--json`` prints the answer whole, for programs."""
    found = status()
    fake.answers["GET /status"] = (200, found)
    fake.answers["GET /models"] = (200, {"models": found["models"]})
    assert json.loads(command("status", "--json", "--url", fake.url).out) == found
    assert json.loads(command("models", "--json", "--url", fake.url).out) == {"models": found["models"]}


def test_models_lists_names_and_aliases(fake: Any, command: Run) -> None:
    """The table has each model with its state and its other names."""
    fake.answers["GET /models"] = (200, {"models": status()["models"]})
    ran = command("models", "--url", fake.url)
    assert "m7" in ran.out
    assert "llava" in ran.out


def test_swap_says_how_it_went(fake: Any, command: Run) -> None:
    """The result names mechanism, time, the model before and the address."""
    answer = {"model": "llava", "previous_model": "mistral", "mechanism": "cold", "seconds": 12.3}
    fake.answers["GET /status"] = (200, status())
    fake.answers["POST /ensure_model"] = (200, {**answer, "address": "127.0.0.1:9000"})
    ran = command("swap", "llava", "--url", fake.url)
    assert ran.out == "llava is ready: cold, 12.3 s (was mistral) at 127.0.0.1:9000\n"
    assert ("POST /ensure_model", {"model": "llava"}) in fake.asked


def test_swap_to_the_resident_model_says_so(fake: Any, command: Run) -> None:
    """Nothing had to be done."""
    answer = {"model": "llava", "previous_model": None, "mechanism": "resident", "seconds": 0.0}
    fake.answers["POST /ensure_model"] = (200, answer)
    assert command("swap", "llava", "--url", fake.url).out == "llava is ready: already resident\n"


@pytest.mark.parametrize(
    ("code", "status", "exit_code"),
    [
        (Code.MODEL_START_FAILED, 503, 4),
        (Code.MODEL_BROKEN, 503, 4),
        (Code.SWAP_TIMEOUT, 504, 4),
        (Code.MODEL_NOT_FOUND, 404, 2),
        (Code.ORCHESTRATOR_AWAY, 503, 3),
        (Code.INTERNAL, 500, 1),
    ],
)
def test_a_swap_that_fails_tells_why(fake: Any, command: Run, code: Code, status: int, exit_code: int) -> None:
    """The orchestrator's own words come on stderr, and the exit code says what kind of failure it is."""
    fake.answers["POST /ensure_model"] = (status, body(code, "it went wrong"))
    ran = command("swap", "llava", "--url", fake.url)
    assert ran.code == exit_code
    assert ran.err.startswith("error: it went wrong")
    assert ran.out == ""


def test_unload_says_what_it_did(fake: Any, command: Run) -> None:
    """One model, every model, and a model that wasn't there are told apart."""
    fake.answers["POST /unload"] = (200, {"model": "llava", "mechanism": "stop", "seconds": 1.5})
    assert command("unload", "llava", "--url", fake.url).out == "llava is unloaded (1.50 s)\n"
    fake.answers["POST /unload"] = (200, {"model": None, "mechanism": "stop", "seconds": 1.5})
    assert command("unload", "--url", fake.url).out == "everything is unloaded (1.50 s)\n"
    fake.answers["POST /unload"] = (200, {"model": "llava", "mechanism": "absent", "seconds": 0})
    assert command("unload", "llava", "--url", fake.url).out == "llava was not loaded\n"
    assert [asked for _, asked in fake.asked] == [{"model": "llava"}, {}, {"model": "llava"}]


def test_pinning_says_what_it_did(fake: Any, command: Run) -> None:
    """One model, or all that there are."""
    fake.answers["POST /pin"] = (200, {"model": "llava", "pinned": True, "status": "accepted"})
    assert "llava is pinned" in command("pin", "llava", "--url", fake.url).out
    fake.answers["POST /pin"] = (200, {"model": None, "pinned": False, "status": "accepted"})
    assert command("unpin", "--url", fake.url).out == "every model is not pinned any more\n"
    assert [asked for _, asked in fake.asked] == [{"model": "llava", "pinned": True}, {"pinned": False}]


def test_calibrate_prints_what_was_measured(fake: Any, command: Run) -> None:
    """Times, memory, and which way is off for which reason."""
    rows = [
        {"model": "llava", "mechanism": "cold", "ok": None, "reason": "", "steady_seconds": 31.5},
        {
            "model": "llava",
            "mechanism": "sleep1",
            "ok": False,
            "reason": "its answers are wrong",
            "first_seconds": 12.0,
            "steady_seconds": 1.25,
            "residue_bytes": 1 << 30,
            "host_bytes": 3 << 30,
        },
    ]
    fake.answers["POST /calibrate"] = (200, {"models": ["llava"], "measurements": rows, "status": "calibrated"})
    out = command("calibrate", "llava", "--url", fake.url).out
    for said in ("cold", "31.5 s", "sleep1", "off: its answers are", "12.0 s", "1.25 s", "1.0 GiB", "3.0 GiB"):
        assert said in out, out
    ran = command("calibrate", "llava", "--json", "--url", fake.url)
    assert json.loads(ran.out)["measurements"] == rows


def test_models_shows_how_each_is_put_out(fake: Any, command: Run) -> None:
    """Asleep or stopped, pinned or not, and which way is off."""
    off = {"mechanism": "sleep2", "ok": False, "reason": "garbage"}
    cold = {"mechanism": "cold", "first_seconds": 95.0, "steady_seconds": 31.5, "reference": " the quick"}
    models = [
        {"name": "a", "state": "ready", "sleep_level": 1, "pinned": True, "measurements": [off, cold]},
        {"name": "b", "state": "asleep", "sleep_level": 0, "measurements": []},
    ]
    fake.answers["GET /models"] = (200, {"models": models})
    out = command("models", "--url", fake.url).out
    for said in ("sleep, level 1", "(pinned)", "sleep2 is off:", "stop", "asleep", "95.0 s", "31.5 s", "' the quick'"):
        assert said in out, out


def test_logs_are_printed_as_they_are(fake: Any, command: Run) -> None:
    """Lines come out whole, also the last one without its end and bytes that are no text."""
    fake.answers["GET /logs/a%2Fb?lines=3"] = (200, b"one\ntwo \xff\nthr")
    assert command("logs", "a/b", "-n", "3", "--url", fake.url).out == "one\ntwo �\nthr\n"


def test_followed_logs_end_with_the_orchestrator(fake: Any, command: Run) -> None:
    """``--follow`` goes on until the stream ends."""
    fake.answers["GET /logs/m?lines=100&follow=1"] = (200, b"one\ntwo\n")
    assert command("logs", "m", "--follow", "--url", fake.url).out == "one\ntwo\n"


def test_nobody_there_is_exit_code_3_with_a_remedy(command: Run) -> None:
    """An orchestrator that isn't running is told in one line with what to do."""
    ran = command("status", "--url", "http://127.0.0.1:1")
    assert ran.code == 3
    assert ran.err == (
        "error: cannot reach the orchestrator at http://127.0.0.1:1 (nothing listens there)\n"
        "  → start it with `modelswap up`, or say where it is with --url\n"
    )


def test_something_else_there_is_told(fake: Any, command: Run) -> None:
    """Another server's 404, or its HTML, is not taken for an orchestrator's word."""
    assert command("status", "--url", fake.url).code == 2
    fake.answers["GET /status"] = (200, b"<html>")
    ran = command("status", "--url", fake.url)
    assert ran.code == 2
    assert "is not an orchestrator" in ran.err


def test_a_malformed_url_is_a_usage_error(command: Run) -> None:
    """Exit code 2, and an example of a right one."""
    ran = command("status", "--url", "ftp://x")
    assert ran.code == 2
    assert "http://127.0.0.1:8888" in ran.err


def test_the_address_comes_from_the_config_file(fake: Any, command: Run, tmp_path: Path) -> None:
    """Without --url the config file says where the orchestrator is."""
    port = fake.url.rpartition(":")[2]
    file = tmp_path / "m.yaml"
    file.write_text(
        f"models: {{a: {{engine: custom, command: [x, '{{port}}']}}}}\norchestrator: {{port: {port}, host: 0.0.0.0}}\n"
    )
    fake.answers["GET /models"] = (200, {"models": []})
    assert command("models", "--config", str(file)).code == 0


def test_a_broken_config_file_is_told_with_the_way_around_it(command: Run, tmp_path: Path) -> None:
    """Every problem is listed, and --url is offered."""
    file = tmp_path / "m.yaml"
    file.write_text("models: {}\nmodel: 1\ngatewy: {}\n")
    ran = command("status", "--config", str(file))
    assert ran.code == 2
    assert "m.yaml:2: model" in ran.err
    assert "m.yaml:3: gatewy" in ran.err
    assert "--url" in ran.err
