"""No web page can drive the admin API."""

from __future__ import annotations

import aiohttp
import pytest

from modelswap.orchestrator.api.guard import KnownHosts
from tests.orchestrator.conftest import Api
from tests.orchestrator.fakes import TOKEN, Bench


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8888", "127.0.0.1:8888", "127.3.2.1", "[::1]:8888", "[::1]", "gpu-box.lan:80"]
)
def test_loopback_and_allowed_names_are_known(host: str) -> None:
    """With and without a port."""
    assert KnownHosts("127.0.0.1", ["gpu-box.lan"]).knows(host)


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "localhost.evil.example", "192.168.0.5", "127.0.0.1.evil.example", "[::1", "localhost:x",
     "[::1]x", "0.0.0.0"],
)  # fmt: skip
def test_others_are_not(host: str) -> None:
    """A name that was rebound to our address is still not ours."""
    assert not KnownHosts("127.0.0.1", []).knows(host)


def test_bound_to_every_address_any_address_is_known_but_no_name() -> None:
    """Names can be rebound, addresses can't."""
    hosts = KnownHosts("0.0.0.0", [])
    assert hosts.knows("192.168.0.5:8888") and hosts.knows("[fe80::1]:8888")
    assert not hosts.knows("evil.example")


def test_the_configured_host_is_known() -> None:
    """Whatever it is."""
    assert KnownHosts("gpu-box", []).knows("gpu-box:8888") and KnownHosts("fd00::5", []).knows("[fd00::5]:8888")


@pytest.mark.parametrize(
    ("origin", "trusted"),
    [
        ("http://localhost:3000", True),
        ("https://127.0.0.1", True),
        ("http://[::1]:8888", True),
        ("http://gpu-box.lan", True),
        ("http://192.168.0.5:8888", True),
        ("http://192.168.0.5:9999", False),
        ("http://evil.example", False),
        ("null", False),
        ("chrome-extension://abc", False),
        ("file://", False),
    ],
)
def test_origins(origin: str, trusted: bool) -> None:
    """Our own pages, loopback's, and those of allowed names."""
    hosts = KnownHosts("0.0.0.0", ["gpu-box.lan"])
    assert hosts.trusts(origin, "192.168.0.5:8888") is trusted


@pytest.mark.parametrize("path", ["/status", "/events", "/metrics", "/"])
async def test_a_rebound_name_can_read_nothing(api: Api, path: str) -> None:
    """`Host` is looked at in every request."""
    status, text = await api.get(path, host="evil.example:8888")
    assert status == 403 and "allowed_hosts" in text


async def test_a_foreign_page_can_change_nothing(api: Api, bench: Bench) -> None:
    """`Origin` is looked at."""
    status, _ = await api.post("/ensure_model", {"model": "a"}, origin="http://evil.example")
    assert status == 403 and bench.runtime.orders == []
    status, _ = await api.post("/ensure_model", {"model": "a"}, origin=api.url)
    assert status == 200


@pytest.mark.parametrize(
    "media",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "text/plain; application/json"],
)
async def test_a_form_can_change_nothing(api: Api, media: str) -> None:
    """A POST must say that it is JSON."""
    async with api.http.post(
        api.url + "/ensure_model", data=b'{"model": "a"}', headers={"content-type": media}
    ) as answer:
        assert answer.status == 415
        assert (await answer.json())["error"]["code"] == "unsupported_media_type"


async def test_json_with_a_charset_is_json(api: Api) -> None:
    """Parameters don't matter."""
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    async with api.http.post(api.url + "/unload", data=b"{}", headers=headers) as answer:
        assert answer.status == 200


async def test_two_hosts_are_none(api: Api) -> None:
    """A request with several is refused."""
    import asyncio

    port = int(api.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /status HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert b" 403 " in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def test_a_page_cannot_open_the_gateways_connection(api: Api) -> None:
    """Not even with the token."""
    headers = {"authorization": f"Bearer {TOKEN}", "origin": "http://evil.example"}
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await api.http.ws_connect(api.url + "/gateway", headers=headers)
    assert refused.value.status == 403
