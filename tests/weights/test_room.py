"""Caches without room and caches that may not be written, on file systems of their own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from modelswap.spec.config import Model
from modelswap.testing.waiting import until
from modelswap.weights import errors
from modelswap.weights.download import prepare_weights
from tests.weights.hub import Hub, Repository, serving

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting a file system wants root on Linux"
)
LARGE = 9 << 20
SPEC = Model(model="org/tiny")

Mount = Callable[[str], Path]


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Serve a model of one large file."""
    with serving() as hub:
        hub.repositories["org/tiny"] = Repository({"config.json": b"{}", "model.safetensors": os.urandom(LARGE)})
        yield hub


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Return a function that mounts a file system in memory with the given options, and returns its folder."""
    with ExitStack() as mounted:

        def mount(options: str) -> Path:
            folder = tmp_path / "cache"
            folder.mkdir()
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "modelswap-test", str(folder)], check=False)
            if done.returncode:
                pytest.skip("file systems can't be mounted here")
            mounted.callback(subprocess.run, ["umount", str(folder)], check=True)
            return folder

        yield mount


def env(hub: Hub, home: Path) -> dict[str, str]:
    """Return an environment whose hub and cache are the test's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home)}


async def test_a_disk_without_room_is_told_before_anything_is_fetched(hub: Hub, mount: Mount) -> None:
    """The error names the folder, what is needed and what is free."""
    home = mount("size=1m")
    with pytest.raises(errors.DiskFull) as raised:
        await prepare_weights("m", SPEC, lambda *_: None, env=env(hub, home))
    error = raised.value
    assert error.folder == str(home / "hub")
    assert error.needed == LARGE + 2
    assert 0 < error.free <= 1 << 20
    assert f"no room for org/tiny in {home / 'hub'}: 9.4 MB are still to come, and 1.0 MB are free" in str(error)
    assert not hub.gets()


async def test_a_disk_that_fills_up_meanwhile_is_told_and_the_rest_comes_later(hub: Hub, mount: Mount) -> None:
    """What came before is kept; with room again only the rest is fetched."""
    home = mount("size=12m")
    hub.stall_after = LARGE // 2
    preparing = asyncio.create_task(prepare_weights("m", SPEC, lambda *_: None, env=env(hub, home)))
    await until(lambda: any(part.stat().st_size >= 4 << 20 for part in home.rglob("*.incomplete")))
    (home / "hog").write_bytes(bytes(6 << 20))
    hub.go_on.set()
    with pytest.raises(errors.DiskFull) as raised:
        await preparing
    assert 0 < raised.value.needed < LARGE
    assert raised.value.free < raised.value.needed
    (home / "hog").unlink()
    await prepare_weights("m", SPEC, lambda *_: None, env=env(hub, home))
    assert hub.ranges
    assert next(home.rglob("model.safetensors")).read_bytes() == hub.repositories["org/tiny"].files["model.safetensors"]


async def test_a_disk_that_takes_no_more_files_is_told(hub: Hub, mount: Mount) -> None:
    """Not even the cache's own folder can be made."""
    home = mount("size=99m,nr_inodes=1")
    with pytest.raises(errors.DiskFull, match="df -i"):
        await prepare_weights("m", SPEC, lambda *_: None, env=env(hub, home))
    assert not hub.gets()


async def test_a_cache_that_may_not_be_written_is_told(hub: Hub, mount: Mount) -> None:
    """A read-only mount, or a folder of somebody else's."""
    home = mount("size=1m,ro")
    with pytest.raises(errors.NotWritable) as raised:
        await prepare_weights("m", SPEC, lambda *_: None, env=env(hub, home))
    assert f"the cache {home / 'hub'} can't be written by this user (uid {os.geteuid()})" in str(raised.value)
    assert "HF_HOME" in str(raised.value)
    assert not hub.gets()
