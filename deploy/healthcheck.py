#!/opt/modelswap/bin/python -IS
"""Exit with status 0 if the service in this container says that it is well.

Usage: modelswap-health [PORT]; without one, whichever of the gateway's and the orchestrator's answers. Uses nothing but
sockets, because it runs every few seconds: it takes some 20 ms.
"""

import socket
import sys

USUAL = ("8080", "8888")


def status(port: str) -> bytes:
    """Return the status line of ``GET /health``; empty if nobody listens there."""
    try:
        with socket.create_connection(("127.0.0.1", int(port)), timeout=4) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return connection.recv(100).partition(b"\r\n")[0]
    except OSError:
        return b""


answers = [status(port) for port in sys.argv[1:] or USUAL]
sys.stdout.write(b" ".join(filter(None, answers)).decode("latin-1") or "nobody listens")
sys.exit(not any(answer.split(b" ")[1:2] == [b"200"] for answer in answers))
