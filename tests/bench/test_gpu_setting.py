from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, gpu_stack
from bench.gpu_device import Rehearsal, until_free
from bench.gpu_stack import Failed, Stack, asleep, engines
from modelswap.devices.errors import DeviceUnavailable
from modelswap.engines.vllm import Vllm
from modelswap.spec.config import Model

GIB = 1 << 30


def fake_python(folder: Path, said: str) -> str:
    """Return a program that is asked for PyTorch, has it, and finds what is ``said``."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\necho '{said}'\n")
    script.chmod(0o755)
    return str(script)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It ends with the driver's remedy, and how to rehearse."""

    def gone(_index: int) -> None:
        raise DeviceUnavailable("the NVIDIA driver is not installed")

    monkeypatch.setattr(gpu, "Gpu", gone)
    monkeypatch.setattr(sys, "argv", ["gpu", "--weights", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"(?s)driver is not installed.*--device cpu --gib 0\.25"):
        gpu.main()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('{"torch": "2.13.0+cpu", "cuda": null, "problem": ""}', "a build without CUDA"),
        ('{"torch": "2.9", "cuda": "13.0", "problem": "driver too old"}', "can't be used here: driver too old"),
    ],
)
def test_a_pytorch_that_will_not_do_is_named(
    said: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A PyTorch without CUDA, or one that can't use the GPU, is named with the Python that has it."""
    monkeypatch.setattr(gpu, "Gpu", lambda _index: Rehearsal(tmp_path, GIB))
    python = fake_python(tmp_path, said)
    monkeypatch.setattr(sys, "argv", ["gpu", "--python", python, "--weights", str(tmp_path)])
    with pytest.raises(SystemExit, match=message) as ended:
        gpu.main()
    assert python in str(ended.value)


def test_a_python_without_pytorch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is tried with a Python that can't import it."""
    monkeypatch.setattr(sys, "argv", ["gpu", "--python", "false", "--device", "cpu", "--weights", str(tmp_path)])
    with pytest.raises(SystemExit, match="false can't import PyTorch"):
        gpu.main()


def test_free_memory_is_waited_for(tmp_path: Path) -> None:
    """What is free already takes no time; what never is ends with the limit."""
    device = Rehearsal(tmp_path, GIB)
    now = time.perf_counter()
    assert until_free(device, 2 * GIB, now, 0.0) is not None
    device.ledger.add_foreign(GIB)
    assert device.free() == GIB
    assert until_free(device, 2 * GIB, now, 0.0) is None


@pytest.mark.parametrize(("level", "levels"), [(0, ()), (1, (1, 2)), (2, (1, 2))])
def test_engines_are_what_modelswap_takes(level: int, levels: tuple[int, ...], tmp_path: Path) -> None:
    """The configuration is valid, sleeps if it is to, and the engine is told at which level alone."""
    (tmp_path / "a").mkdir()
    made = engines({"a": tmp_path / "a"}, "python3", Rehearsal(tmp_path, GIB), root=tmp_path, share=0.9, level=level)
    model = Model.model_validate(made["a"], strict=False)
    assert Vllm().sleep_levels(model) == levels
    assert Vllm().device_bytes(model, 100) == 90
    assert ("--sleep-levels" in model.args) is bool(level)


def test_what_sleepers_take_is_read_from_measurements() -> None:
    """The most that any of them takes; nothing if none was measured at that level."""
    rows: list[dict[str, Any]] = [
        {"mechanism": "sleep1", "residue_bytes": 5, "host_bytes": 70},
        {"mechanism": "sleep1", "residue_bytes": 6, "host_bytes": 60},
        {"mechanism": "sleep2", "residue_bytes": None, "host_bytes": None},
    ]
    assert asleep({"measurements": rows}, 1) == (6, 70)
    assert asleep({"measurements": rows}, 2) is None


@pytest.mark.parametrize("failure", [Failed("no answer"), KeyboardInterrupt()])
def test_a_stack_that_does_not_come_up_is_ended(
    failure: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever happens while it is waited for, no process is left."""
    stack = Stack(tmp_path / "stack", {}, Rehearsal(tmp_path, GIB))
    started: list[subprocess.Popen[bytes]] = []

    def fail(_stack: Stack, up: subprocess.Popen[bytes]) -> None:
        started.append(up)
        raise failure

    monkeypatch.setattr(gpu_stack.Stack, "_until_up", fail)
    with pytest.raises(type(failure)), stack:
        raise AssertionError
    assert started[0].returncode is not None
