"""The state folder, its one owner, and the gateways' token."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from modelswap.orchestrator.server import CantListen, listen, url_of
from modelswap.orchestrator.state import StateDirUnusable, prepare, sole_owner, state_dir
from modelswap.orchestrator.tokens import token
from tests.orchestrator.fakes import config


def mode(path: Path) -> int:
    """Return a file's permission bits."""
    return stat.S_IMODE(path.stat().st_mode)


def test_where_state_is_kept(tmp_path: Path) -> None:
    """The config goes first, then XDG's variable if it is absolute, then the home folder."""
    assert state_dir(config({"orchestrator": {"state_dir": str(tmp_path)}})) == tmp_path
    assert state_dir(config(), {"XDG_STATE_HOME": "/x"}) == Path("/x/modelswap")
    home = Path.home() / ".local" / "state" / "modelswap"
    assert state_dir(config(), {}) == home
    assert state_dir(config(), {"XDG_STATE_HOME": "relative"}) == home
    assert state_dir(config({"orchestrator": {"state_dir": "~/here"}}), {}) == Path.home() / "here"


def test_the_state_folder_is_ours_alone(tmp_path: Path) -> None:
    """Made with its parents, mode 0700; making it again is fine."""
    folder = tmp_path / "deep" / "state"
    prepare(folder)
    prepare(folder)
    assert mode(folder) == 0o700


def test_a_state_folder_that_cannot_be_made_is_told_with_its_remedy(tmp_path: Path) -> None:
    """A file is in the way."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StateDirUnusable, match=r"orchestrator\.state_dir"):
        prepare(tmp_path / "file" / "state")
    with pytest.raises(StateDirUnusable, match="can't write"), sole_owner(tmp_path / "nowhere"):
        pass


def test_a_second_orchestrator_is_told_who_has_the_folder(tmp_path: Path) -> None:
    """And the folder is free again when the first one ends."""
    again = (
        "import sys; from pathlib import Path; from modelswap.orchestrator.state import *\n"
        "try:\n    with sole_owner(Path(sys.argv[1])): print('owned')\nexcept StateDirUnusable as e: print(e)"
    )

    def second() -> str:
        return subprocess.run(
            [sys.executable, "-c", again, str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout

    with sole_owner(tmp_path):
        assert f"another orchestrator (PID {os.getpid()}) uses {tmp_path}" in second()
    assert second() == "owned\n"


def test_the_token_is_made_once_and_kept(tmp_path: Path) -> None:
    """Long, random, readable by us only."""
    made = token(tmp_path, {})
    assert len(made) >= 40 and mode(tmp_path / "token") == 0o600
    assert token(tmp_path, {}) == made
    assert (tmp_path / "token").read_text() == made + "\n"


def test_a_token_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    """An empty one is replaced."""
    (tmp_path / "token").write_text("kept\n")
    (tmp_path / "token").chmod(0o644)
    assert token(tmp_path, {}) == "kept" and mode(tmp_path / "token") == 0o600
    (tmp_path / "token").write_text("")
    assert len(token(tmp_path, {})) >= 40


def test_the_variable_goes_first(tmp_path: Path) -> None:
    """And nothing is written then."""
    assert token(tmp_path, {"MODELSWAP_TOKEN": " given "}) == "given"
    assert not (tmp_path / "token").exists()
    assert token(tmp_path, {"MODELSWAP_TOKEN": " "}) != ""


def test_a_token_that_cannot_be_kept_is_told(tmp_path: Path) -> None:
    """With the way out."""
    with pytest.raises(StateDirUnusable, match="MODELSWAP_TOKEN"):
        token(tmp_path / "nowhere", {})


def test_an_address_in_use_is_told_with_its_remedy() -> None:
    """As is one that isn't ours."""
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        first.listen()
        assert url_of(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(CantListen, match=r"orchestrator\.port"):
            listen("127.0.0.1", port)
    with pytest.raises(CantListen):
        listen("203.0.113.1", 0)


def test_ipv6_addresses_have_brackets_in_urls() -> None:
    """As URLs want them."""

    class Bound:
        def getsockname(self) -> tuple[str, int, int, int]:
            return "::1", 8888, 0, 0

    assert url_of(cast(socket.socket, Bound())) == "http://[::1]:8888"
