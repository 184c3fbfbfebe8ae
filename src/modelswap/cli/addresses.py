"""Addresses to listen at: can they be had, and who has them."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass

import psutil

from modelswap.cli.parent import PARENT

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def url(host: str, port: int) -> str:
    """Return the base URL at which a service that listens on ``host`` can be reached from this machine."""
    reachable = _ANY.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that listens at an address.

    ``supervisor`` is the modelswap process that started it, if one did; ``leaving`` if that has died, so that this one
    is about to end, too.
    """

    pid: int
    name: str
    supervisor: int | None = None
    leaving: bool = False

    def __str__(self) -> str:
        if self.supervisor is not None and not self.leaving:
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
    told = process.environ().get(PARENT, "")
    supervisor = int(told) if told.isdecimal() else None
    return Holder(pid, process.name(), supervisor, leaving=supervisor is not None and supervisor != process.ppid())


def free_port(host: str, avoid: set[int]) -> int:
    """Return a port that is free on ``host`` now and not in ``avoid``."""
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
            port = int(probe.getsockname()[1])
        if port not in avoid:
            return port
