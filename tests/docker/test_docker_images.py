"""Pulling from a registry through a real Docker daemon."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from modelswap.protocol.errors import Code
from modelswap.runtimes.docker.images import DiskFull, Image, ImageUnavailable, local_image, pull
from tests.docker.registry import Registry
from tests.docker.scratch import BASE, Scratch, needs_root, private_daemon, scratch, short_folder

pytestmark = pytest.mark.docker

DEADLINE = 60.0
NOBODY = {"HOME": "/nonexistent"}


class Heard:
    """A `Report` that remembers, and tells when a fraction has come."""

    def __init__(self) -> None:
        self.stages: set[str] = set()
        self.fractions: list[float] = []
        self.moved = asyncio.Event()

    def __call__(self, stage: str, fraction: float | None) -> None:
        """See `Report`."""
        self.stages.add(stage)
        if fraction is not None:
            self.fractions.append(fraction)
            self.moved.set()


@contextlib.asynccontextmanager
async def serving(registry: Registry, box: Scratch) -> AsyncIterator[Registry]:
    runner = await registry.serve()
    box.images.append(registry.ref)
    try:
        yield registry
    finally:
        await runner.cleanup()


@pytest.fixture
async def box() -> AsyncIterator[Scratch]:
    async with scratch() as made:
        yield made


async def test_an_image_that_is_here_tells_its_entrypoint_and_ports(box: Scratch) -> None:
    """And None is said of one that isn't."""
    found = await local_image(box.docker, BASE)
    assert found is not None
    assert found.id.startswith("sha256:")
    assert (found.entrypoint, found.ports) == ((), ())
    assert await local_image(box.docker, f"{box.prefix}:none") is None


async def test_a_pull_reports_its_bytes_and_returns_the_image(box: Scratch) -> None:
    """While half of the layer is there, a part between nothing and all is told; only TCP ports count."""
    async with serving(Registry(layer_bytes=4 << 20, gate=asyncio.Event()), box) as registry:
        heard = Heard()
        pulling = asyncio.create_task(pull(box.docker, registry.ref, heard, NOBODY))
        await asyncio.wait_for(heard.moved.wait(), DEADLINE)
        assert 0 < heard.fractions[-1] <= 0.5
        assert registry.gate is not None
        registry.gate.set()
        image = await pulling
    assert image == Image(registry.image_id, ("/serve", "now"), (80, 8001))
    assert await local_image(box.docker, registry.ref) == image
    assert heard.stages == {f"pulling image {registry.ref}"}
    assert heard.fractions == sorted(heard.fractions)
    assert heard.fractions[-1] == 1.0


async def test_pulling_what_is_here_already_downloads_nothing(box: Scratch) -> None:
    """With ``pull: always`` that is the usual case."""
    async with serving(Registry(), box) as registry:
        first = await pull(box.docker, registry.ref, Heard(), NOBODY)
        assert await pull(box.docker, registry.ref, Heard(), NOBODY) == first
        assert registry.downloads == 1


@pytest.mark.parametrize("name", ["other:tag", "thing:other"])
async def test_what_no_registry_has_is_permanent(box: Scratch, name: str) -> None:
    """Neither the repository nor the tag will be there the next time."""
    async with serving(Registry(), box) as registry:
        with pytest.raises(ImageUnavailable, match=name) as caught:
            await pull(box.docker, f"127.0.0.1:{registry.port}/{name}", Heard(), NOBODY)
    assert caught.value.code is Code.MODEL_BROKEN
    assert "'image'" in str(caught.value)


async def test_a_name_that_is_none_is_permanent(box: Scratch) -> None:
    """Docker refuses it before it asks anybody."""
    with pytest.raises(ImageUnavailable, match="Upper/Case") as caught:
        await pull(box.docker, "Upper/Case", Heard(), NOBODY)
    assert caught.value.code is Code.MODEL_BROKEN


async def test_a_registry_that_is_away_is_worth_another_try(box: Scratch) -> None:
    """Nothing listens at its port."""
    runner = await (registry := Registry()).serve()
    await runner.cleanup()
    with pytest.raises(ImageUnavailable, match="pull: never") as caught:
        await pull(box.docker, registry.ref, Heard(), NOBODY)
    assert caught.value.code is Code.MODEL_START_FAILED


