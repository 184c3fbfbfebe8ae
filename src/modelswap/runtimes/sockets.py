"""Who listens where, from ``/proc`` (Linux)."""

from __future__ import annotations

import os
import socket
import struct
from typing import Final

from modelswap.engines.base import Address

_LISTEN: Final = b"0A"
_ANY4: Final = b"0" * 8
_ANY6: Final = b"0" * 32
_MAPPED: Final = b"\0" * 10 + b"\xff\xff"


def _hex(packed: bytes) -> bytes:
    """Return an address as the kernel prints it: 32-bit words in the machine's byte order."""
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words).encode()


def _accepting(table: str, port: int, exact: bytes, wildcard: bytes) -> list[tuple[bool, int]]:
    """Return (is exact, inode) of every socket in ``table`` that listens on ``port`` at one of the two addresses."""
    wanted = {exact + b":%04X" % port: True, wildcard + b":%04X" % port: False}
    try:
        descriptor = os.open(table, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # no IPv6 here
        return []
    found: list[tuple[bool, int]] = []
    try:
        rest = b""
        while chunk := os.read(descriptor, 65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                fields = line.split(maxsplit=10)
                if fields[0] == b"sl":
                    continue
                # The kernel prints listening sockets first; after them come all connections, however many.
                if fields[3] != _LISTEN:
                    return found
                if (is_exact := wanted.get(fields[1])) is not None:
                    found.append((is_exact, int(fields[9])))
        return found
    finally:
        os.close(descriptor)


def listeners(address: Address) -> set[int]:
    """Return the inodes of the sockets that take connections to ``address``: bound to it, or else to any address."""
    if ":" in address.host:
        packed = socket.inet_pton(socket.AF_INET6, address.host)
        found = _accepting("/proc/net/tcp6", address.port, _hex(packed), _ANY6)
    else:
        packed = socket.inet_aton(address.host)
        found = _accepting("/proc/net/tcp", address.port, _hex(packed), _ANY4)
        found += _accepting("/proc/net/tcp6", address.port, _hex(_MAPPED + packed), _ANY6)
    exact = {inode for is_exact, inode in found if is_exact}
    return exact or {inode for _, inode in found}


def held(pid: int, inodes: set[int]) -> set[int]:
    """Return which of these sockets a process has open."""
    names = {f"socket:[{inode}]": inode for inode in inodes}
    folder = f"/proc/{pid}/fd"
    found: set[int] = set()
    try:
        entries = os.listdir(folder)  # noqa: PTH208 - looked at every few ms during a start
    except OSError:  # it has gone, or may not be looked at
        return found
    for entry in entries:
        try:
            inode = names.get(os.readlink(f"{folder}/{entry}"))  # noqa: PTH115 - likewise
        except OSError:  # closed meanwhile
            continue
        if inode is not None:
            found.add(inode)
    return found
