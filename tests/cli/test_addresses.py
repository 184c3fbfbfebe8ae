"""Addresses: are they free, who has them, what URL leads to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys

import pytest

from modelswap.cli import addresses
from modelswap.cli.addresses import Holder
from modelswap.cli.failure import ExitCode, Failure
from modelswap.cli.stack import check_addresses
from modelswap.spec.config import Config
from modelswap.spec.load import loads
from tests.ports import free_port


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("fe80::1", "http://[fe80::1]:80"),
        ("gpu.lan", "http://gpu.lan:80"),
    ],
)
def test_url_leads_to_where_a_service_listens(host: str, expected: str) -> None:
    """Wildcards become loopback, IPv6 gets its brackets."""
    assert addresses.url(host, 80) == expected


def test_a_free_port_is_usable() -> None:
    """A port that was just found free can be had, and one to be avoided is not offered."""
    port = addresses.free_port("127.0.0.1", set())
    assert addresses.unusable("127.0.0.1", port) is None
    assert addresses.free_port("127.0.0.1", {port}) != port


def test_a_taken_port_names_its_holder() -> None:
    """Who holds the port is told by name and PID."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = addresses.unusable("127.0.0.1", server.getsockname()[1])
    assert found is not None
    assert found.in_use
    assert f"(pid {os.getpid()})" in found.reason


def test_hosts_that_are_not_ours_are_told() -> None:
    """A foreign address and an unknown name are different mistakes."""
    foreign = addresses.unusable("192.0.2.1", 8080)
    unknown = addresses.unusable("no such host.invalid", 8080)
    assert foreign is not None
    assert foreign.reason == "192.0.2.1 is not an address of this machine"
    assert unknown is not None
    assert "is not known" in unknown.reason


def test_a_running_modelswap_is_named_as_such() -> None:
    """Its supervisor is what the user must stop, not the service that has the port."""
    assert str(Holder(5, "python", supervisor=4)) == "a running modelswap (pid 4)"
    assert str(Holder(5, "nginx")) == "nginx (pid 5)"


def config(gateway: int, orchestrator: int) -> Config:
    """Return a config with these ports."""
    return loads(
        f"models: {{a: {{engine: custom, command: [x, '{{port}}']}}}}\n"
        f"gateway: {{port: {gateway}}}\norchestrator: {{port: {orchestrator}}}\n"
    )


@pytest.mark.parametrize(("gateway", "orchestrator"), [(0, 8888), (8080, 0)])
async def test_ports_that_can_not_work_are_config_errors(gateway: int, orchestrator: int) -> None:
    """No port at all is refused before anything starts."""
    with pytest.raises(Failure) as refused:
        await check_addresses(config(gateway, orchestrator), lambda line: None)
    assert refused.value.code is ExitCode.USAGE


async def test_a_strangers_port_is_refused_at_once() -> None:
    """The error says who has the port and which key to change."""
    free = free_port()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(Failure, match=rf"taken by .*{os.getpid()}") as refused,
    ):
        await check_addresses(config(server.getsockname()[1], free), lambda line: None)
    assert "gateway.port" in str(refused.value.remedy)


LINGERER = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[-1])))
print("listening", flush=True)
sys.stdin.readline()
"""


async def test_the_services_of_a_killed_supervisor_are_waited_for() -> None:
    """A service of ours that has lost its supervisor is about to end, so its port is waited for."""
    port = free_port()
    said: list[str] = []
    argv = [sys.executable, "-c", LINGERER, str(port)]
    lingerer = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "MODELSWAP_PARENT": "1999999999"},
    )
    try:
        assert lingerer.stdout is not None
        await lingerer.stdout.readline()

        def say(line: str) -> None:
            assert lingerer.stdin is not None
            said.append(line)
            lingerer.stdin.close()

        await check_addresses(config(port, free_port()), say)
    finally:
        if lingerer.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                lingerer.kill()
        await lingerer.wait()
    assert len(said) == 1
    assert f"free port {port}" in said[0]
