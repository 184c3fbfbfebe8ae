"""Who listens where: the kernel's two answers agree."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from modelswap.engines.base import Address
from modelswap.runtimes import sockets


def _refuse(port: int) -> Iterator[tuple[bytes, int]]:
    raise PermissionError("no netlink in this sandbox")


@pytest.fixture(params=["netlink", "proc"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask each of the two ways."""
    if request.param == "proc":
        monkeypatch.setattr(sockets, "_asked", _refuse)


def _listen(family: socket.AddressFamily, host: str, port: int = 0) -> socket.socket:
    server = socket.socket(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind((host, port))
    server.listen()
    return server


def _has_ipv6() -> bool:
    """Return whether this machine has IPv6 on loopback; containers often haven't."""
    try:
        _listen(socket.AF_INET6, "::1").close()
    except OSError:
        return False
    return True


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("family", "bound", "asked", "accepts"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1", True),
        (socket.AF_INET, "0.0.0.0", "127.0.0.1", True),
        (socket.AF_INET, "127.0.0.2", "127.0.0.1", False),
        (socket.AF_INET, "127.0.0.1", "::1", False),
    ]
    + [
        (socket.AF_INET6, "::", "127.0.0.1", True),
        (socket.AF_INET6, "::", "::1", True),
        (socket.AF_INET6, "::1", "::1", True),
        (socket.AF_INET6, "::1", "127.0.0.1", False),
        (socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1", True),
    ]
    * _has_ipv6(),
)
def test_listeners_are_those_that_accept(family: socket.AddressFamily, bound: str, asked: str, accepts: bool) -> None:
    """A socket counts if it is bound to the address, or to all addresses of its kind."""
    with _listen(family, bound) as server:
        port = server.getsockname()[1]
        expected = {os.fstat(server.fileno()).st_ino} if accepts else set()
        assert sockets.listeners(Address(asked, port)) == expected
        assert sockets.held(os.getpid(), expected | {1}) == expected
    assert sockets.listeners(Address(asked, port)) == set()


@pytest.mark.usefixtures("way")
def test_the_nearer_listener_gets_the_connections() -> None:
    """A socket bound to the address hides one bound to all addresses; two equal ones both count."""
    with _listen(socket.AF_INET, "0.0.0.0") as everywhere:
        port = everywhere.getsockname()[1]
        with _listen(socket.AF_INET, "127.0.0.1", port) as here, _listen(socket.AF_INET, "127.0.0.1", port) as too:
            inodes = {os.fstat(server.fileno()).st_ino for server in (here, too)}
            assert sockets.listeners(Address("127.0.0.1", port)) == inodes


@pytest.mark.usefixtures("way")
def test_connections_are_no_listeners() -> None:
    """Connections on a port, open or closing, don't count."""
    with _listen(socket.AF_INET, "127.0.0.1") as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
    with client, accepted:
        assert sockets.listeners(Address("127.0.0.1", port)) == set()


def test_a_process_that_has_gone_holds_nothing() -> None:
    """Asking for the sockets of a process that has ended is no error."""
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        pass
    assert sockets.held(process.pid, {1}) == set()
