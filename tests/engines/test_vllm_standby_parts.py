"""What the file that waits for a model is made of, piece by piece."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelswap.engines import vllm_standby
from modelswap.engines.vllm_standby import Background, Unfit


def niceness() -> set[int]:
    """Return the nice values of our threads."""
    return {os.getpriority(os.PRIO_PROCESS, thread) for thread in vllm_standby.threads()}


@pytest.fixture
def held() -> Iterator[list[threading.Event]]:
    """Give events that end threads when the test is done."""
    events: list[threading.Event] = []
    yield events
    for event in events:
        event.set()


@pytest.mark.parametrize("may", [True, False])
def test_what_is_done_in_the_background_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, held: list[threading.Event], may: bool
) -> None:
    """Meanwhile priority is low or rests are made; afterwards all threads, new ones too, are as they were."""
    before, finders, group = niceness(), list(sys.meta_path), vllm_standby.group_priority(0)
    able = vllm_standby.can_come_back(os.getpriority(os.PRIO_PROCESS, 0))
    monkeypatch.setattr(vllm_standby, "can_come_back", lambda usual: may and able)
    held.append(threading.Event())
    disks = vllm_standby.io_priority(0)
    background = Background()
    with background:
        assert sys.meta_path[0] is background
        lowered = os.getpriority(os.PRIO_PROCESS, 0) == vllm_standby.LOWEST
        assert lowered is (may and able)
        assert vllm_standby.io_priority(0) == vllm_standby.IO_IDLE
        threading.Thread(target=held[0].wait).start()
    assert niceness() == before
    assert {vllm_standby.io_priority(thread) for thread in vllm_standby.threads()} == {disks}
    assert sys.meta_path == finders
    assert group is None or vllm_standby.group_priority(group) == 0


def test_a_busy_machine_does_not_keep_it_from_being_done() -> None:
    """After a while it goes on at its usual priority, with rests."""
    before = niceness()
    with Background(patience=0.0) as _:
        sys.meta_path[0].find_spec("anything", None)
        assert niceness() == before


def test_it_rests_as_long_as_it_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time is left to others where priorities can't be had."""
    monkeypatch.setattr(vllm_standby, "can_come_back", lambda usual: False)
    rests: list[float] = []
    monkeypatch.setattr(time, "sleep", rests.append)
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    with Background(burst=1.0) as _:
        for worked in (0.5, 0.9, 3.0):
            now[0] += worked
            sys.meta_path[0].find_spec("anything", None)
    assert [rest for rest in rests if rest != 0.05] == [1.4, 2.0]


def test_a_priority_that_stays_low_is_not_served_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it can't be undone after all, there is no standby."""
    monkeypatch.setattr(vllm_standby, "priority", lambda thread: vllm_standby.LOWEST)
    with pytest.raises(Unfit, match="priority"), Background():
        pass


class Driver:
    """A CUDA driver that answers its first call."""

    def __init__(self, answer: int) -> None:
        self.answer = answer

    def cuDeviceGetCount(self, count: object) -> int:
        """Return a status."""
        return self.answer


@pytest.mark.parametrize(
    ("cuda", "xpu", "driver", "files", "problem"),
    [
        (False, False, None, set(), None),
        (False, False, 3, {"/dev/nvidiactl"}, None),
        (False, False, 0, set(), "initialised the CUDA driver"),
        (True, False, None, set(), "initialised CUDA"),
        (False, True, None, set(), "initialised XPU"),
        (False, False, None, {"/dev/kfd"}, "opened the AMD device"),
    ],
)
def test_a_touched_gpu_is_noticed(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, xpu: bool, driver: int | None, files: set[str], problem: str | None
) -> None:
    """Also where torch knows nothing of it: merely counting devices initialises the driver, and no fork may use it."""

    def load(name: str, mode: int) -> Driver:
        if driver is None:
            raise OSError(name)
        return Driver(driver)

    torch = types.ModuleType("torch")
    vars(torch)["cuda"] = types.SimpleNamespace(is_initialized=lambda: cuda)
    vars(torch)["xpu"] = types.SimpleNamespace(is_initialized=lambda: xpu)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(vllm_standby, "open_files", lambda: files)
    if problem is None:
        vllm_standby.check_device_untouched()
    else:
        with pytest.raises(Unfit, match=problem):
            vllm_standby.check_device_untouched()


