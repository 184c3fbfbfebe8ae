"""Loopback ports: in turn, free, outside of what the kernel gives away."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from modelswap.runtimes.base import StartFailed
from modelswap.runtimes.ports import HOST, Ports, is_free, outside_ephemeral


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """Give a folder that stands for /proc/sys/net/ipv4."""
    return tmp_path


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody has, from where nobody gets one by chance."""
    ports = Ports(Path("/nonexistent/memory"))
    return [ports.take() for _ in range(count)]


def test_ports_come_in_turn_and_go_on_after_a_restart(tmp_path: Path) -> None:
    """No port comes back before all others were used, also across a restart."""
    pool = _free_ports(4)
    first = Ports(tmp_path / "last", pool)
    taken = [first.take() for _ in range(3)]
    taken.append(Ports(tmp_path / "last", pool).take())
    assert sorted(taken) == sorted(pool)


def test_a_forgotten_last_port_is_no_error(tmp_path: Path) -> None:
    """Garbage, or a port that is no longer among ours, starts anew."""
    [port] = pool = _free_ports(1)
    for text in ("garbage", "1"):
        (tmp_path / "last").write_text(text)
        assert Ports(tmp_path / "last", pool).take() == port


def test_one_port_may_be_used_every_time(tmp_path: Path) -> None:
    """Tests can force every start onto the address that another one just left."""
    pool = _free_ports(1)
    ports = Ports(tmp_path / "last", pool)
    assert [ports.take(), ports.take()] == pool * 2


def test_ports_in_use_are_passed_over(tmp_path: Path) -> None:
    """A port on which somebody listens, on loopback or on all addresses, is not handed out."""
    loopback, everywhere, free = pool = _free_ports(3)
    ports = Ports(tmp_path / "last", pool)
    with socket.create_server((HOST, loopback)), socket.create_server(("0.0.0.0", everywhere)):
        assert {ports.take() for _ in range(3)} == {free}


def test_no_free_port_says_so(tmp_path: Path) -> None:
    """When all ports are in use the error says which, and how to see by whom."""
    [port] = pool = _free_ports(1)
    ports = Ports(tmp_path / "last", pool)
    with socket.create_server((HOST, port)), pytest.raises(StartFailed, match=rf"{port}.*ss -ltnp"):
        ports.take()
    with pytest.raises(ValueError, match="no ports"):
        Ports(tmp_path / "last", [])


def test_lingering_connections_put_a_port_last(tmp_path: Path) -> None:
    """A port in TIME_WAIT is used only if there is no other, because some servers can't listen there."""
    lingering, other = pool = _free_ports(2)
    with socket.create_server((HOST, lingering)) as server:
        client = socket.create_connection((HOST, lingering))
        accepted, _ = server.accept()
        accepted.close()  # who closes first lingers: here the server's side
        client.recv(1)
        client.close()
    assert not is_free(lingering, lingering=False)
    assert is_free(lingering, lingering=True)
    assert {Ports(tmp_path / "a", pool).take() for _ in range(5)} == {other}
    assert Ports(tmp_path / "b", [lingering]).take() == lingering


@pytest.mark.parametrize(
    ("ephemeral", "reserved", "expected"),
    [
        ("32768\t60999\n", "\n", range(20_000, 30_000)),
        ("32768 60999", "20000-29000,29002", [29_001, *range(29_003, 30_000)]),
        ("15000 65535", "", range(10_000, 15_000)),
        ("1024 61000", "", range(61_001, 65_536)),
        ("1024 65535", "", range(20_000, 30_000)),
        (None, None, range(20_000, 30_000)),
        ("garbage", "garbage", range(20_000, 30_000)),
    ],
)
def test_ports_are_outside_the_ephemeral_range(
    kernel: Path, ephemeral: str | None, reserved: str | None, expected: list[int]
) -> None:
    """Ports that outgoing connections may get, or that are reserved, are left alone as long as there are others."""
    for name, text in (("ip_local_port_range", ephemeral), ("ip_local_reserved_ports", reserved)):
        if text is not None:
            (kernel / name).write_text(text)
    assert list(outside_ephemeral(kernel)) == list(expected)
