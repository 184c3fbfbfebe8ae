"""``check``, ``--help`` and ``version``, and that neither costs a user's patience."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import modelswap
from modelswap.cli import main

Run = Callable[..., Any]

COMMANDS = [
    "up", "orchestrator", "gateway", "demo", "check", "doctor", "status", "swap", "unload", "pull",
    "models", "logs", "version",
]  # fmt: skip

GOOD = """
models:
  small: {engine: custom, command: [%s, "{port}"], aliases: [s]}
"""

ODD = """
models:
  a: {engine: custom, command: [no-such-program-anywhere, "{port}"]}
  b: {engine: custom, command: [/no/such/program]}
  c: {engine: custom, command: [%s, "{port}"], cwd: /no/such/folder}
gateway: {port: 0}
orchestrator: {host: 0.0.0.0}
scheduling: {max_wait: 600}
"""


def test_check_accepts_a_right_file_without_warnings(command: Run, tmp_path: Path) -> None:
    """A right file is said to be valid, and summed up."""
    file = tmp_path / "m.yaml"
    file.write_text(GOOD % sys.executable)
    ran = command("check", "-c", str(file))
    assert ran.code == 0
    assert f"{file} is valid" in ran.out
    assert "small" in ran.out
    assert "warning" not in ran.out


def test_check_warns_about_what_looks_wrong(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing programs and folders, a command without its port, no port, an open host: each is named."""
    monkeypatch.setattr("modelswap.cli.check._IN_A_CONTAINER", tmp_path / "none")
    file = tmp_path / "m.yaml"
    file.write_text(ODD % sys.executable)
    ran = command("check", "-c", str(file))
    assert ran.code == 0
    for expected in (
        "gateway.port is 0",
        "orchestrator.host is 0.0.0.0",
        "scheduling.max_wait",
        "models.a: no-such-program-anywhere is not on PATH",
        "models.b: there is no program /no/such/program",
        "models.b: its command has no {port}, so it can't listen where modelswap expects it: add {port}",
        "models.c: cwd /no/such/folder is not a folder",
    ):
        assert f"warning: {expected}" in ran.out


CONTAINERS = """
models:
  here: {engine: custom, command: [%s, "{port}"]}
  old: {container: mistral-llm, model: org/mistral}
  svc: {compose_service: coder-llm, model: org/coder}
  new: {image: "vllm/vllm-openai:v1", model: org/llava}
"""

ODD_CONTAINERS = """
models:
  b: {image: i, model: /models/x, volumes: ["/srv:/srv"]}
  c: {image: i, model: m, args: [-tp, 2], gpus: [0]}
  d: {image: i, model: m, gpus: none}
  e: {engine: custom, image: i, command: [serve]}
  f: {engine: sglang, image: i, model: m, args: [--tp-size, 4], gpus: [0, 1]}
docker: {host: "tcp://10.1.2.3:2375"}
"""


def test_check_says_what_hosts_each_model(command: Run, tmp_path: Path) -> None:
    """A process, a container, a compose service, an image; nothing of them is looked for on this machine."""
    file = tmp_path / "m.yaml"
    file.write_text(CONTAINERS % sys.executable)
    ran = command("check", "-c", str(file))
    assert ran.code == 0 and "warning" not in ran.out
    rows = {line.split()[0]: line for line in ran.out.splitlines() if line.split()}
    assert " a process " in rows["here"] and " container mistral-llm " in rows["old"]
    assert " compose service coder-llm " in rows["svc"] and " image vllm/vllm-openai:v1 " in rows["new"]