@pytest.mark.parametrize(
    ("lines", "python"),
    [
        ("#!{python}\n", ["{python}"]),
        ("#! {python} -s -E\n", ["{python}", "-s", "-E"]),
        ("#!/usr/bin/env python3\n", ["{folder}/python3"]),
        ("#!/usr/bin/env -S python3 -u\n", ["{folder}/python3", "-u"]),
        ("#!/bin/sh\n'''exec' '{spaced}' \"$0\" \"$@\"\n' '''\n", ["{spaced}"]),
        ("#!/bin/sh\nexec python3 -m vllm\n", []),
        ("#!/no/such/python\n", []),
        ("\x7fELF", []),
        ("", []),
    ],
)
def test_a_script_says_its_python(tmp_path: Path, lines: str, python: list[str]) -> None:
    """As pip, uv and people write first lines; of another program nothing is known."""
    (tmp_path / "with space").mkdir()
    (tmp_path / "python3").symlink_to(sys.executable)
    (tmp_path / "with space" / "python").symlink_to(sys.executable)
    names = {"python": sys.executable, "folder": tmp_path, "spaced": tmp_path / "with space" / "python"}
    script = tmp_path / "vllm"
    script.write_text(lines.format(**names) + "import sys\n")
    script.chmod(0o755)
    assert vllm_standby.interpreter("vllm", str(tmp_path)) == [word.format(**names) for word in python]
    assert vllm_standby.interpreter("other", str(tmp_path)) == []


def test_a_class_is_looked_at_in_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails or hangs there is told from one that is done, and waited for no longer than a while."""
    assert vllm_standby.done_in_fork(lambda: 1, str(tmp_path / "one"))
    assert not vllm_standby.done_in_fork(lambda: 1 // 0, str(tmp_path / "two"))
    monkeypatch.setattr(vllm_standby, "INSPECT_WITHIN", 0.05)
    assert not vllm_standby.done_in_fork(threading.Event().wait, str(tmp_path / "three"))


@pytest.mark.parametrize(
    ("order", "left"),
    [
        ({"env": {"A": "1", "B": "3", "N": "4"}, "add": True}, {"A": "1", "B": "3", "I": "5", "J": "7", "N": "4"}),
        ({"env": {"I": "0", "J": "2"}, "add": True}, {"A": "1", "B": "2", "I": "5", "J": "2"}),
        ({"env": {"N": "4"}, "unset": ["A", "I"], "add": True}, {"B": "2", "J": "7", "N": "4"}),
        ({"env": {"A": "1", "N": "4"}}, {"A": "1", "J": "7", "N": "4"}),
    ],
)
def test_an_order_changes_the_environment(
    monkeypatch: pytest.MonkeyPatch, order: dict[str, object], left: dict[str, str]
) -> None:
    """What it says anew holds; what imports have changed since (I, J) stays unless it does."""
    began = {"A": "1", "B": "2", "I": "0"}
    monkeypatch.setattr(os, "environ", {"A": "1", "B": "2", "I": "5", "J": "7"})
    vllm_standby.take_environment(order, began)
    assert os.environ == left


@pytest.mark.parametrize(
    "order",
    [
        {"env": {}},
        {"argv": ["one"], "env": {}},
        {"argv": ["one", 2], "env": {}},
        {"argv": ["one", "two"], "env": {"A": 1}},
        {"argv": ["one", "two"], "env": []},
        {"argv": ["one", "two"], "env": {}, "unset": "A"},
        {"argv": ["one", "two"], "env": {}, "cwd": "/no/such/folder"},
        [],
    ],
)
def test_an_order_that_is_none_is_refused(order: object) -> None:
    """It is answered with what is wrong, and nothing happens."""
    said, answer = vllm_standby.understood(json.dumps(order).encode(), "1")
    assert said is None and "error" in answer


@pytest.mark.parametrize(
    ("words", "port"),
    [("--port 1 --port 2", 2), ("--port=3", 3), ("--host a", None), ("--port", None), ("--port {x}", None)],
)
def test_the_port_is_read_from_the_command_line(words: str, port: int | None) -> None:
    """Both ways to write it; the last one counts."""
    assert vllm_standby.port_of(["python", "-m", "mod", *words.split()]) == port


def test_a_forked_process_marks_its_lines_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What its parent did to its outputs to write its own name before each line is undone."""
    with (tmp_path / "log").open("w+") as out, (tmp_path / "other").open("w") as other:
        vars(out)["write"] = lambda text: other.write(f"(APIServer) {text}")
        monkeypatch.setattr(sys, "stdout", out)
        vllm_standby.begin_anew()
        print("hello", flush=True)  # noqa: T201 - that is what is tested
    assert (tmp_path / "log").read_text() == "hello\n"


def test_forked_processes_draw_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As processes do that import numpy themselves, unless vLLM seeds them."""
    seeds: list[tuple[object, ...]] = []
    numpy = types.ModuleType("numpy")
    vars(numpy)["random"] = types.SimpleNamespace(seed=lambda *given: seeds.append(given))
    monkeypatch.setitem(sys.modules, "numpy", numpy)
    vllm_standby.begin_anew()
    assert seeds == [()]
