"""Where a running container is reached, read from what Docker says of it; pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any, Final

from modelswap.engines.base import Address
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.runtimes.docker.surroundings import Surroundings

_LOOPBACK: Final = "127.0.0.1"
_EVERYWHERE: Final = ("0.0.0.0", "")


class Unreached(ModelswapError):
    """A container runs, but there is no way from us to its port; the message says how to make one."""

    code = Code.MODEL_BROKEN


def address_of(inspected: Mapping[str, Any], around: Surroundings, port: int) -> Address:
    """Return where we reach ``port`` of the container that ``GET /containers/ID/json`` has described.

    Without a network of our own that is the published port on Docker's host, on loopback if it is there; else it is
    the container's address on `Surroundings.network`, or on another network that we are on. Docker gives addresses
    anew at every start: never keep one. Raises `Unreached`, also for a container that doesn't run.
    """
    name = str(inspected.get("Name", "")).lstrip("/")
    if not inspected.get("State", {}).get("Running"):
        raise Unreached(f"container {name} has no address: it doesn't run", code=Code.MODEL_START_FAILED)
    if _on_host_network(inspected):
        if around.container and around.network:
            raise Unreached(
                f"container {name} uses the host's network, which can't be reached from inside a container; put it on"
                f" the network {around.network}, or run modelswap with network_mode: host"
            )
        return Address(_LOOPBACK, port)
    found = _on_network(inspected, around, port) if around.network else None
    if found is None and not (around.container and around.network):
        found = _published(inspected, port)
    if found is None:
        raise Unreached(_remedy(name, inspected, around, port))
    return found


def started_at(inspected: Mapping[str, Any]) -> float:
    """Return when Docker last started the container, in Unix seconds, to the microsecond; 0.0 if it never did."""
    text = str(inspected.get("State", {}).get("StartedAt", ""))
    if not text or text.startswith("0001-"):
        return 0.0
    # Python keeps six of Docker's nine digits.
    moment = dt.datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    return moment.timestamp()


def _on_host_network(inspected: Mapping[str, Any]) -> bool:
    return bool(inspected.get("HostConfig", {}).get("NetworkMode") == "host")


def _networks(inspected: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    return inspected.get("NetworkSettings", {}).get("Networks") or {}


def _on_network(inspected: Mapping[str, Any], around: Surroundings, port: int) -> Address | None:
    for wanted in (around.network, *around.networks):
        for name, endpoint in _networks(inspected).items():
            # The config may give a network's name or its id.
            if wanted in (name, endpoint.get("NetworkID")) and (ip := endpoint.get("IPAddress")):
                return Address(str(ip), port)
    return None


def _published(inspected: Mapping[str, Any], port: int) -> Address | None:
    ports = inspected.get("NetworkSettings", {}).get("Ports") or {}
    bindings = [(str(b.get("HostIp", "")), str(b.get("HostPort", ""))) for b in ports.get(f"{port}/tcp") or ()]
    found = [
        Address(_LOOPBACK if ip in _EVERYWHERE else ip, int(number)) for ip, number in bindings if number.isdigit()
    ]
    # Docker publishes on IPv6 besides, which isn't needed here.
    usable = sorted((a for a in found if ":" not in a.host), key=lambda a: (a.host != _LOOPBACK, a.host, a.port))
    return usable[0] if usable else None


def _remedy(name: str, inspected: Mapping[str, Any], around: Surroundings, port: int) -> str:
    if around.container and around.network:
        others = ", ".join(sorted(_networks(inspected))) or "no network"
        return (
            f"container {name} can't be reached: it is on {others}, and we are on {around.network}; put it on"
            f" {around.network}, or say docker.network and put modelswap's own container on that one"
        )
    published = sorted(inspected.get("NetworkSettings", {}).get("Ports") or {})
    exposed = (
        f" (its ports are {', '.join(published)}: does 'port' in the config say the right one?)" if published else ""
    )
    return (
        f"container {name} can't be reached: port {port} isn't published on this machine{exposed}; give it"
        f' ports: ["127.0.0.1::{port}"] in its compose file and create it anew, or say docker.network to reach it by'
        " its address on that network"
    )
