"""What the orchestrator's process hands to its parts when it begins."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from modelswap.devices.amdcards import Nodes
from modelswap.devices.amdgpu import AmdGpuDevice
from modelswap.devices.slot import SlotDevice
from modelswap.orchestrator import main
from modelswap.spec.config import Config, Orchestrator
from modelswap.testing.fake_amdgpu import FakeAmdMachine


class Enough(Exception):
    """What was to be seen was seen."""


@pytest.mark.parametrize(("amd", "expected"), [(True, (Nodes(("/dev/dri/renderD128",)),)), (False, ())])
async def test_containers_learn_of_amd_gpus(
    amd: bool, expected: Sequence[Nodes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the device is AMD's, whoever makes containers is told the device files of all its GPUs."""
    machine = FakeAmdMachine(tmp_path / "root")
    machine.add_card()
    told: list[Any] = []

    def hosts_of(*_given: Any, amd: Sequence[Nodes], **_rest: Any) -> None:
        told.append(amd)
        raise Enough

    device = AmdGpuDevice.open(0, machine.root) if amd else SlotDevice()
    monkeypatch.setattr(main, "open_device", lambda _: device)
    monkeypatch.setattr(main, "hosts_of", hosts_of)
    config = Config(models={}, orchestrator=Orchestrator(state_dir=tmp_path / "state"))
    with pytest.raises(Enough):
        await main.serve(tmp_path / "m.yaml", config, stop=asyncio.Event())
    assert told == [expected]
