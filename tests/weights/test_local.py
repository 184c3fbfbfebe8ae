"""Which files a start loads, where the config names them by their paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelswap.engines.openvino_server.store import Folder
from modelswap.spec.config import Model
from modelswap.weights import local


def made(folder: Path, *names: str) -> Path:
    """Make a folder with these files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def here(source: str) -> Path | None:
    """See Docker's folders, but not its volumes."""
    return Path(source) if source.startswith("/") else None


def found(folder: Path, env: dict[str, str] | None = None, **fields: Any) -> list[str]:
    """Return what is found for a model, by paths from ``folder``."""
    files = local.files(Model(**fields), env or {}, seen=here)
    return [str(file.relative_to(folder)) for file in files]


def test_a_gguf_file(tmp_path: Path) -> None:
    """By its path, or seen from the engine's working folder; and what else llama.cpp is told to load."""
    made(tmp_path, "a.gguf", "draft.gguf", "vision.gguf", "unasked.gguf")
    assert found(tmp_path, engine="llamacpp", model=str(tmp_path / "a.gguf")) == ["a.gguf"]
    args = ["--model-draft", "draft.gguf", "--mmproj=vision.gguf"]
    files = found(tmp_path, engine="llamacpp", model="a.gguf", cwd=tmp_path, args=args)
    assert files == ["a.gguf", "vision.gguf", "draft.gguf"]


def test_all_parts_of_a_gguf_file_that_was_split(tmp_path: Path) -> None:
    """The first one is named, and leads to the others."""
    names = [f"big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    made(tmp_path, *names, "big-00001-of-00002.gguf")
    assert found(tmp_path, engine="llamacpp", model=str(tmp_path / names[0])) == names


def test_a_folder_of_safetensors(tmp_path: Path) -> None:
    """What vLLM takes of it: one format's weights, configuration, tokenizer; a draft model's, too."""
    made(tmp_path / "m", "config.json", "model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth")
    made(tmp_path / "d", "config.json", "model.safetensors")
    args = ["--speculative-config", f'{{"model": "{tmp_path / "d"}"}}']
    expected = ["m/config.json", "m/model.safetensors"]
    assert found(tmp_path, model=str(tmp_path / "m")) == expected
    assert found(tmp_path, engine="sglang", model=str(tmp_path / "m")) == expected
    assert found(tmp_path, model=str(tmp_path / "m"), args=args) == [*expected, "d/config.json", "d/model.safetensors"]


def test_an_openvino_folder(tmp_path: Path) -> None:
    """All of it."""
    made(tmp_path, "openvino_model.bin", "openvino_model.xml")
    files = found(tmp_path, engine="openvino", model=str(tmp_path))
    assert files == ["openvino_model.bin", "openvino_model.xml"]


def test_a_gguf_file_for_openvino_until_it_was_converted(tmp_path: Path) -> None:
    """Then what it was converted into is loaded in its place; what was made of other files isn't."""
    gguf = made(tmp_path, "a.gguf") / "a.gguf"
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    cache = tmp_path / "modelswap" / "openvino"
    assert found(tmp_path, env, engine="openvino", model=str(gguf)) == ["a.gguf"]
    for number, source in enumerate(("/elsewhere/a.gguf", str(gguf.resolve()))):
        with Folder(cache / f"a-{number}" / "model").fill({"source": source}) as folder:
            (folder / "weights.bin").write_text("converted")
    (cache / "a-1" / "compiled-CPU").mkdir()
    (cache / "a-1" / "compiled-CPU" / "blob").write_text("compiled")
    files = found(cache / "a-1", env, engine="openvino", model=str(gguf))
    assert "model/weights.bin" in files
    assert "compiled-CPU/blob" in files
    assert found(tmp_path, env, engine="openvino", model=str(gguf), args=["--cache-dir", "/none"]) == ["a.gguf"]


def test_a_containers_folder_is_found_behind_its_mount(tmp_path: Path) -> None:
    """The nearest one counts."""
    made(tmp_path, "host/a.gguf", "other/a.gguf")
    volumes = [f"{tmp_path / 'other'}:/models:ro", f"{tmp_path / 'host'}:/models/mine"]
    files = found(tmp_path, engine="llamacpp", image="llama.cpp", model="/models/mine/a.gguf", volumes=volumes)
    assert files == ["host/a.gguf"]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"engine": "llamacpp", "model": "org/name:Q4_K_M"}, id="of the hub"),
        pytest.param({"engine": "llamacpp", "model": "/nowhere/a.gguf"}, id="not there"),
        pytest.param({"engine": "openvino", "model": "/nowhere"}, id="not there, either"),
        pytest.param({"model": "org/name"}, id="of the hub, which is asked elsewhere"),
        pytest.param({}, id="no model named"),
        pytest.param({"image": "vllm", "model": "/models/m"}, id="within an image"),
        pytest.param({"image": "vllm", "model": "/models/m", "volumes": ["models:/models"]}, id="in a volume"),
        pytest.param({"image": "vllm", "model": "relative/path/m"}, id="seen from a container's folder"),
    ],
)
def test_what_isnt_seen_is_left_out(fields: dict[str, Any]) -> None:
    """Nobody guesses."""
    assert local.files(Model(**fields), {}, seen=here) == []


def test_what_somebody_else_starts_is_left_out(tmp_path: Path) -> None:
    """Of a command of the user's, and of a container that somebody else made, it isn't known what they load."""
    path = str(made(tmp_path, "a.gguf") / "a.gguf")
    assert found(tmp_path, engine="custom", command=["serve"], model=path) == []
    assert found(tmp_path, engine="llamacpp", container="llm", model=path) == []
