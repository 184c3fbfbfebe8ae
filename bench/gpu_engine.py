"""A test engine built on PyTorch that behaves toward modelswap as vLLM does, with real weights and real sleep.

It takes the options that modelswap's `vllm` engine passes, loads its weights before it listens, fills its share of the
device with a KV cache, refuses to start where that share isn't free, and sleeps and wakes at both levels by vLLM's
development endpoints: asleep it is healthy, lets requests wait without a word, and keeps its context on the device.

Usage: python -m bench.gpu_engine --model FOLDER --served-model-name NAME … --host H --port P [--enable-sleep-mode]
[--gpu-memory-utilization 0.9] [--device cuda|cpu] [--ledger FILE] [--sleep-levels 1,2]; `bench.gpu_probe` makes FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import torch

from bench.gpu_memory import Account
from bench.gpu_weights import Weights

WORKSPACE: Final = 3 << 29
"""Bytes of the engine's share of a GPU that are left to the CUDA context and the libraries' workspaces."""
RESIDUE_SHARE: Final = 32
"""On the CPU, the ledger says that a sleeper keeps one part in so many of its weights."""


class Refused(Exception):
    """Asked for what it doesn't do."""


class Engine:
    """The weights, the KV cache, and whose turn it is. Any thread may call it."""

    def __init__(self, said: argparse.Namespace) -> None:
        self.names: list[str] = said.served_model_name
        self.level = 0
        self.running = self.waiting = 0
        self._said = said
        self._cuda = said.device != "cpu"
        self._account = Account(said.device, said.ledger, self.names[0])
        self._weights = Weights(Path(said.model), "cuda" if self._cuda else "cpu")
        self._cache: Any = None
        self._parts: set[str] = set()
        self._cache_bytes = self._share = 0
        self._closing = False
        self._door = threading.Condition()
        self._device = threading.Lock()

    def load(self) -> None:
        """Take its share of the device and be ready to answer; raises `SystemExit` where it isn't free."""
        free, total = self._account.room()
        share, gib = self._said.gpu_memory_utilization, 1 << 30
        self._share = int(total * share)
        if free < self._share:
            sys.exit(
                f"Free memory on device cuda:0 ({free / gib:.2f}/{total / gib:.2f} GiB) on startup is less than"
                f" desired GPU memory utilization ({share}, {self._share / gib:.2f} GiB)"
            )
        self._cache_bytes = self._share - self._weights.size - (WORKSPACE if self._cuda else self._residue())
        if self._cache_bytes <= 0:
            sys.exit("No available memory for the cache blocks")
        self._account.hold(self._share)
        began = time.monotonic()
        self._weights.load()
        print(f"weights loaded in {time.monotonic() - began:.2f} s", flush=True)
        self._take("kv_cache")
        self._parts = {"weights", "kv_cache"}
        # Warm, so that the first request meets no library that is still loading.
        next(self._weights.answer("warm up"))

    def answer(self, prompt: str, count: int) -> Iterator[int]:
        """Yield ``count`` tokens; waits while it sleeps."""
        with self._door:
            self.waiting += 1
            self._door.wait_for(lambda: not (self.level or self._closing))
            self.waiting -= 1
            self.running += 1
        tokens = self._weights.answer(prompt)
        try:
            for _ in range(count):
                with self._device:
                    token = next(tokens)
                yield token
        finally:
            tokens.close()  # it knows the weights, which are to be freed when nothing runs any more
            with self._door:
                self.running -= 1
                self._door.notify_all()

    def sleep(self, level: int) -> None:
        """Let what runs end (``mode=wait``), then give the device up; raises `Refused`."""
        if level not in self._said.sleep_levels:
            raise Refused(f"this engine does not sleep at level {level}")
        with self._door:
            self._closing = True
            self._door.wait_for(lambda: not self.running)
            if not self.level:
                self._cache = None
                if level == 1:
                    self._weights.offload()
                else:
                    self._weights.drop()
                self._parts = set()
                self.level = level
                self._account.hold(self._residue(), residue=True)
            self._closing = False

    def wake(self, parts: set[str]) -> None:
        """Take back ``parts`` of ``weights`` and ``kv_cache``; raises `MemoryError` or PyTorch's own."""
        with self._door:
            if not self.level:
                return
            for part in ("weights", "kv_cache"):
                if part in parts - self._parts:
                    self._hold(self._parts | {part})
                    self._take(part)
                    self._parts.add(part)
            if len(self._parts) == 2:
                self.level = 0
                self._door.notify_all()

    def reload(self) -> None:
        """Read the weights from their file again; raises `Refused` if there is no memory for them."""
        with self._door, self._device:
            if "weights" not in self._parts:
                raise Refused("wake the weights first")
            self._weights.load()

    def _take(self, part: str) -> None:
        if part == "kv_cache":
            self._cache = torch.empty(self._cache_bytes, dtype=torch.uint8, device="cuda" if self._cuda else "cpu")
        elif self.level == 1:
            self._weights.restore()
        else:
            self._weights.blank()

    def _hold(self, parts: set[str]) -> None:
        self._account.hold(self._share if len(parts) == 2 else self._weights.size + self._residue())

    def _residue(self) -> int:
        return self._weights.size // RESIDUE_SHARE

    def metrics(self) -> str:
        """Return what modelswap reads of vLLM's ``/metrics``."""
        label = f'engine="0",model_name="{self.names[0]}"'
        states = enumerate(("awake", "weights_offloaded", "discard_all"))
        return "".join(
            (
                f"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{{{label}}} {float(self.running)}\n",
                f"# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{{{label}}} {float(self.waiting)}\n",
                "# TYPE vllm:engine_sleep_state gauge\n",
                *(
                    f'vllm:engine_sleep_state{{{label},sleep_state="{state}"}} {float(self.level == level)}\n'
                    for level, state in states
                ),
            )
        )


