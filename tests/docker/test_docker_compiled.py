"""What an engine compiles in one container is there in the next one, on a real Docker Engine."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from modelswap.engines.base import Launch
from modelswap.runtimes.docker import api
from modelswap.spec import config
from modelswap.spec.config import Model
from tests.runtimes.docker_host import IMAGE, PORT, docker_host

pytestmark = pytest.mark.docker

GRACE: Final = 20.0
ENGINE: Final = """
import os, pathlib, signal
root = pathlib.Path(os.environ["VLLM_CACHE_ROOT"])
print("found", *[each.name for each in root.glob("*")], flush=True)
root.mkdir(parents=True, exist_ok=True)
(root / "graph").touch()
print("ready", flush=True)
signal.pause()
"""


async def test_models_share_what_they_compile(tmp_path: Path) -> None:
    """A fresh volume can be written, and what one model's engine left in it another's finds."""
    async with docker_host(tmp_path) as host:
        volume = f"{host.name}-compiled"
        await host.reopen(config.Docker(compile_cache=volume))
        spec = Model(engine="vllm", model="/m", image=IMAGE, entrypoint=[], network=host.network, port=PORT)
        await host.configure(one=spec, two=spec)
        try:
            for name, found in (("one", []), ("two", ["graph"])):
                place = await host.runtime.allocate(spec)
                launch = Launch(("python3", "-S", "-E", "-c", ENGINE), {})
                running = await host.runtime.start(host.order(launch, place.address, name))
                assert await host.says(running, "found") == found
                await host.says(running, "ready")
                await host.runtime.stop(running, GRACE)
        finally:
            await host.remove_containers()
            await api.call(host.docker, "DELETE", f"volumes/{volume}")
