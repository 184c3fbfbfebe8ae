"""Starts that fail, and what they say."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelswap.engines.base import Address, Launch
from modelswap.protocol.errors import Code
from modelswap.runtimes.base import StartFailed, StartOrder
from modelswap.runtimes.process import ProcessRuntime
from modelswap.spec.config import Model

SPEC = Model(engine="custom", command=["stand-in"])
SOMEWHERE = Address("127.0.0.1", 1)


def _order(launch: Launch) -> StartOrder:
    return StartOrder(
        spec=Model(engine="custom", command=["stand-in"]),
        instance="one",
        model="some/model",
        definition="digest",
        launch=launch,
        address=SOMEWHERE,
    )


@pytest.mark.parametrize(
    ("argv", "cwd", "words"),
    [
        (("no-such-program",), None, "no program 'no-such-program' on the engine's PATH .* install it"),
        (("./no-such-program",), None, "no program ./no-such-program; install it"),
        (("plain",), "", "may not be run by this user"),
        (("./plain",), "", "may not be run by this user"),
        (("./homeless",), "", "interpreter in its first line"),
        (("./shapeless",), "", "another architecture, or a script without #!"),
        ((sys.executable,), "missing", "working folder .*missing is not there"),
        ((), None, "command is empty"),
        ((sys.executable, "x" * 3_000_000), None, "too long"),
        ((sys.executable, "nul\0"), None, "can't be started: embedded null byte"),
    ],
)
async def test_failed_starts_name_their_remedy(
    tmp_path: Path, argv: tuple[str, ...], cwd: str | None, words: str
) -> None:
    """Every way in which a program can't be started says what to do, and leaves nothing behind."""
    for name, mode, text in (
        ("plain", 0o600, "x"),
        ("homeless", 0o700, "#!/no/such/interpreter\n"),
        ("shapeless", 0o700, "no program\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    runtime = ProcessRuntime(tmp_path / "state", 1024)
    launch = Launch(argv, {"PATH": str(tmp_path)}, cwd=None if cwd is None else str(tmp_path / cwd))
    with pytest.raises(StartFailed, match=words) as failed:
        await runtime.start(_order(launch))
    assert failed.value.code is Code.MODEL_BROKEN, "the same start would fail again"
    assert await runtime.instances() == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left for the engine's log .*; free some"),
        (errno.EACCES, "may not be written; check the permissions"),
        (errno.EMFILE, "raise ulimit -n"),
        (errno.EIO, "can't be opened"),
    ],
)
async def test_a_log_that_cant_be_opened_fails_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    """An engine is not started without its log, and the message says what to do about that."""
    runtime = ProcessRuntime(tmp_path, 1024)

    def refuse(path: object, flags: int, mode: int = 0o777) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(StartFailed, match=words):
            await runtime.start(_order(Launch((sys.executable,), {})))


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EAGAIN, "ulimit -u"), (errno.ENOMEM, "free memory"), (errno.ENFILE, "ulimit -n")]
)
async def test_a_system_without_room_fails_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    """Limits of the system are named with the command that shows them."""
    runtime = ProcessRuntime(tmp_path, 1024)

    def refuse(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(StartFailed, match=words) as failed:
        await runtime.start(_order(Launch((sys.executable,), {})))
    assert failed.value.code is Code.MODEL_START_FAILED, "a later start may do"
