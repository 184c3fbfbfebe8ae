"""Where we see what a model is loaded from; asks nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelswap.spec.config import Model
from modelswap.weights.download import HubWeights
from modelswap.weights.places import Unseen

COMMIT = "1" * 40


def snapshot(hub: Path, repo: str = "org/name") -> Path:
    """Write a repository into a cache as older programs leave it, and return its folder."""
    folder = hub / ("models--" + repo.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    found = folder / "snapshots" / COMMIT
    found.mkdir(parents=True)
    (found / "config.json").write_text("{}")
    (found / "model.safetensors").write_bytes(b"w")
    return found


def model(**fields: Any) -> Model:
    return Model.model_validate({"model": "org/name", "image": "vllm", **fields})


async def test_a_model_of_the_hub_is_in_the_shared_cache(tmp_path: Path) -> None:
    """Of containers and of processes alike; what isn't here yet is nowhere."""
    weights = HubWeights({"HF_HOME": str(tmp_path)})
    assert await weights.folder("m", model()) is None
    found = snapshot(tmp_path / "hub")
    assert await weights.folder("m", model()) == found
    assert await weights.folder("m", model(image=None)) == found
    assert await weights.folder("m", model(args=["--revision", "other"])) is None


async def test_a_cache_that_we_do_not_see_tells_nothing(tmp_path: Path) -> None:
    """A volume that only containers have."""
    snapshot(tmp_path / "hub")
    assert await HubWeights({"HF_HOME": str(tmp_path)}, Unseen.CACHE).folder("m", model()) is None


@pytest.mark.parametrize(
    ("path", "seen"),
    [("/models/a/b", "a/b"), ("/models/own", "own-behind"), ("/models", ""), ("/unseen/a", None), ("/image", None)],
)
async def test_a_folder_of_a_container_is_what_is_mounted_there(path: str, seen: str | None, tmp_path: Path) -> None:
    """By the nearest mount, if we see what is behind it; what is in the image itself we don't."""
    volumes = [f"{tmp_path}:/models/", f"{tmp_path}/own-behind:/models/own:ro", "volume:/unseen"]
    weights = HubWeights({}, seen=lambda source: Path(source) if source.startswith("/") else None)
    found = await weights.folder("m", model(model=path, volumes=volumes))
    assert found == (None if seen is None else tmp_path / seen)


async def test_a_tokenizer_of_the_hub_is_no_model(tmp_path: Path) -> None:
    """A model that is a folder of this machine isn't looked for where its tokenizer is."""
    snapshot(tmp_path / "hub", "org/tokenizer")
    spec = model(image=None, model=str(tmp_path), args=["--tokenizer", "org/tokenizer"])
    assert await HubWeights({"HF_HOME": str(tmp_path)}).folder("m", spec) is None
