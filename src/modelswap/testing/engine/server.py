"""A simulated engine: a server on one port, from its start to its end."""

from __future__ import annotations

import asyncio
import os
import signal
from types import TracebackType
from typing import Self

import msgspec

from modelswap.testing.engine import answers
from modelswap.testing.engine.admission import Admission, Mode
from modelswap.testing.engine.answers import Voice
from modelswap.testing.engine.behaviour import USUAL, Behaviour, overlay
from modelswap.testing.engine.inference import PATHS, Inference
from modelswap.testing.engine.journal import Log, log_failed, log_out_of_memory
from modelswap.testing.engine.memory import DeviceMemory
from modelswap.testing.engine.options import Options, own_instance
from modelswap.testing.engine.slumber import Disturbed, Slumber
from modelswap.testing.engine.stats import Report, Stats, loads, metrics
from modelswap.testing.engine.wire import Connection, Request
from modelswap.testing.ledger import OutOfDeviceMemory

_SLEEP_PATHS = frozenset(("/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/reset_prefix_cache"))
_RELEASE_PATHS = frozenset(("/release_memory_occupation", "/resume_memory_occupation"))
_MODES: dict[str, Mode] = {"abort": "abort", "wait": "wait", "keep": "keep"}


class SimEngine:
    """A simulated engine on the running event loop; ``async with`` starts and stops it.

    ``own_process`` says that it is all its process does: then a crash ends the process. Otherwise a crash closes
    everything, as its process's end would, and sets `ended`. ``exit_code`` is that of the process, None before its end.
    """

    def __init__(self, options: Options | None = None, *, own_process: bool = False) -> None:
        self.options = options = Options() if options is None else options
        self.instance = own_instance(options)
        self.log = Log(to_stdout=own_process)
        self.stats = Stats()
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self.exit_code: int | None = None
        self.host = options.host
        self.port = options.port
        self._own_process = own_process
        self._said: Behaviour | None = None
        self._left: int | None = options.behaviour.times
        self._started = options.behaviour
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._memory = DeviceMemory(options, self.instance)
        admission = Admission(options.slots, self.stats)
        self._slumber = Slumber(options, self._memory, admission, self._own)
        self._voice = Voice(options.model, self.instance, (options.model, *options.aliases))
        self._inference = Inference(options, self._voice, admission, self._slumber, self.stats, self._crash)

    @property
    def url(self) -> str:
        """The base URL, without a trailing slash."""
        return f"http://{self.host}:{self.port}"

    @property
    def behaviour(self) -> Behaviour:
        """The faults in force: those of the start, with those of ``/sim/fault`` on top."""
        return self._started if self._said is None else overlay(self._started, self._said)

    @property
    def asleep(self) -> bool:
        """Whether it sleeps, if only in part."""
        return self._slumber.level > 0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        self._memory.end_child()

    async def start(self) -> None:
        """Listen and begin to load; it has loaded already on return if that takes no time.

        Raises `OSError` if the port is taken.
        """
        self.log.info(f"simulated engine, model {self.options.model}, instance {self.instance}, pid {os.getpid()}")
        if not self.options.listen_late:
            await self._listen()
        if self.options.load_seconds or self.options.listen_late or self.behaviour.load == "hang":
            self._own(self._load())
        else:
            await self._load()

    async def stop(self, exit_code: int = 0) -> None:
        """End at once: close every connection, give memory back."""
        if self.exit_code is not None:
            await self._close()
            return
        self.exit_code = exit_code
        await self._close()
        self._memory.release()
        self.log.info("shutdown complete")
        self.ended.set()

    async def terminate(self) -> None:
        """Do what SIGTERM does."""
        if self.behaviour.ignore_sigterm:
            self.log.info("SIGTERM ignored")
            return
        self.log.info("shutting down")
        await asyncio.sleep(self.behaviour.stop_seconds or 0)
        await self.stop()

    def set_faults(self, behaviour: Behaviour) -> None:
        """Say what goes wrong from now on, replacing what was said before; `Behaviour()` ends it."""
        self._said = behaviour
        self._left = behaviour.times
        if behaviour.late_release is not None:
            self._memory.delay_release(behaviour.late_release)

    # ── life ──

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._connected, self.host, self.port, backlog=2048)
        self.port = self._server.sockets[0].getsockname()[1]
        self.log.info(f"listening on {self.url}")

    def _connected(self) -> Connection:
        self.stats.connections += 1
        return Connection(self._handle, self._connections, self.options.keep_alive)

    async def _load(self) -> None:
        behaviour = self.behaviour
        self.log.info(f"Loading model {self.options.model}...")
        if behaviour.crash == "load":
            await self._crash(behaviour)
        if behaviour.load == "fail":
            log_failed(self.log, self.options.model)
            self._give_up()
            return
        try:
            if behaviour.load == "oom":
                raise OutOfDeviceMemory(self.options.gpu_bytes, 0, self.options.gpu_bytes)
            self._memory.load(behaviour)
        except OutOfDeviceMemory as error:
            log_out_of_memory(self.log, error)
            self._give_up()
            return
        if behaviour.load == "hang":
            await asyncio.get_running_loop().create_future()
        if self.options.load_seconds:
            await asyncio.sleep(self.options.load_seconds)
        if self.options.listen_late:
            try:
                await self._listen()
            except OSError as error:
                self.log.error(f"[Errno {error.errno}] {error.strerror}")
                self._give_up()
                return
        self.ready.set()
        self.log.info(f"Application startup complete. Serving {self.options.model}")

    def _give_up(self) -> None:
        self.exit_code = 1
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.abort()
        self._memory.release()
        self.ended.set()

    async def _crash(self, behaviour: Behaviour) -> None:
        self.log.error(f"simulated crash by {behaviour.by}")
        if self._own_process:
            if behaviour.by == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(1)
        self.exit_code = -signal.SIGKILL if behaviour.by == "kill" else 1
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.abort()
        self._memory.release(clean=False)
        self.ended.set()
        # A process that has ended does nothing more; `stop` ends this wait.
        await asyncio.get_running_loop().create_future()

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for connection in list(self._connections):
            if connection.task is not None:
                tasks.append(connection.task)
            connection.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    def _own(self, work: asyncio._CoroutineLike[None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ── requests ──

    async def _handle(self, request: Request, connection: Connection) -> None:
        try:
            await self._route(request, connection)
        finally:
            if not self.options.quiet:
                said = f"{request.method} {request.target.decode('latin-1')} HTTP/{request.version}"
                self.log.raw(f'INFO:     {connection.peer} - "{said}" {connection.status or "-"}')

    async def _route(self, request: Request, connection: Connection) -> None:
        path = request.path
        if path in ("/health", "/ping"):
            return await self._health(connection)
        if path.startswith("/sim/"):
            return await self._sim(request, connection)
        if not self.ready.is_set():
            return await _reply(connection, 503, answers.error("Loading model", "unavailable_error", 503))
        if path.startswith("/v1/") and not self._authorised(request):
            return await _reply(connection, 401, b'{"error":"Unauthorized"}')
        if request.method == "POST" and path in PATHS:
            return await self._inference.answer(request, connection, self._next_faults())
        if self.options.flavour == "sglang":
            if path in _RELEASE_PATHS:
                return await self._release(request, connection)
            if path in ("/v1/loads", "/get_load", "/server_info", "/get_server_info"):
                return await _reply(connection, 200, loads(self.stats))
        elif path in _SLEEP_PATHS and self.options.sleepable:
            return await self._sleep(request, connection)
        match path:
            case "/v1/models":
                return await _reply(connection, 200, self._voice.models())
            case "/metrics":
                text = metrics(self.options.model, self.stats, self._slumber.level)
                return await _reply(connection, 200, text, "text/plain; version=0.0.4; charset=utf-8")
            case "/version":
                return await _reply(connection, 200, b'{"version":"simulated"}')
            case "/load":
                return await _reply(connection, 200, msgspec.json.encode({"server_load": self.stats.running}))
            case _:
                return await _reply(connection, 404, b'{"detail":"Not Found"}')

    def _authorised(self, request: Request) -> bool:
        key = self.options.api_key
        return key is None or request.header(b"authorization") == b"Bearer " + key.encode()

    def _next_faults(self) -> Behaviour:
        behaviour = self.behaviour
        if self._left is not None:
            if self._left <= 0:
                return USUAL
            self._left -= 1
        return behaviour

    async def _health(self, connection: Connection) -> None:
        self.stats.health += 1
        generates = self.options.flavour == "sglang" and self.asleep
        if self.behaviour.hang == "health" or generates:
            await asyncio.get_running_loop().create_future()
        status = self.behaviour.health_status or (200 if self.ready.is_set() else 503)
        await _reply(connection, status, b"" if status == 200 else b'{"error":{"message":"Loading model"}}')

    async def _sim(self, request: Request, connection: Connection) -> None:
        if request.path == "/sim/fault" and request.method == "POST":
            try:
                self.set_faults(msgspec.json.decode(request.body or b"{}", type=Behaviour))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                return await _reply(connection, 400, answers.error(str(error), "BadRequestError", 400))
            return await _reply(connection, 200, msgspec.json.encode(self.behaviour))
        if request.path == "/sim/stats":
            return await _reply(connection, 200, msgspec.json.encode(self.report()))
        return await _reply(connection, 404, b'{"detail":"Not Found"}')

    def report(self) -> Report:
        """Return what ``GET /sim/stats`` answers."""
        self.stats.open_connections = len(self._connections)
        return Report(
            model=self.options.model,
            instance=self.instance,
            pid=os.getpid(),
            child=self._memory.child,
            ready=self.ready.is_set(),
            asleep=self.asleep,
            stats=self.stats,
        )

    async def _sleep(self, request: Request, connection: Connection) -> None:
        match request.method, request.path:
            case "GET", "/is_sleeping":
                return await _reply(connection, 200, msgspec.json.encode({"is_sleeping": self.asleep}))
            case "POST", "/sleep":
                level = int(request.query.get("level", ["1"])[0])
                mode = _MODES.get(request.query.get("mode", ["abort"])[0])
                if level not in (1, 2) or mode is None:
                    return await _reply(connection, 400, answers.error("bad level or mode", "BadRequestError", 400))
                work = self._slumber.sleep(level, mode, self.behaviour, self._crash_now)
            case "POST", "/wake_up":
                work = self._slumber.wake(request.query.get("tags", []), self.behaviour, self._crash_now)
            case "POST", "/reset_prefix_cache":
                return await _reply(connection, 200, b"")
            case "POST", "/collective_rpc":
                method = msgspec.json.decode(request.body).get("method")
                done = method == "reload_weights" and self._slumber.reload_weights()
                return await _reply(connection, 200 if done else 500, b'{"results":[null]}' if done else b"")
            case _:
                return await _reply(connection, 405, b'{"detail":"Method Not Allowed"}')
        return await self._carry_out(work, connection)

    async def _release(self, request: Request, connection: Connection) -> None:
        try:
            asked = msgspec.json.decode(request.body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            asked = None
        if not isinstance(asked, dict):
            return await _reply(connection, 422, b'{"detail":[{"type":"missing","loc":["body"]}]}')
        release = request.path == "/release_memory_occupation"
        if not self.options.sleepable:
            return await _reply(connection, 200, b"null")
        if release == self.asleep or (release and self.stats.running + self.stats.waiting):
            self.log.error("AssertionError: should be called only when server is idle, and once")
            await self._crash(self.behaviour)
        if release:
            work = self._slumber.sleep(1, "wait", self.behaviour, self._crash_now)
        else:
            work = self._slumber.wake([], self.behaviour, self._crash_now)
        return await self._carry_out(work, connection)

    async def _carry_out(self, work: asyncio._CoroutineLike[None], connection: Connection) -> None:
        try:
            # The engine goes through with it even if whoever asked has gone.
            await asyncio.shield(self._own(work))
        except OutOfDeviceMemory as error:
            log_out_of_memory(self.log, error)
            message = f"CUDA out of memory: {error}"
            return await _reply(connection, 500, answers.error(message, "InternalServerError", 500))
        except Disturbed as error:
            self.log.error(str(error))
            return await _reply(connection, 500, answers.error(str(error), "InternalServerError", 500))
        return await _reply(connection, 200, b"null" if self.options.flavour == "sglang" else b"")

    async def _crash_now(self) -> None:
        await self._crash(self.behaviour)


async def _reply(connection: Connection, status: int, body: bytes, kind: str = "application/json") -> None:
    await connection.start(status, [("content-type", kind)], length=len(body))
    if body:
        await connection.send(body)
