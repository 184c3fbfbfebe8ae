"""A server that speaks as much of the Hugging Face hub's API as a download needs, and misbehaves when told to."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_LARGE = 1 << 10
"""From this size on a file counts as large (LFS): its blob is named by its SHA-256."""
_CHUNK = 64 << 10


@dataclass
class Repository:
    """One model's files at one commit; ``refused`` is the status and the error code that every answer has."""

    files: dict[str, bytes]
    commit: str = "c0ffee" + "0" * 34
    token: str = ""
    refused: tuple[int, str] | None = None
    refused_files: tuple[int, str] | None = None


@dataclass
class Hub:
    """What is served, and how badly; ``asked`` are the requests so far, ``sent`` the bytes of files."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    ranges: list[str] = field(default_factory=list)
    sent: int = 0
    stall_after: int | None = None
    """Sends this many bytes of a large file, then waits for `go_on`."""
    cut_after: int | None = None
    """Resets the connection after this many bytes of a large file, once."""
    wrong_by: int = 0
    """Large files are this much longer than the hub says elsewhere."""
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def gets(self) -> list[str]:
        """Return the paths of the files that were fetched."""
        return [each.removeprefix("GET ") for each in self.asked if each.startswith("GET ") and "/resolve/" in each]


@contextmanager
def serving(host: str = "127.0.0.1", port: int = 0) -> Iterator[Hub]:
    """Serve until the block ends."""

    class Handler(_Handler):
        pass

    with _Server((host, port), Handler) as server:
        hub = Hub(f"http://{host}:{server.server_port}")
        Handler.hub = hub
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            hub.go_on.set()
            server.shutdown()
            thread.join()


def etag(content: bytes) -> str:
    """Return what the hub calls a file's contents: git's hash of it, or its SHA-256 if it is large."""
    if len(content) >= _LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet: clients are killed in these tests."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Keep quiet."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        with self.hub.lock:
            self.hub.asked.append(f"{self.command} {path}")
            if token:
                self.hub.tokens.add(token)
        match = re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/]+))?|/(.+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            self._refuse(404, "RepoNotFound")
            return
        name = match[1] or match[4]
        repository = self.hub.repositories.get(name)
        if repository is None:
            # As the hub does: who isn't known can't be told that it isn't there.
            self._refuse(404 if token else 401, "RepoNotFound")
        elif repository.refused is not None:
            self._refuse(*repository.refused)
        elif repository.token and token != repository.token:
            self._refuse(401, "GatedRepo")
        elif (match[3] or match[5] or "main") not in ("main", repository.commit):
            self._refuse(404, "RevisionNotFound")
        elif match[2] == "tree":
            self._json([_entry(path, content) for path, content in repository.files.items()])
        elif match[1]:
            siblings = [{"rfilename": path, "size": len(content)} for path, content in repository.files.items()]
            self._json({"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings})
        elif repository.refused_files is not None:
            self._refuse(*repository.refused_files)
        elif match[6] not in repository.files:
            self._refuse(404, "EntryNotFound")
        else:
            self._file(repository, repository.files[match[6]])

    def _json(self, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, repository: Repository, content: bytes) -> None:
        large, right = len(content) >= _LARGE, content
        if large and self.command == "GET":
            content = content + b"!" * self.hub.wrong_by if self.hub.wrong_by >= 0 else content[: self.hub.wrong_by]
        begin = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
        if wanted is not None and self.command == "GET":
            begin = int(wanted[1])
            with self.hub.lock:
                self.hub.ranges.append(wanted[0])
        self.send_response(206 if wanted is not None and self.command == "GET" else 200)
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("ETag", f'"{etag(right)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Date", formatdate(usegmt=True))
        if large:
            self.send_header("X-Linked-Size", str(len(right)))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if self.command == "GET":
            self._send(content, begin, large=large)

    def _send(self, content: bytes, begin: int, *, large: bool) -> None:
        hub = self.hub
        for at in range(begin, len(content), _CHUNK):
            if large and hub.cut_after is not None and at - begin >= hub.cut_after:
                hub.cut_after = None
                # A reset, as when a router forgets a connection.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            if large and hub.stall_after is not None and at - begin >= hub.stall_after:
                hub.stalled.set()
                hub.go_on.wait()
            chunk = content[at : at + _CHUNK]
            self.wfile.write(chunk)
            with hub.lock:
                hub.sent += len(chunk)


def _entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
    if len(content) >= _LARGE:
        entry["lfs"] = {"oid": etag(content), "size": len(content), "pointerSize": 135}
    return entry
