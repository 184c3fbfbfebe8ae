"""Who listens where (Linux): asked of the kernel by netlink, or read from ``/proc/net`` where that is not allowed."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from modelswap.engines.base import Address

# A socket that listens: its address (4 or 16 bytes) and its inode.
_Listener = tuple[bytes, int]

_ANY: Final = (bytes(4), bytes(16))
_MAPPED: Final = bytes(10) + b"\xff\xff"

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_REQUEST_DUMP: Final = 0x301
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_TCP_LISTEN: Final = 10
_HEADER: Final = struct.Struct("=IHHII")
# struct inet_diag_req_v2: family, protocol, extensions, padding, states; then ports, addresses, interface, cookie.
_QUESTION: Final = struct.Struct("=BBBxI 2s2s16s16sIII")
# struct inet_diag_msg up to its inode, of which family, source port, source address and inode are used.
_ANSWER: Final = struct.Struct("=B3x 2s2x16s16x12x 16x I")


def listeners(address: Address) -> set[int]:
    """Return the inodes of the sockets that take connections to ``address``: bound to it, or else to any address."""
    version6 = ":" in address.host
    packed = socket.inet_pton(socket.AF_INET6 if version6 else socket.AF_INET, address.host)
    exact = (packed,) if version6 else (packed, _MAPPED + packed)
    wildcard = _ANY[1:] if version6 else _ANY
    try:
        found = list(_asked(address.port))
    except OSError:  # a sandbox without netlink
        found = list(_read(address.port))
    bound = {inode for where, inode in found if where in exact}
    return bound or {inode for where, inode in found if where in wildcard}


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


def _asked(port: int) -> Iterator[_Listener]:
    """Ask the kernel (sock_diag(7)), which looks at listening sockets only, however many connections there are."""
    wire_port = port.to_bytes(2, "big")
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(1.0)
        for family in (socket.AF_INET, socket.AF_INET6):
            question = _QUESTION.pack(
                family, socket.IPPROTO_TCP, 0, 1 << _TCP_LISTEN, wire_port, b"", b"", b"", 0, 0xFFFFFFFF, 0xFFFFFFFF
            )
            size = _HEADER.size + len(question)
            netlink.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, family, 0) + question)
            yield from _answers(netlink, 4 if family == socket.AF_INET else 16, wire_port)


def _answers(netlink: socket.socket, width: int, wire_port: bytes) -> Iterator[_Listener]:
    while True:
        answer = netlink.recv(65536)
        offset = 0
        while offset < len(answer):
            size, kind, *_ = _HEADER.unpack_from(answer, offset)
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                raise OSError("the kernel does not answer sock_diag")
            _, source_port, source, inode = _ANSWER.unpack_from(answer, offset + _HEADER.size)
            if source_port == wire_port:
                yield source[:width], inode
            offset += (size + 3) & ~3


def _read(port: int) -> Iterator[_Listener]:
    """Read the kernel's tables; the more connections, the longer it takes."""
    suffix = b":%04X" % port
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not Path(table).exists():  # no IPv6 here
            continue
        with Path(table).open("rb") as lines:
            next(lines, None)
            for line in lines:
                fields = line.split(maxsplit=10)
                # The kernel prints listening sockets first; after them come all connections.
                if fields[3] != b"%02X" % _TCP_LISTEN:
                    break
                if fields[1].endswith(suffix):
                    yield _unhex(fields[1].removesuffix(suffix)), int(fields[9])


def _unhex(printed: bytes) -> bytes:
    """Read an address as the kernel prints it: 32-bit words in the machine's byte order."""
    words = [int(printed[at : at + 8], 16) for at in range(0, len(printed), 8)]
    return struct.pack(f"={len(words)}I", *words)