async def test_a_registry_that_wants_a_login_gets_the_one_docker_has(box: Scratch, tmp_path: Path) -> None:
    """Without one the message says how to log in, and never tells a password."""
    async with serving(Registry(password="hush"), box) as registry:
        where = f"127.0.0.1:{registry.port}"
        with pytest.raises(ImageUnavailable, match=f"docker login {where}") as caught:
            await pull(box.docker, registry.ref, Heard(), NOBODY)
        assert caught.value.code is Code.MODEL_BROKEN
        for password, works in (("wrong", False), ("hush", True)):
            auth = base64.b64encode(f"me:{password}".encode()).decode()
            (tmp_path / "config.json").write_text(json.dumps({"auths": {where: {"auth": auth}}}))
            env = {"DOCKER_CONFIG": str(tmp_path)}
            if works:
                assert (await pull(box.docker, registry.ref, Heard(), env)).id == registry.image_id
            else:
                with pytest.raises(ImageUnavailable, match="docker login") as caught:
                    await pull(box.docker, registry.ref, Heard(), env)
                assert password not in str(caught.value)


async def test_a_layer_that_is_cut_short_is_gone_on_with(box: Scratch) -> None:
    """Docker tries again after 5 s by itself; that is no failure."""
    async with serving(Registry(cut=1), box) as registry:
        assert (await pull(box.docker, registry.ref, Heard(), NOBODY)).id == registry.image_id
        assert registry.downloads == 2


async def test_a_layer_that_is_damaged_is_refused(box: Scratch) -> None:
    """It may come whole the next time."""
    async with serving(Registry(corrupt=True), box) as registry:
        with pytest.raises(ImageUnavailable, match="verification failed") as caught:
            await pull(box.docker, registry.ref, Heard(), NOBODY)
        assert caught.value.code is Code.MODEL_START_FAILED
        assert await local_image(box.docker, registry.ref) is None


async def test_a_cancelled_pull_ends_in_docker_too_and_can_be_done_again(box: Scratch) -> None:
    """The line is free for other models then."""
    async with serving(Registry(layer_bytes=4 << 20, gate=asyncio.Event()), box) as registry:
        heard = Heard()
        pulling = asyncio.create_task(pull(box.docker, registry.ref, heard, NOBODY))
        await asyncio.wait_for(heard.moved.wait(), DEADLINE)
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        await asyncio.wait_for(registry.left.wait(), DEADLINE)
        assert registry.gate is not None
        registry.gate.set()
        assert (await pull(box.docker, registry.ref, Heard(), NOBODY)).id == registry.image_id


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as made:
        yield made


@needs_root
async def test_docker_that_ends_in_the_middle_is_worth_another_try(folder: Path) -> None:
    """Its stream just ends then, without a word."""
    async with asyncio.timeout(DEADLINE), private_daemon(folder) as daemon, scratch(daemon.url) as box:
        async with serving(Registry(layer_bytes=4 << 20, gate=asyncio.Event()), box) as registry:
            heard = Heard()
            pulling = asyncio.create_task(pull(box.docker, registry.ref, heard, NOBODY))
            await asyncio.wait_for(heard.moved.wait(), DEADLINE)
            await daemon.stop()
            with pytest.raises(ImageUnavailable) as caught:
                await pulling
            assert caught.value.code is Code.MODEL_START_FAILED
        await daemon.start()
        assert await local_image(box.docker, registry.ref) is None


@needs_root
async def test_a_full_disk_is_an_error_of_its_own(folder: Path) -> None:
    """It names the folder, since that may well be on another disk than one thinks."""
    data = folder / "data"
    data.mkdir()
    mounting = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(data))
    if await mounting.wait() != 0:
        pytest.skip("no right to mount a small disk")
    try:
        async with (
            asyncio.timeout(DEADLINE),
            private_daemon(folder) as daemon,
            scratch(daemon.url) as box,
            serving(Registry(layer_bytes=30 << 20), box) as registry,
        ):
            with pytest.raises(DiskFull, match=str(data)):
                await pull(box.docker, registry.ref, Heard(), NOBODY)
    finally:
        unmounting = await asyncio.create_subprocess_exec("umount", "-l", str(data))
        await unmounting.wait()
