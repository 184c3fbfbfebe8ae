"""Where a container is reached, and when it was started, by what Docker says of it."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelswap.engines.base import Address
from modelswap.runtimes.docker.reach import Unreached, address_of, started_at
from modelswap.runtimes.docker.surroundings import Surroundings

HOST = Surroundings()
INSIDE = Surroundings(container="c" * 64, network="stack_default", networks=("other", "stack_default"))


def inspected(
    bindings: list[tuple[str, str]] | None = None,
    networks: dict[str, str] | None = None,
    mode: str = "bridge",
    running: bool = True,
) -> dict[str, Any]:
    ports = None if bindings is None else [{"HostIp": ip, "HostPort": port} for ip, port in bindings]
    joined = {name: {"IPAddress": ip, "NetworkID": f"id-of-{name}"} for name, ip in (networks or {}).items()}
    return {
        "Name": "/mistral-llm",
        "State": {"Running": running},
        "HostConfig": {"NetworkMode": mode},
        "NetworkSettings": {"Ports": {"8000/tcp": ports, "9000/udp": None}, "Networks": joined},
    }


@pytest.mark.parametrize(
    ("bindings", "expected"),
    [
        ([("127.0.0.1", "20001")], Address("127.0.0.1", 20001)),
        ([("0.0.0.0", "8000"), ("::", "8000")], Address("127.0.0.1", 8000)),
        ([("", "8000")], Address("127.0.0.1", 8000)),
        ([("192.168.1.5", "8000")], Address("192.168.1.5", 8000)),
        ([("192.168.1.5", "8000"), ("127.0.0.1", "8001")], Address("127.0.0.1", 8001)),
    ],
)
def test_on_the_host_a_published_port_is_taken(bindings: list[tuple[str, str]], expected: Address) -> None:
    """On loopback if it is published there, also as a part of every address."""
    assert address_of(inspected(bindings, {"bridge": "172.17.0.2"}), HOST, 8000) == expected


@pytest.mark.parametrize("bindings", [None, [], [("::", "8000")], [("127.0.0.1", "")]])
def test_on_the_host_an_unpublished_port_says_what_to_do(bindings: list[tuple[str, str]] | None) -> None:
    """The message has the line for the compose file."""
    with pytest.raises(Unreached, match=r'ports: \["127\.0\.0\.1::8000"\]'):
        address_of(inspected(bindings, {"bridge": "172.17.0.2"}), HOST, 8000)


def test_a_wrong_port_is_told_with_the_ports_there_are() -> None:
    """Most often 'port' in the config is what is wrong."""
    with pytest.raises(Unreached, match=r"port 8080 isn't published .*its ports are 8000/tcp"):
        address_of(inspected([("127.0.0.1", "1")]), HOST, 8080)


def test_inside_it_is_the_address_on_our_network() -> None:
    """A published port leads nowhere from there."""
    both = inspected([("127.0.0.1", "20001")], {"other": "172.19.0.2", "stack_default": "172.18.0.2"})
    assert address_of(both, INSIDE, 8000) == Address("172.18.0.2", 8000)
    by_id = Surroundings(container="c" * 64, network="id-of-other")
    assert address_of(both, by_id, 8000) == Address("172.19.0.2", 8000)


def test_inside_any_common_network_will_do() -> None:
    """Compose services may be on some networks of ours only."""
    found = inspected(networks={"foreign": "172.20.0.2", "other": "172.19.0.2"})
    assert address_of(found, INSIDE, 8000) == Address("172.19.0.2", 8000)


def test_inside_without_a_common_network_the_message_names_both() -> None:
    """And what to change."""
    with pytest.raises(Unreached, match="it is on foreign, and we are on stack_default"):
        address_of(inspected([("0.0.0.0", "8000")], {"foreign": "172.20.0.2"}), INSIDE, 8000)


def test_on_the_host_docker_network_goes_before_published_ports() -> None:
    """Who names a network wants it used; where a container isn't on it, its published port will do."""
    around = Surroundings(network="llm")
    found = inspected([("127.0.0.1", "20001")], {"llm": "172.21.0.2"})
    assert address_of(found, around, 8000) == Address("172.21.0.2", 8000)
    assert address_of(inspected([("127.0.0.1", "20001")], {}), around, 8000) == Address("127.0.0.1", 20001)


def test_a_container_on_the_hosts_network_is_reached_on_loopback() -> None:
    """By us on the host, and by us in a container that shares that network, too; not by others."""
    found = inspected(mode="host", networks={"host": ""})
    assert address_of(found, HOST, 8000) == Address("127.0.0.1", 8000)
    assert address_of(found, Surroundings(container="c" * 64), 8000) == Address("127.0.0.1", 8000)
    with pytest.raises(Unreached, match="network_mode: host"):
        address_of(found, INSIDE, 8000)


@pytest.mark.parametrize("around", [HOST, INSIDE])
def test_a_stopped_container_has_no_address(around: Surroundings) -> None:
    """Docker may still show one that is another's by now."""
    with pytest.raises(Unreached, match="doesn't run"):
        address_of(inspected([("127.0.0.1", "1")], {"stack_default": "172.18.0.2"}, running=False), around, 8000)


def test_never_started_is_zero() -> None:
    """Docker says the year 1 then."""
    assert started_at({"State": {"StartedAt": "0001-01-01T00:00:00Z"}}) == 0.0
    assert started_at({"State": {"StartedAt": ""}}) == 0.0
    assert started_at({}) == 0.0


@given(st.datetimes(dt.datetime(2015, 1, 1), dt.datetime(2100, 1, 1)), st.integers(0, 9), st.integers(0, 999))  # noqa: DTZ001
def test_the_time_of_a_start_is_read_to_the_microsecond(moment: dt.datetime, digits: int, nanos: int) -> None:
    """However many digits Docker shows (Go leaves out zeros at the end)."""
    fraction = f"{moment.microsecond:06}{nanos:03}"[:digits].rstrip("0")
    text = f"{moment:%Y-%m-%dT%H:%M:%S}" + (f".{fraction}" if fraction else "") + "Z"
    shown = moment.replace(microsecond=int(fraction.ljust(6, "0")[:6]), tzinfo=dt.UTC)
    assert abs(started_at({"State": {"StartedAt": text}}) - shown.timestamp()) < 1e-6
