"""Engines' log files: rotation, pruning, tails."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from modelswap.runtimes import process
from modelswap.runtimes.logfiles import LogFiles, clean, safe_name
from modelswap.runtimes.process import ProcessRuntime

if TYPE_CHECKING:
    from tests.runtimes.conftest import Host


def _write(logs: LogFiles, instance: str, text: bytes, model: str = "m") -> Path:
    descriptor = logs.open(model, instance)
    os.write(descriptor, text)
    os.close(descriptor)
    return logs.path(model, instance)


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "a:b", "", "é", "x" * 300, "../../etc/passwd"])
def test_any_name_becomes_a_safe_file_name(name: str) -> None:
    """No name leaves its folder, hides, or is too long, and different names stay different."""
    safe = safe_name(name)
    assert "/" not in safe and not safe.startswith(".") and 0 < len(safe) < 100
    assert safe_name(name + "!") != safe


def test_plain_names_stay_as_they_are() -> None:
    """A name that is safe is its own file name, so that people find their logs."""
    assert safe_name("Mistral-7B_v0.3") == "Mistral-7B_v0.3"


@pytest.mark.parametrize(
    ("raw", "seen"),
    [
        ("\x1b[1;32mINFO\x1b[0m ready", "INFO ready"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b(Btext\x1b=", "text"),
        ("  0%\r 50%\r100%\r", "100%"),
        ("\x1b[2K\r\x1b[1A", ""),
        ("tab\there \x00\x07\x9f end", "tab\there  end"),
        ("\x1b", ""),
        ("x" * 9999, "x" * 4000),
    ],
)
def test_lines_are_shown_as_people_saw_them(raw: str, seen: str) -> None:
    """Escapes and control characters are stripped, and of a progress bar the last state is left."""
    assert clean(raw) == seen


def test_binary_garbage_is_shown_somehow(tmp_path: Path) -> None:
    """Bytes that are no text neither raise nor reach the reader raw."""
    logs = LogFiles(tmp_path, 1024)
    _write(logs, "a", bytes(range(256)) + b"\nlast line without an end")
    *_, last = logs.tail("m", 10, "a")
    assert last == "last line without an end"
    assert all(line.isprintable() or "\t" in line for line in logs.tail("m", 10, "a"))


def test_a_tail_reads_no_more_than_it_must(tmp_path: Path) -> None:
    """Of a huge log only the end is read, and a line whose beginning was not read is left out."""
    logs = LogFiles(tmp_path, 1024)
    path = _write(logs, "a", b"first\n")
    with path.open("r+b") as file:
        file.truncate(1 << 33)
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast\n")
    assert logs.tail("m", 5, "a") == ["last"]
    assert logs.tail("m", 0, "a") == []


def test_a_tail_goes_on_in_older_parts(tmp_path: Path) -> None:
    """Right after a rotation the last lines are still there."""
    logs = LogFiles(tmp_path, 4)
    _write(logs, "a", b"one\ntwo\n")
    assert logs.rotate() == []
    _write(logs, "a", b"three\nfour\n")
    assert logs.rotate() == []
    _write(logs, "a", b"five\n")
    assert logs.tail("m", 4, "a") == ["two", "three", "four", "five"]
    assert logs.tail("m", 99, "a") == ["one", "two", "three", "four", "five"]


def test_rotation_keeps_two_older_parts(tmp_path: Path) -> None:
    """A log that reached its size is emptied in place, the file staying the same, and two older parts are kept."""
    logs = LogFiles(tmp_path, 4)
    descriptor = logs.open("m", "a")
    path = logs.path("m", "a")
    inode = path.stat().st_ino
    for number in range(5):
        os.write(descriptor, b"part %d\n" % number)
        logs.rotate()
    os.write(descriptor, b"z\n")
    logs.rotate()
    os.close(descriptor)
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.log", "a.log.1", "a.log.2"]
    assert [Path(f"{path}{suffix}").read_bytes() for suffix in (".2", ".1", "")] == [b"part 3\n", b"part 4\n", b"z\n"]
    assert path.stat().st_ino == inode


async def test_logs_rotate_while_they_are_written(host: Host) -> None:
    """Rotating under a writing engine repeats no line, tears one at most at a cut, and bounds what the disk holds."""
    running = await host.start("chatter", 4000)
    log = next((host.state_dir / "logs").glob("*/*.log"))
    parts = [Path(f"{log}.2"), Path(f"{log}.1"), log]
    async with asyncio.timeout(120):
        while (await host.runtime.log_tail(running.model, 1)) != ["ready"]:
            await host.process_runtime.rotate()
    await host.process_runtime.rotate()
    there = [part for part in parts if part.exists()]
    assert len(there) > 1 and set(log.parent.iterdir()) == set(there)
    lines = b"".join(part.read_bytes() for part in there).decode().splitlines()
    assert lines.pop() == "ready"
    whole = [found for line in lines if (found := re.fullmatch(r"line (\d+) \.{100}", line))]
    numbers = [int(found[1]) for found in whole]
    assert numbers == sorted(set(numbers))
    assert len(lines) - len(whole) < len(there), "only what is written just as the log is emptied may be lost"


def test_a_full_disk_while_rotating_gives_space_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for a copy, old parts are dropped and the log is emptied, and that is told."""
    logs = LogFiles(tmp_path, 4)
    path = _write(logs, "a", b"old part\n")
    logs.rotate()
    _write(logs, "a", b"new part\n")
    other = _write(logs, "b", b"x")

    def refuse(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        [problem] = logs.rotate()
    assert "no space left" in problem and str(path) in problem
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.log", "b.log"]
    assert (path.read_bytes(), other.read_bytes()) == (b"", b"x")


async def test_a_log_that_cant_be_rotated_is_told_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other failures to rotate are logged, and harm neither the log nor the rotation of others."""
    runtime = ProcessRuntime(tmp_path, 4)
    warnings: list[str] = []
    monkeypatch.setattr(process, "_log", SimpleNamespace(warning=lambda _, problem: warnings.append(problem)))
    path = _write(LogFiles(tmp_path / "logs", 4), "a", b"precious\n")

    def refuse(descriptor: int, data: bytes) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        await runtime.rotate()
    assert [str(path) in warning for warning in warnings] == [True]
    assert path.read_bytes() == b"precious\n"


def test_only_the_newest_logs_are_kept(tmp_path: Path) -> None:
    """Of a model's logs the three newest are kept, and those of instances that live; other models' are not touched."""
    logs = LogFiles(tmp_path, 4)
    for age, instance in enumerate(["e", "d", "c", "b", "a"]):
        path = _write(logs, instance, b"text\n")
        path.with_name(path.name + ".1").write_bytes(b"older\n")
        os.utime(path, (10_000 - age, 10_000 - age))
    other = _write(logs, "a", b"text\n", model="other")
    logs.prune("m", living={"a"})
    kept = sorted(file.name for file in logs.path("m", "a").parent.iterdir())
    assert kept == [f"{name}.log{suffix}" for name in "acde" for suffix in ("", ".1")]
    assert other.exists()


def test_the_newest_log_is_known_after_a_restart(tmp_path: Path) -> None:
    """Who didn't start the engines takes the log last written to for the newest."""
    before = LogFiles(tmp_path, 1024)
    old, _ = _write(before, "old", b"old\n"), _write(before, "new", b"new\n")
    os.utime(old, (1, 1))
    assert LogFiles(tmp_path, 1024).tail("m", 1, None) == ["new"]
