"""``modelswap pull``: what comes, what is said of it, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.weights.hub import Hub, Repository, serving

Run = Callable[..., Any]
LARGE = 9 << 20

CONFIG = """
models:
  small: {model: org/small, aliases: [s]}
  other: {model: org/other}
  gguf: {engine: llamacpp, model: /models/x.gguf}
  itself: {engine: llamacpp, model: "org/x-GGUF:Q4_K_M"}
"""
MANAGED = """
models:
  small: {model: org/small, image: "thing:v1"}
  again: {model: org/small, image: "thing:v1", pull: never}
docker: {host: "%s", hf_cache: "%s"}
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve two models, to a cache of the test's own."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    with serving() as hub:
        for name in ("org/small", "org/other"):
            hub.repositories[name] = Repository({"config.json": b"{}", "model.safetensors": os.urandom(LARGE)})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield hub


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a config file with models that are processes."""
    file = tmp_path / "modelswap.yaml"
    file.write_text(CONFIG)
    return file


def rows(out: str) -> dict[tuple[str, str], str]:
    """Return the table's lines by model and kind."""
    return {(line.split()[0], line.split()[1]): line for line in out.splitlines() if len(line.split()) > 3}


def test_all_models_are_pulled_and_the_second_time_nothing(command: Run, hub: Hub, config: Path) -> None:
    """The table says what came, what was there, and what isn't for us."""
    ran = command("pull", "-c", str(config))
    assert ran.code == 0
    table = rows(ran.out)
    for name in ("small", "other"):
        assert "downloaded" in table[name, "weights"]
        assert "9.0 MiB" in table[name, "weights"]
    assert "nothing to download" in table["gguf", "-"]
    assert "left to its engine" in table["itself", "weights"]
    assert "small: weights org/small: downloaded 9.0 MiB in " in ran.err
    asked = len(hub.asked)
    table = rows(command("pull", "-c", str(config)).out)
    assert "already here" in table["small", "weights"]
    assert len(hub.asked) == asked


def test_some_models_are_pulled_by_name_or_alias(command: Run, hub: Hub, config: Path) -> None:
    """Each once, and no other."""
    ran = command("pull", "s", "small", "-c", str(config))
    assert ran.code == 0
    assert set(rows(ran.out)) == {("model", "what"), ("small", "weights")}
    assert not [path for path in hub.asked if "org/other" in path]


def test_newer_asks_the_hub_about_what_is_here(command: Run, hub: Hub, config: Path) -> None:
    """A branch that has moved is followed."""
    assert command("pull", "small", "-c", str(config)).code == 0
    hub.repositories["org/small"].commit = "d00d" + "0" * 36
    hub.repositories["org/small"].files["config.json"] = b'{"new": 1}'
    assert "already here" in command("pull", "small", "-c", str(config)).out
    ran = command("pull", "small", "--newer", "-c", str(config))
    assert "10 B" in rows(ran.out)["small", "weights"]


def test_a_model_that_isnt_configured_is_wrong_usage(command: Run, hub: Hub, config: Path) -> None:
    """The message names those that are."""
    ran = command("pull", "nothing", "-c", str(config))
    assert ran.code == 2
    assert "no model is called nothing" in ran.err and "small, other, gguf" in ran.err
    assert not hub.asked


def test_one_failure_doesnt_keep_the_others(command: Run, hub: Hub, config: Path) -> None:
    """It is told with its remedy, and the exit code says that something failed."""
    del hub.repositories["org/small"]
    ran = command("pull", "-c", str(config))
    assert ran.code == 1
    table = rows(ran.out)
    assert "failed" in table["small", "weights"]
    assert "downloaded" in table["other", "weights"]
    assert "error: small: weights org/small: " in ran.err and "has no model org/small; mend 'model'" in ran.err


