"""A gateway worker's end, alone and as a process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import textwrap
from pathlib import Path

import pytest

from modelswap.gateway.worker import listen, serve, state_dir
from modelswap.protocol.messages import Want
from modelswap.spec.config import Config, Gateway, Scheduling
from modelswap.spec.config import Orchestrator as OrchestratorSection
from modelswap.testing.waiting import until
from tests.gateway.rig import PATIENCE, SSE_HEAD, Request, Rig, ask, chunk, in_two, post


async def test_stopping_worker_finishes_what_runs(rig: Rig) -> None:
    """Waiting requests are refused, idle connections closed, running ones finish, and then it is over."""
    await rig.start()
    go = asyncio.Event()

    await rig.engine(in_two(go))
    running, waiting, idle, late = [await rig.wire() for _ in range(4)]
    await running.send(post(ask(stream=True)))
    await running.head()
    await waiting.send(post(ask("coder")))
    await rig.orchestrator.hears(Want)
    half = len(post(ask())) // 2
    await late.send(post(ask())[:half])
    await until(lambda: len(rig.worker.clients) == 4)
    rig.stop.set()
    got = await waiting.response()
    assert (got.status, got.code, got.header("connection")) == (503, "shutting_down", "close")
    assert got.header("retry-after")
    assert await idle.rest() == b""
    await late.send(post(ask())[half:])
    assert (await late.response()).code == "shutting_down"
    with pytest.raises(OSError):
        await rig.wire()
    go.set()
    assert await running.chunk() == b"data: 1\n\n"
    assert await running.chunk() == b"data: 2\n\n"
    assert await running.chunk() == b""
    assert await running.rest() == b""
    await rig.ended()


async def test_drain_has_a_limit(rig: Rig) -> None:
    """What runs on past the limit is ended with an error."""
    await rig.start(scheduling=Scheduling(drain_timeout=0.1))

    async def script(request: Request) -> None:
        request.connection.write(SSE_HEAD + chunk(b"data: 1\n\n"))

    engine = await rig.engine(script)
    wire = await rig.wire()
    await wire.send(post(ask(stream=True)))
    await engine.request()
    rig.stop.set()
    await wire.head()
    assert b'"code":"drain_aborted"' in await wire.cut()
    await rig.ended()


async def test_serve_listens_where_configured(tmp_path: Path) -> None:
    """Several workers share the configured port, and stop when told."""
    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    config = Config(models={}, gateway=Gateway(port=port), orchestrator=OrchestratorSection(state_dir=tmp_path))
    stop = asyncio.Event()
    ports: list[int] = []

    def ready(port: int) -> None:
        ports.append(port)
        if len(ports) == 2:
            stop.set()

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(
            *(
                serve(config, worker=n, orchestrator_url="http://127.0.0.1:9", token="x", ready=ready, stop=stop)
                for n in range(2)
            )
        )
    assert ports == [port, port]
    assert len(list((tmp_path / "gateway-metrics").iterdir())) == 2


def test_address_in_use_is_an_error() -> None:
    """An address that something else listens on without sharing can't be had."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError):
        listen("127.0.0.1", taken.getsockname()[1])


def test_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State goes where the configuration says, or where such things go."""
    assert state_dir(Config(models={}, orchestrator=OrchestratorSection(state_dir=tmp_path))) == tmp_path
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_dir(Config(models={})) == tmp_path / "modelswap"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_dir(Config(models={})) == tmp_path / ".local" / "state" / "modelswap"


_PROGRAM = """
    import sys
    from pathlib import Path
    from modelswap.gateway.main import run
    from modelswap.spec.config import Config, Gateway

    sys.exit(
        run(
            Config(models={}, gateway=Gateway(port=0)),
            worker=0,
            orchestrator_url=f"http://127.0.0.1:{sys.argv[1]}",
            token="secret",
            metrics_folder=Path(sys.argv[2]),
            ready=lambda port: print(port, flush=True),
        )
    )
"""


@pytest.mark.parametrize(("signals", "status"), [((signal.SIGTERM,), 0), ((signal.SIGINT, signal.SIGTERM), 1)])
async def test_signals_end_the_process(
    rig: Rig, tmp_path: Path, signals: tuple[signal.Signals, ...], status: int
) -> None:
    """SIGHUP changes nothing, the first SIGTERM or SIGINT drains, a second one ends it at once."""
    await rig.orchestrator.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(_PROGRAM),
        str(rig.orchestrator.port),
        str(tmp_path / "metrics"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        rig.port = int(await process.stdout.readline())
        await until(lambda: rig.orchestrator.said)
        process.send_signal(signal.SIGHUP)
        engine = await rig.engine(_silent, lease=False)
        await rig.orchestrator.open(engine)
        wire = await rig.wire()
        await wire.send(post(ask(stream=True)))
        await engine.request()
        process.send_signal(signals[0])
        if status:
            await _refused(rig)
            assert process.returncode is None
            process.send_signal(signals[1])
        else:
            await _refused(rig)
            engine.requests[0].connection.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            assert (await wire.response()).body == b"{}"
        assert await process.wait() == status


async def _silent(request: Request) -> None:
    """Say nothing."""


async def _refused(rig: Rig) -> None:
    while True:
        try:
            await (await rig.wire()).close()
        except OSError:
            return
        await asyncio.sleep(0.01)
