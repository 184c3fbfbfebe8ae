"""An orchestrator that stood still while another one took over its Docker ends itself."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from modelswap.orchestrator import state
from modelswap.orchestrator.main import serve
from modelswap.runtimes.docker.owner import OtherOwner
from modelswap.spec.load import load
from tests.runtimes.docker_fake import Container, FakeDocker, fake_docker


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeDocker]:
    """Give a Docker with one container that somebody has made."""
    async with fake_docker(tmp_path / "docker.sock") as fake:
        made = Container(uuid.uuid4().hex * 2, "llm", {"ExposedPorts": {"8000/tcp": {}}})
        fake.containers[made.id] = made
        yield fake


def written(folder: Path, fake: FakeDocker) -> Path:
    """Write a config with that container as its model, and return its file."""
    text = {
        "models": {"m": {"engine": "custom", "container": "llm", "port": 8000}},
        "orchestrator": {"port": 0, "state_dir": str(folder / "state")},
        "device": {"kind": "slot"},
        "docker": {"host": fake.host},
    }
    file = folder / "modelswap.yaml"
    file.write_text(json.dumps(text))
    return file


async def test_it_ends_in_order_and_leaves_its_engines(fake: FakeDocker, tmp_path: Path) -> None:
    """The last word says who rules now; what runs goes on, and the state folder is free for a next start."""
    fake.begin(fake.only())
    file = written(tmp_path, fake)
    up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    with structlog.testing.capture_logs() as logs:
        serving = asyncio.create_task(serve(file, load(file), stop=stop, ready=up.set_result))
        both: set[asyncio.Future[Any]] = {serving, up}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        assert up.done(), serving
        fake.usurp()
        with pytest.raises(OtherOwner, match=r"pid 4711 on elsewhere.*its engines run on"):
            await serving
    assert fake.only().running and fake.only().signals == []
    assert [entry["event"] for entry in logs if entry["event"] in ("ending", "stopped")] == ["ending", "stopped"]
    assert stop.is_set()
    with state.sole_owner(tmp_path / "state"):
        pass


async def test_it_does_not_begin_again_beside_the_other_one(fake: FakeDocker, tmp_path: Path) -> None:
    """Whoever starts it again is told the same: a supervisor's restarts don't make two rulers."""
    file = written(tmp_path, fake)
    up: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve(file, load(file), stop=asyncio.Event(), ready=up.set_result))
    await up
    fake.usurp()
    fake.answering.add("theirs")
    with pytest.raises(OtherOwner):
        await serving
    with pytest.raises(OtherOwner, match="stop that one first"):
        await serve(file, load(file), stop=asyncio.Event())
    assert [name for name in fake.volumes if "knock" in name] == []