def started(config: Path, *, terminal: int | None = None) -> subprocess.Popen[bytes]:
    """Start the command as its user would."""
    argv = [sys.executable, "-m", "modelswap.cli.main", "pull", "small", "-c", str(config)]
    out = subprocess.PIPE if terminal is None else terminal
    return subprocess.Popen(argv, stdout=out, stderr=out, env={**os.environ, "COLUMNS": "120", "TERM": "xterm"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing_behind_but_what_came(
    command: Run, hub: Hub, config: Path, number: signal.Signals
) -> None:
    """It ends with 130 and the table, the download has ended, too, and the next time goes on."""
    hub.stall_after = LARGE // 2
    with started(config) as pulling:
        assert hub.stalled.wait(60)
        (download,) = psutil.Process(pulling.pid).children()
        pulling.send_signal(number)
        out, err = pulling.communicate(timeout=60)
    assert pulling.returncode == 130
    assert not download.is_running()
    assert "interrupted" in rows(out.decode())["small", "weights"]
    assert b"interrupted; what came is kept" in err
    assert b"Traceback" not in err
    hub.stall_after = None
    hub.go_on.set()
    assert command("pull", "small", "-c", str(config)).code == 0


def test_a_terminal_gets_bars(hub: Hub, config: Path) -> None:
    """With percentage and bytes, and the cursor is shown again at the end."""
    hub.stall_after = LARGE // 2
    ours, theirs = pty.openpty()
    with started(config, terminal=theirs) as pulling:
        os.close(theirs)
        said = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # what Linux says at a terminal's end
                break
            if not chunk:
                break
            said += chunk
            if b"MiB of 9.0 MiB" in said:
                hub.go_on.set()
    os.close(ours)
    assert pulling.returncode == 0
    text = said.decode()
    assert "small weights" in text and "100%" in text and "4.0 MiB of 9.0 MiB" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def docker(fake: Any, *, here: bool) -> None:
    """Have the fake answer as a Docker that can pull ``thing:v1``."""
    image = {"Id": "sha256:1", "Size": 5 << 20, "Config": {}}
    images = iter([(404, {"message": "No such image"})] if not here else [])
    stream = [
        {"status": "Pulling fs layer", "id": "a", "progressDetail": {}},
        {"status": "Pull complete", "id": "a", "progressDetail": {}},
        {"status": "Status: Downloaded newer image for thing:v1"},
    ]
    fake.answers = {
        "GET /version": (200, {"ApiVersion": "1.41", "MinAPIVersion": "1.24"}),
        "GET /v1.41/images/thing:v1/json": lambda: next(images, (200, image)),
        "POST /v1.41/images/create?fromImage=thing:v1": (200, b"".join(json.dumps(s).encode() + b"\n" for s in stream)),
    }


def test_a_cache_that_no_disk_can_hold_fails_alone(
    command: Run, hub: Hub, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is too long: told as any other failure."""
    monkeypatch.setattr("modelswap.weights.places.on_host", lambda: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / ("n" * 300)))
    ran = command("pull", "-c", str(config))
    assert ran.code == 1 and "failed" in rows(ran.out)["small", "weights"]
    assert "File name too long" in ran.err


@pytest.mark.parametrize("here", [False, True])
def test_images_of_managed_models_are_pulled_once(
    command: Run, hub: Hub, fake: Any, tmp_path: Path, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their weights land in the cache that their containers share."""
    monkeypatch.setattr("modelswap.weights.places.on_host", lambda: True)
    docker(fake, here=here)
    file, shared = tmp_path / "m.yaml", tmp_path / "shared"
    file.write_text(MANAGED % (fake.url.replace("http", "tcp"), shared))
    ran = command("pull", "-c", str(file))
    assert ran.code == 0, ran.err
    table = rows(ran.out)
    assert ("already here" if here else "downloaded") in table["small", "image"]
    assert "5.0 MiB" in table["small", "image"]
    assert "already here" in table["again", "image"]
    assert "downloaded" in table["small", "weights"] and "already here" in table["again", "weights"]
    assert (shared / "hub" / "models--org--small").is_dir()
    assert len([asked for asked, _ in fake.asked if "images/create" in asked]) == (0 if here else 1)


def test_a_docker_that_is_away_doesnt_keep_weights(
    command: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image's failure is told, and the weights come all the same."""
    monkeypatch.setattr("modelswap.weights.places.on_host", lambda: True)
    monkeypatch.setattr("modelswap.cli.pull_images._PATIENCE", 0.1)
    file = tmp_path / "m.yaml"
    file.write_text(MANAGED % (f"unix://{tmp_path}/none.sock", tmp_path / "shared"))
    ran = command("pull", "small", "-c", str(file))
    assert ran.code == 1
    assert "failed" in rows(ran.out)["small", "image"] and "downloaded" in rows(ran.out)["small", "weights"]
    assert "Docker can't be reached" in ran.err


def test_weights_of_a_cache_that_we_dont_see_are_left_to_the_engine(
    command: Run, hub: Hub, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume of Docker's, seen from its machine."""
    monkeypatch.setattr("modelswap.weights.places.on_host", lambda: True)
    docker(fake, here=True)
    file = tmp_path / "m.yaml"
    file.write_text(MANAGED % (fake.url.replace("http", "tcp"), "a-volume"))
    ran = command("pull", "small", "-c", str(file))
    assert "left to its engine" in rows(ran.out)["small", "weights"]
    assert not hub.asked
