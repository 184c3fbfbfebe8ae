"""A Docker Engine that fails as it is told to: the part of its API that the runtime uses, over a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import struct
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web

NEVER: Final = "0001-01-01T00:00:00Z"


def moment(at: float) -> str:
    """Return a time as Docker writes it."""
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "123Z" if at else NEVER


@dataclass(slots=True, eq=False)
class Container:
    """One container; its process obeys ``deaf_to`` no signal of these."""

    id: str
    name: str
    body: dict[str, Any]
    running: bool = False
    started: float = 0.0
    finished: float = 0.0
    exit_code: int = 0
    oom: bool = False
    starts: int = 0
    signals: list[str] = field(default_factory=list)
    deaf_to: set[str] = field(default_factory=set)
    log: list[tuple[int, bytes]] = field(default_factory=list)

    def inspected(self) -> dict[str, Any]:
        """Return what ``GET /containers/ID/json`` says."""
        ports = self.body.get("HostConfig", {}).get("PortBindings", {})
        return {
            "Id": self.id,
            "Name": f"/{self.name}",
            "State": {
                "Status": "running" if self.running else "exited" if self.starts else "created",
                "Running": self.running,
                "OOMKilled": self.oom,
                "ExitCode": self.exit_code,
                "StartedAt": moment(self.started),
                "FinishedAt": moment(self.finished),
            },
            "Config": {
                "Labels": self.body.get("Labels", {}),
                "ExposedPorts": self.body.get("ExposedPorts", {}),
                "Tty": self.body.get("Tty", False),
                **{key: self.body.get(key) for key in ("Entrypoint", "Cmd", "Env")},
            },
            "HostConfig": {"RestartPolicy": {"Name": "no"}, **self.body.get("HostConfig", {})},
            "NetworkSettings": {"Networks": {}, "Ports": ports if self.running else {}},
        }


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Fault = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]


class FakeDocker:
    """The engine. ``fault`` is asked before each answer, and may answer or fail in its place."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.containers: dict[str, Container] = {}
        self.volumes: dict[str, dict[str, Any]] = {}
        self.images: dict[str, dict[str, Any]] = {"img": {"Id": "sha256:1", "Config": {"Entrypoint": ["serve"]}}}
        self.fault: Fault | None = None
        self.mute = False
        """Whether events are lost."""
        self.streams = 0
        """How often the containers' events were asked for."""
        self.inspections = 0
        """How often containers were looked at."""
        self.answering: set[str] = set()
        """The tokens of owners elsewhere that answer knocks."""
        self._queues: dict[asyncio.Queue[bytes | None], dict[str, list[str]]] = {}
        self._runner: web.AppRunner | None = None

    @property
    def host(self) -> str:
        """Its address."""
        return f"unix://{self.socket}"

    async def come(self) -> None:
        """Listen."""
        app = web.Application(middlewares=[self._maybe_fail])
        v = "/{version:v[0-9.]+}"
        app.add_routes(
            [
                web.get("/version", self._version),
                web.get(v + "/info", self._info),
                web.get(v + "/events", self._events),
                web.get(v + "/volumes", self._list_volumes),
                web.post(v + "/volumes/create", self._make_volume),
                web.delete(v + "/volumes/{id}", self._remove_volume),
                web.get(v + "/images/{id}/json", self._image),
                web.get(v + "/containers/json", self._list),
                web.post(v + "/containers/create", self._create),
                web.get(v + "/containers/{id}/json", self._inspect),
                web.get(v + "/containers/{id}/logs", self._logs),
                web.post(v + "/containers/{id}/start", self._start),
                web.post(v + "/containers/{id}/kill", self._kill),
                web.delete(v + "/containers/{id}", self._remove),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.socket)).start()

    async def go(self) -> None:
        """Be away."""
        self.cut()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def cut(self) -> None:
        """Break all event streams."""
        for queue in self._queues:
            queue.put_nowait(None)

    def only(self) -> Container:
        """Return the only container."""
        [container] = self.containers.values()
        return container

    def die(self, container: Container, code: int) -> None:
        """Have a container's process end."""
        container.running = False
        container.finished = time.time()
        container.exit_code = code
        self.tell("die", container, exitCode=str(code))

    def begin(self, container: Container) -> None:
        """Have a container start."""
        container.running = True
        container.started = time.time()
        container.starts += 1
        self.tell("start", container)

    def owner(self) -> str:
        """Return the name of the volume by which the orchestrator of this Docker is known."""
        [name] = [name for name in self.volumes if "-owner-" in name]
        return name

    def prune(self, name: str) -> None:
        """Remove a volume, as ``docker volume prune`` does."""
        del self.volumes[name]
        self._publish("volume", "destroy", name, {})

    def usurp(self, rank: int = 7) -> None:
        """Have another orchestrator take the place of ours, which it found dead."""
        ours = self.owner()
        labels = {
            "io.modelswap.lock": "modelswap",
            "io.modelswap.token": "theirs",
            "io.modelswap.owner": "their-state",
            "io.modelswap.host": "elsewhere",
            "io.modelswap.pid": "4711",
            "io.modelswap.since": "2026-01-01T00:00:00+00:00",
        }
        name = f"modelswap-owner-{rank}"
        if name != ours:
            del self.volumes[ours]
        self.volumes[name] = {"Name": name, "Driver": "local", "Labels": labels}
        self._publish("volume", "destroy", ours, {})

    def tell(self, action: str, container: Container, at: float | None = None, **attributes: str) -> None:
        """Send a container's event."""
        labels = container.body.get("Labels", {})
        self._publish("container", action, container.id, {**labels, "name": container.name, **attributes}, at)

    def _publish(self, kind: str, action: str, actor: str, attributes: dict[str, str], at: float | None = None) -> None:
        at = time.time() if at is None else at
        event = {
            "Type": kind,
            "Action": action,
            "Actor": {"ID": actor, "Attributes": attributes},
            "time": int(at),
            "timeNano": int(at * 1e9),
        }
        for queue, wanted in self._queues.items():
            if not self.mute and kind in wanted["type"] and action in wanted["event"]:
                queue.put_nowait(msgspec.json.encode(event) + b"\n")

    @web.middleware
    async def _maybe_fail(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.fault is not None:
            return await self.fault(request, handler)
        return await handler(request)

    async def _version(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"ApiVersion": "1.99", "MinAPIVersion": "1.24"})

    async def _info(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"SystemTime": moment(time.time()), "Runtimes": {}})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        wanted = msgspec.json.decode(request.query["filters"])
        response = web.StreamResponse()
        await response.prepare(request)
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._queues[queue] = wanted
        self.streams += "container" in wanted["type"]
        try:
            with contextlib.suppress(ConnectionError):
                while (line := await queue.get()) is not None:
                    await response.write(line)
        finally:
            del self._queues[queue]
        return response

    async def _list_volumes(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"Volumes": list(self.volumes.values())})

    async def _make_volume(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["Labels"].get("io.modelswap.to") in self.answering:
            return web.json_response(body, status=201)  # it is taken away at once
        volume = self.volumes.setdefault(body["Name"], body)
        self._publish("volume", "create", body["Name"], {})
        return web.json_response(volume, status=201)

    async def _remove_volume(self, request: web.Request) -> web.StreamResponse:
        self.volumes.pop(request.match_info["id"], None)
        return web.Response(status=204)

    async def _image(self, request: web.Request) -> web.StreamResponse:
        if (image := self.images.get(request.match_info["id"])) is None:
            return web.json_response({"message": "No such image"}, status=404)
        return web.json_response(image)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        found = [
            {"Id": c.id, "Names": [f"/{c.name}"], "Labels": c.body.get("Labels", {}), "State": "running"}
            for c in self.containers.values()
            if c.running
        ]
        return web.json_response(found)

    async def _create(self, request: web.Request) -> web.StreamResponse:
        made = Container(uuid.uuid4().hex * 2, request.query["name"], await request.json())
        if any(made.name == other.name for other in self.containers.values()):
            return web.json_response({"message": f"Conflict. The name {made.name} is in use"}, status=409)
        self.containers[made.id] = made
        return web.json_response({"Id": made.id}, status=201)

    def _container(self, request: web.Request) -> Container:
        wanted = request.match_info["id"]
        for container in self.containers.values():
            if wanted in (container.id, container.name):
                return container
        text = msgspec.json.encode({"message": f"No such container: {wanted}"}).decode()
        raise web.HTTPNotFound(text=text, content_type="application/json")

    async def _inspect(self, request: web.Request) -> web.StreamResponse:
        self.inspections += 1
        return web.json_response(self._container(request).inspected())

    async def _start(self, request: web.Request) -> web.StreamResponse:
        container = self._container(request)
        if container.running:
            return web.Response(status=304)
        self.begin(container)
        return web.Response(status=204)

    async def _kill(self, request: web.Request) -> web.StreamResponse:
        container, signal = self._container(request), request.query["signal"]
        if not container.running:
            return web.json_response({"message": f"Container {container.id} is not running"}, status=409)
        container.signals.append(signal)
        if signal not in container.deaf_to:
            self.die(container, 137 if signal == "SIGKILL" else 143)
        return web.Response(status=204)

    async def _remove(self, request: web.Request) -> web.StreamResponse:
        container = self._container(request)
        del self.containers[container.id]
        self.tell("destroy", container)
        return web.Response(status=204)

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        container = self._container(request)
        framed = not container.body.get("Tty", False)
        frames = [
            (struct.pack(">BxxxL", stream, len(data)) if framed else b"") + data for stream, data in container.log
        ]
        return web.Response(body=b"".join(frames))


@contextlib.asynccontextmanager
async def fake_docker(socket: Path) -> AsyncIterator[FakeDocker]:
    """Give an engine that listens."""
    fake = FakeDocker(socket)
    await fake.come()
    try:
        yield fake
    finally:
        await fake.go()
