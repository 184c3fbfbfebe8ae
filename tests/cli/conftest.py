"""A fake orchestrator, and a way to run the command in this process."""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from modelswap.cli.main import run


@dataclass(slots=True)
class Fake:
    """Answers what it is told to: by method and path a status and a body, or a function that returns both."""

    url: str
    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


class Server(ThreadingHTTPServer):
    """A server that doesn't mind clients that leave."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep quiet."""


@pytest.fixture
def fake() -> Iterator[Fake]:
    """Yield a fake orchestrator that listens."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def _answer(self, method: str) -> None:
            length = int(self.headers.get("content-length") or 0)
            key = f"{method} {self.path}"
            body = self.rfile.read(length)
            served.asked.append((key, json.loads(body) if body else None))
            found = served.answers.get(key, (404, {"detail": "nothing here"}))
            status, content = found() if callable(found) else found
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
            """Keep quiet."""

    with Server(("127.0.0.1", 0), Handler) as server:
        served = Fake(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Return a function that runs ``modelswap`` with the given arguments on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("MODELSWAP_CONFIG", "MODELSWAP_URL"):
        monkeypatch.delenv(name, raising=False)

    def ran(*argv: str) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(list(argv))
        said = capsys.readouterr()
        return Ran(int(ended.value.code or 0), said.out, said.err)

    return ran


@pytest.fixture(autouse=True)
def own_orphans_only() -> Iterator[None]:
    """Undo what a `Supervisor` in this process asked of the kernel, so that other tests' orphans aren't sent to us."""
    yield
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
