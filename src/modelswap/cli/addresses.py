"""Addresses to listen at: can they be had, and who has them."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass

import psutil

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def url(host: str, port: int) -> str:
    """Return the base URL at which a service that listens on ``host`` can be reached from this machine."""
    reachable = _ANY.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that listens at an address; ``supervisor`` is the modelswap process that keeps it running."""

    pid: int
    name: str
    is_service: bool = False
    supervisor: int | None = None

    def __str__(self) -> str:
        if self.supervisor is not None:
            return f"a running modelswap (pid {self.supervisor})"
        return f"{self.name} (pid {self.pid})"


@dataclass(frozen=True, slots=True)
class Unusable:
    """Why an address can't be listened at; ``holder`` where another process has it and may be looked at."""

    reason: str
    in_use: bool = False
    holder: Holder | None = None


def unusable(host: str, port: int) -> Unusable | None:
    """Try to bind to the address; return what is in the way, None if nothing is."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror:
        return Unusable(f"the host name {host!r} is not known")
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return _explain(error, host, port)
    return None


def _explain(error: OSError, host: str, port: int) -> Unusable:
    if error.errno == errno.EADDRINUSE:
        holder = find_holder(port)
        return Unusable(f"port {port} is taken by {holder or 'another process'}", in_use=True, holder=holder)
    if error.errno == errno.EADDRNOTAVAIL:
        return Unusable(f"{host} is not an address of this machine")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Unusable(f"this user may not listen on port {port} (ports below 1024 need privileges)")
    return Unusable(f"{host}:{port} can't be listened at: {error.strerror or os.strerror(error.errno or 0)}")


def find_holder(port: int) -> Holder | None:
    """Return who listens on ``port``; None where that can't be seen (another user's process)."""
    try:
        listening = [
            found.pid
            for found in psutil.net_connections(kind="tcp")
            if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port and found.pid
        ]
        return _holder(listening[0]) if listening else None
    except psutil.Error:  # not allowed (macOS), or it has just gone
        return None


def _holder(pid: int) -> Holder:
    process = psutil.Process(pid)
    is_service = _is_modelswap(process.cmdline(), "orchestrator", "gateway")
    parent = process.parent() if is_service else None
    kept = parent is not None and _is_modelswap(parent.cmdline(), "up", "demo")
    return Holder(pid, process.name(), is_service, parent.pid if parent is not None and kept else None)


def _is_modelswap(argv: list[str], *commands: str) -> bool:
    ours = any(part == "modelswap.cli.main" or part.endswith("/modelswap") for part in argv[:3])
    return ours and any(command in argv[1:5] for command in commands)


def free_port(host: str, avoid: set[int]) -> int:
    """Return a port that is free on ``host`` now and not in ``avoid``."""
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
            port = int(probe.getsockname()[1])
        if port not in avoid:
            return port
