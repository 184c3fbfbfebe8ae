"""Runs the orchestrator: as a coroutine for tests and other programs, as a process for the command."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import prometheus_client
import structlog

from modelswap.devices.amdgpu import AmdGpuDevice
from modelswap.devices.choose import open_device
from modelswap.engines.registry import engine_for
from modelswap.orchestrator import standing_by, state, tokens
from modelswap.orchestrator.api.app import admin_app
from modelswap.orchestrator.api.guard import KnownHosts
from modelswap.orchestrator.logging_setup import log_to_stderr
from modelswap.orchestrator.server import admin_server, listen, url_of
from modelswap.orchestrator.service import Parts, Service, running
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.hosts import hosts_of
from modelswap.spec.config import Config
from modelswap.spec.load import load
from modelswap.weights.download import HubWeights
from modelswap.weights.places import shared_home

_log = structlog.get_logger(__name__)


async def serve(
    config_path: Path,
    config: Config,
    *,
    stop: asyncio.Event,
    reload: asyncio.Event | None = None,
    sock: socket.socket | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Run an orchestrator until ``stop`` is set, and leave its engines running.

    ``reload``, when set, has the config file read again. ``sock`` is a bound socket to serve on, by default the
    config's address. ``ready`` is called with the API's URL. Raises `ModelswapError` if it can't begin, and if another
    orchestrator has taken over its Docker while it stood still: then it sets ``stop`` itself, and ends as it does.
    """
    overruled: list[ModelswapError] = []

    def give_way(reason: ModelswapError) -> None:
        _log.error("ending", reason=str(reason))
        overruled.append(reason)
        stop.set()

    folder = state.state_dir(config)
    state.prepare(folder)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(state.sole_owner(folder))
        device = await asyncio.to_thread(open_device, config.device)  # a driver may take seconds to begin
        stack.push_async_callback(device.aclose)
        amd = device.nodes if isinstance(device, AmdGpuDevice) else ()
        latest = config

        def load_latest(path: Path) -> Config:
            nonlocal latest
            latest = load(path)
            return latest

        hosts = await stack.enter_async_context(hosts_of(folder, lambda: latest, amd=amd, on_lost=give_way))
        stack.push_async_callback(hosts.stand_by, [])  # engines outlive us, those that wait to be one needn't
        parts = Parts(
            runtime=hosts,
            device=device,
            engine_for=engine_for,
            load=load_latest,
            token=tokens.token(folder),
            database=folder / state.DATABASE,
            weights=HubWeights(cache=shared_home(config.docker), mounted=hosts.shares_cache),
        )
        if sock is None:
            sock = listen(config.orchestrator.host, config.orchestrator.port)
        stack.enter_context(contextlib.closing(sock))
        async with running(config_path, config, parts) as service:
            service.outside.memory.standbys = lambda: standing_by.host_bytes(service.outside)
            service.tasks.start(standing_by.keep_standing_by(service), "standbys")
            await serve_api(service, sock, stop=stop, reload=reload or asyncio.Event(), ready=ready)
    if overruled:
        raise overruled[0]


async def serve_api(
    service: Service,
    sock: socket.socket,
    *,
    stop: asyncio.Event,
    reload: asyncio.Event,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the admin API on a bound socket until ``stop`` is set."""

    def hosts() -> KnownHosts:
        orchestrator = service.configured.config.orchestrator
        return KnownHosts(orchestrator.host, orchestrator.allowed_hosts)

    url = url_of(sock)
    server = admin_server(admin_app(service, hosts))
    serving = asyncio.create_task(server.serve(sockets=[sock]), name="api")
    reloading = service.tasks.start(_reload_whenever(service, reload), "reload")
    up, stopped = asyncio.create_task(server.up.wait()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, up, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if up.done():
            _log.info("serving", url=url, models=list(service.configured.config.models))
            if ready is not None:
                ready(url)
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (up, stopped, reloading):
            task.cancel()
        service.end()
        server.should_exit = True
        await serving
        await asyncio.gather(up, stopped, reloading, return_exceptions=True)
    _log.info("stopped", url=url)


async def _reload_whenever(service: Service, reload: asyncio.Event) -> None:
    while True:
        await reload.wait()
        reload.clear()
        try:
            await service.reload()
        except ModelswapError as error:
            _log.error("config not reloaded; the old one stays", reason=str(error))


def run(config_path: Path) -> None:
    """Run an orchestrator as this process, until SIGTERM or SIGINT; SIGHUP has the config read again.

    Raises `ModelswapError` if it can't begin.
    """
    log_to_stderr()
    # The ..._created series double the output and say nothing.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_run(config_path))


async def _run(config_path: Path) -> None:
    stop, reload = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    config = await asyncio.to_thread(load, config_path)
    await serve(config_path, config, stop=stop, reload=reload)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # not published for this platform
        return asyncio.new_event_loop
    return uvloop.new_event_loop
