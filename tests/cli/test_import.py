"""``modelswap import``: files written and refused, the summary, and that ``check`` accepts what comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.importing.reading import text

Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, without the variables of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "VLLM_API_KEY", "COMPOSE_PROJECT_NAME", "VLLM_TAG", "HF_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("way", ["--adopted", "--managed"])
def test_a_compose_file_becomes_a_config_that_check_accepts(
    command: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The file is written with its account at the end; once the variables are set, `check` is content."""
    (folder / "compose.yaml").write_text(text("stack.yaml"))
    ran = command("import", "compose", "compose.yaml", way)
    assert (ran.code, ran.out) == (0, "")
    assert "3 models in compose.yaml → modelswap.yaml" in ran.err
    for expected in ("mistral-llm", "Works differently now", "Next", "set VLLM_API_KEY", "modelswap check"):
        assert expected in ran.err
    assert ("modelswap pull" if way == "--managed" else "docker compose create mistral-llm") in ran.err
    written = (folder / "modelswap.yaml").read_text()
    assert "# Works differently now:" in written
    assert command("check").code == 2
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert command("check").code == 0


def test_a_llama_swap_file_becomes_a_config_that_check_accepts(
    command: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does llama-swap's, under another name."""
    (folder / "config.yaml").write_text(text("llama-swap.yaml"))
    ran = command("import", "llama-swap", "config.yaml", "-o", "new.yaml")
    assert ran.code == 0
    assert "6 models in config.yaml → new.yaml" in ran.err
    assert "Not carried over" in ran.err
    assert "modelswap up -c new.yaml" in ran.err
    for name in ("HF_TOKEN", "VLLM_API_KEY", "HOME"):
        monkeypatch.setenv(name, "x")
    assert command("check", "-c", "new.yaml").code == 0


def test_nothing_is_replaced_unless_forced(command: Run, folder: Path) -> None:
    """An existing file stays as it is; `--force` replaces it."""
    (folder / "compose.yaml").write_text(text("stack.yaml"))
    (folder / "modelswap.yaml").write_text("mine")
    ran = command("import", "compose")
    assert ran.code == 2
    assert "modelswap.yaml exists already" in ran.err
    assert "--force" in ran.err
    assert (folder / "modelswap.yaml").read_text() == "mine"
    assert command("import", "compose", "--force").code == 0
    assert "mistral" in (folder / "modelswap.yaml").read_text()


def test_a_dash_prints_the_file_and_nothing_else(command: Run, folder: Path) -> None:
    """Standard output is the config alone; the summary goes to standard error."""
    (folder / "docker-compose.yml").write_text(text("stack.yaml"))
    ran = command("import", "compose", "-o", "-")
    assert ran.code == 0
    assert list(yaml.safe_load(ran.out)["models"]) == ["mistral", "coder-llm", "llava"]
    assert "3 models in docker-compose.yml" in ran.err
    assert not (folder / "modelswap.yaml").exists()


def test_several_files_and_the_override_that_compose_would_read(command: Run, folder: Path) -> None:
    """Files lie over each other however they are given; the override counts only where Compose reads it, too."""
    (folder / "compose.yaml").write_text("services: {a: {image: vllm/vllm-openai, command: --model org/a}}")
    (folder / "compose.override.yaml").write_text("services: {a: {command: --model org/over}}")
    (folder / "b.yaml").write_text("services: {a: {command: --model org/b}}")

    def loads(*arguments: str) -> str:
        ran = command("import", "compose", *arguments, "-o", "-")
        return str(yaml.safe_load(ran.out)["models"]["a"]["model"])

    assert loads() == loads("compose.yaml") == "org/over"
    assert loads("compose.yaml", "-f", "b.yaml") == loads("-f", "compose.yaml", "-f", "b.yaml") == "org/b"


@pytest.mark.parametrize(
    ("arguments", "said", "remedy"),
    [
        (["compose"], "there is no compose file here", "name it"),
        (["compose", "gone.yaml"], "gone.yaml: no such file", "name an existing"),
        (["llama-swap", "gone.yaml"], "gone.yaml: no such file", "config.yaml"),
        (["compose", "swap.yaml"], "llama-swap's config", "modelswap import llama-swap"),
        (["llama-swap", "stack.yaml"], "this is a compose file", "modelswap import compose"),
        (["compose", "broken.yaml"], "broken.yaml:2: not YAML", "mend"),
        (["compose", "latin.yaml"], "latin.yaml: not UTF-8 (byte 0)", "UTF-8"),
        (["llama-swap", "latin.yaml"], "latin.yaml: not UTF-8 (byte 0)", "UTF-8"),
        (["compose", "."], "can't be read: Is a directory", ""),
        (["compose", "web.yaml"], "none of its services (web)", "engine: custom"),
        (["compose", "bad.yaml", "--managed"], "not a valid config", "mend that"),
        (["compose", "stack.yaml", "-o", "no/such/folder.yaml"], "can't be written", "-o"),
    ],
)
def test_what_cannot_be_imported_ends_with_its_remedy(
    command: Run, folder: Path, arguments: list[str], said: str, remedy: str
) -> None:
    """Nothing is written, and the message says what to do."""
    (folder / "swap.yaml").write_text(text("llama-swap.yaml"))
    (folder / "stack.yaml").write_text(text("stack.yaml"))
    (folder / "broken.yaml").write_text("services: {}\n}\n")
    (folder / "latin.yaml").write_bytes(b"\xe9: 1")
    (folder / "web.yaml").write_text("services: {web: {image: nginx}}")
    (folder / "bad.yaml").write_text("services: {a: {image: 'vllm/vllm-openai:BAD TAG', command: --model org/a}}")
    before = set(folder.iterdir())
    ran = command("import", *arguments)
    assert ran.code in (1, 2)
    assert said in ran.err
    assert remedy in ran.err
    assert set(folder.iterdir()) == before


def test_the_help_names_both(command: Run) -> None:
    """`modelswap import` alone tells what there is."""
    ran = command("import", "--help")
    assert ran.code == 0
    assert "compose" in ran.out
    assert "llama-swap" in ran.out