class Server(ThreadingHTTPServer):
    """Serves one `Engine`; ``develops``: with vLLM's development endpoints."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], engine: Engine, *, develops: bool, sleeps: bool) -> None:
        self.engine = engine
        self.develops = develops
        self.sleeps = sleeps
        super().__init__(address, Handler)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Server

    def do_GET(self) -> None:
        """Answer what asks."""
        engine = self.server.engine
        path = urlsplit(self.path).path
        if path in ("/health", "/ping"):
            self._reply(200, None)
        elif path == "/v1/models":
            self._reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in engine.names]})
        elif path == "/version":
            self._reply(200, {"version": f"torch {torch.__version__}"})
        elif path == "/metrics":
            self._send(200, engine.metrics().encode(), "text/plain; version=0.0.4")
        elif path == "/is_sleeping" and self.server.develops:
            self._reply(200, {"is_sleeping": bool(engine.level)})
        else:
            self._reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        """Do what is told."""
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        try:
            if url.path in ("/v1/completions", "/v1/chat/completions"):
                self._complete(json.loads(body), chat="chat" in url.path)
            elif self.server.develops and self._told(url.path, parse_qs(url.query), body):
                self._reply(200, None)
            else:
                self._reply(404, {"detail": "Not Found"})
        except ConnectionError:
            self.close_connection = True
        except (Refused, ValueError, KeyError) as wrong:
            self._fail(400, wrong)
        except (MemoryError, torch.cuda.OutOfMemoryError) as short:
            self._fail(500, f"out of memory: {short}")

    def _told(self, path: str, asked: dict[str, list[str]], body: bytes) -> bool:
        engine = self.server.engine
        match path:
            case "/sleep" if self.server.sleeps:
                engine.sleep(int(asked.get("level", ["1"])[0]))
            case "/wake_up" if self.server.sleeps:
                engine.wake(set(asked.get("tags", ["weights", "kv_cache"])))
            case "/collective_rpc" if json.loads(body)["method"] == "reload_weights":
                engine.reload()
            case "/reset_prefix_cache":
                pass  # it has none
            case _:
                return False
        return True

    def _complete(self, asked: dict[str, Any], *, chat: bool) -> None:
        if asked["model"] not in self.server.engine.names:
            self._reply(404, {"error": {"message": f"The model `{asked['model']}` does not exist.", "code": 404}})
            return
        count = int(asked.get("max_tokens") or 16)
        prompt = json.dumps(asked["messages"]) if chat else str(asked["prompt"])
        tokens = (f" {token}" for token in self.server.engine.answer(prompt, count))
        if asked.get("stream"):
            self._stream(tokens, asked["model"], chat=chat)
            return
        words = list(tokens)
        text = "".join(words)
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if asked.get("logprobs"):
            content = [{"token": word, "logprob": 0.0} for word in words]
            said["logprobs"] = {"content": content} if chat else {"tokens": words}
        usage = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": 1 + len(words)}
        self._reply(200, _answer(asked["model"], {**said, "finish_reason": "length"}, chat=chat) | {"usage": usage})

    def _stream(self, tokens: Iterator[str], model: str, *, chat: bool) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for token in tokens:
            said = {"delta": {"content": token}} if chat else {"text": token}
            self._event(json.dumps(_answer(model, {**said, "finish_reason": None}, chat=chat, chunk=True)))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
        self.wfile.flush()

    def _fail(self, status: int, why: object) -> None:
        print(f"{self.path}: {why}", flush=True)
        self._reply(status, {"error": {"message": str(why), "code": status}})

    def _reply(self, status: int, answer: dict[str, Any] | None) -> None:
        self._send(status, b"" if answer is None else json.dumps(answer).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing of requests."""


def _answer(model: str, choice: dict[str, Any], *, chat: bool, chunk: bool = False) -> dict[str, Any]:
    kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
    created = int(time.time())
    return {"id": "cmpl-0", "object": kind, "created": created, "model": model, "choices": [{"index": 0, **choice}]}


def main() -> int:
    """Load, then serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-model-name", nargs="+", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--enable-sleep-mode", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ledger")
    parser.add_argument("--sleep-levels", type=lambda text: [int(word) for word in text.split(",")], default=[1, 2])
    said = parser.parse_args()
    engine = Engine(said)
    engine.load()
    develops = os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
    server = Server((said.host, said.port), engine, develops=develops, sleeps=said.enable_sleep_mode)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown, daemon=True).start())
    server.serve_forever(poll_interval=0.05)
    return 0


if __name__ == "__main__":
    sys.exit(main())