def test_check_warns_about_containers_that_look_wrong(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that no volume brings, too few GPUs, an open Docker: each is named."""
    monkeypatch.delenv("DOCKER_TLS_VERIFY", raising=False)
    file = tmp_path / "m.yaml"
    file.write_text(ODD_CONTAINERS)
    warned = [line for line in command("check", "-c", str(file)).out.splitlines() if line.startswith("warning: ")]
    expected = (
        "docker.host is tcp://10.1.2.3:2375: without TLS",
        "models.b: no volume puts /models/x into its container",
        "models.c: --tensor-parallel-size 2 needs 2 GPUs, and 'gpus' names 1",
        "models.d: with gpus: none it takes a turn on a GPU that it can't see: say device: none",
        "models.e: its command has no {port}, so it can't listen where modelswap expects it: add {port}, or say its",
        "models.f: --tensor-parallel-size 4 needs 4 GPUs, and 'gpus' names 2",
    )
    assert len(warned) == len(expected)
    assert all(line.startswith(f"warning: {start}") for line, start in zip(warned, expected, strict=True))


def test_check_survives_names_that_are_too_long(command: Run, tmp_path: Path) -> None:
    """Of a model, of its working folder and of the program: no file system takes them."""
    file, name = tmp_path / "m.yaml", "n" * 300
    file.write_text(
        f"models:\n  a: {{model: {name}, program: [{sys.executable}]}}\n  b: {{model: /{name}, program: [/{name}]}}\n"
        f"  c: {{engine: llamacpp, model: {name}, program: [{sys.executable}]}}\n"
        f"  d: {{engine: custom, command: [{sys.executable}, '{{port}}'], cwd: /{name}}}\n"
        f"  e: {{engine: sglang, model: ~/{name}, program: [{sys.executable}]}}\n"
    )
    ran = command("check", "-c", str(file))
    assert ran.code == 0, ran.err
    for words in (
        f"there is no program /{name}",
        f"there is no /{name}",
        f"cwd /{name} is not",
        f"there is no ~/{name}",
    ):
        assert words in ran.out


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ("{host: 'tcp://127.0.0.1:2375'}", False),
        ("{host: 'tcp://[::1]:2375'}", False),
        ("{host: 'tcp://docker-proxy:2375'}", False),
        ("{host: 'unix:///run/docker.sock'}", False),
        ("{host: 'tcp://gpu.example.org:2375'}", True),
    ],
)
def test_check_knows_a_docker_that_only_we_reach(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, warned: bool
) -> None:
    """Loopback, a socket and a compose project's own proxy are as they should be; TLS makes the rest so."""
    monkeypatch.delenv("DOCKER_TLS_VERIFY", raising=False)
    file = tmp_path / "m.yaml"
    file.write_text(CONTAINERS % sys.executable + f"docker: {given}")
    assert ("docker.host" in command("check", "-c", str(file)).out) is warned
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    assert "docker.host" not in command("check", "-c", str(file)).out


def test_in_a_container_an_open_host_is_no_warning(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it must be open, and what is published decides who reaches it."""
    mark, file = tmp_path / "mark", tmp_path / "m.yaml"
    monkeypatch.setattr("modelswap.cli.check._IN_A_CONTAINER", mark)
    file.write_text(GOOD % sys.executable + "orchestrator: {host: 0.0.0.0}")
    assert "orchestrator.host" in command("check", "-c", str(file)).out
    mark.touch()
    assert "orchestrator.host" not in command("check", "-c", str(file)).out


def test_check_lists_every_problem_and_ends_with_2(command: Run, tmp_path: Path) -> None:
    """A wrong file is an error that names file, line and key."""
    file = tmp_path / "m.yaml"
    file.write_text("models:\n  a: {engin: custom, command: 5}\n")
    ran = command("check", "-c", str(file))
    assert ran.code == 2
    assert f"{file}:2: models.a.engin" in ran.err
    assert "did you mean 'engine'" in ran.err


def test_a_missing_file_is_told(command: Run, tmp_path: Path) -> None:
    """The remedy is in the message."""
    ran = command("up", "--config", str(tmp_path / "none.yaml"))
    assert ran.code == 2
    assert "no such file" in ran.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(command: Run, name: str) -> None:
    """Each command's help has an example and the exit codes."""
    ran = command(name, "--help")
    assert ran.code == 0
    assert f"modelswap {name}" in ran.out
    assert "Exit codes" in ran.out


def test_help_lists_every_command(command: Run) -> None:
    """No command is hidden."""
    out = command("--help").out
    assert all(f" {name} " in out for name in COMMANDS)


def test_version_is_the_packages(command: Run) -> None:
    """The version printed is the one installed."""
    assert command("version").out == f"modelswap {modelswap.__version__}\n"


def test_wrong_usage_ends_with_2(command: Run) -> None:
    """A missing argument and an unknown command are usage errors."""
    assert command("swap").code == 2
    assert command("explode").code == 2


def test_help_and_version_import_nothing_heavy() -> None:
    """What makes start-up slow is imported only by the commands that need it."""
    code = (
        "import sys, modelswap.cli.main\n"
        "heavy = {'aiohttp', 'pydantic', 'uvicorn', 'starlette', 'yaml', 'structlog', 'asyncio', 'psutil'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_a_bug_is_one_line_with_a_remedy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is shown a traceback who didn't ask for it."""

    def broken(argv: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(main, "app", broken)
    monkeypatch.delenv("MODELSWAP_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        main.run(["status"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: ZeroDivisionError: oops\n  → this is a bug")
    monkeypatch.setenv("MODELSWAP_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main.run(["status"])
