"""``modelswap pull`` with a real Docker daemon, a registry and a hub."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.docker.registry import Registry
from tests.docker.scratch import scratch
from tests.weights.hub import Repository, serving

pytestmark = pytest.mark.docker

CONFIG = """
models:
  small: {model: org/small, image: "%s"}
docker: {hf_cache: "%s"}
"""


async def test_images_and_weights_come_and_are_there_the_second_time(tmp_path: Path) -> None:
    """One command has everything ready that a first start needs; nothing is downloaded twice."""
    registry, file = Registry(), tmp_path / "modelswap.yaml"
    async with scratch() as box:
        runner = await registry.serve()
        box.images.append(registry.ref)
        file.write_text(CONFIG % (registry.ref, tmp_path / "cache"))
        try:
            with serving() as hub:
                hub.repositories["org/small"] = Repository(
                    {"config.json": b"{}", "model.safetensors": os.urandom(5000)}
                )
                env = {**os.environ, "HF_ENDPOINT": hub.url, "HOME": str(tmp_path), "COLUMNS": "120"}
                first = await pulled(file, env)
                asked = len(hub.asked)
                second = await pulled(file, env)
        finally:
            await runner.cleanup()
    assert first.count(" downloaded ") == 3  # the table's head, the image, the weights
    assert second.count("already here") == 2
    assert (registry.downloads, len(hub.asked)) == (1, asked)
    assert (tmp_path / "cache" / "hub" / "models--org--small").is_dir()


async def pulled(file: Path, env: dict[str, str]) -> str:
    """Return what the command says at the end; it must end well."""
    argv = [sys.executable, "-m", "modelswap.cli.main", "pull", "-c", str(file)]
    process = await asyncio.create_subprocess_exec(
        *argv, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()
