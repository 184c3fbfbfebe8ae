"""Start-up and end of the server.

It is started at every swap, so the model loads in a thread while the HTTP side is still being imported.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelswap.engines.openvino_server.pipeline import CannotLoad, Pipeline

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette

    from modelswap.engines.openvino_server.worker import Worker

# Seconds.
_MOMENT = 0.02

Load = Callable[[argparse.Namespace], Pipeline]


def main(argv: Sequence[str], load: Load | None = None) -> int:
    """Serve until told to end; return the exit status."""
    began = time.monotonic()
    options = _parser().parse_args(argv)
    loading: Future[Pipeline] = Future()
    # A daemon: neither SIGTERM nor a failed start waits for a model that is half loaded.
    threading.Thread(target=_load, args=(options, load or _load_genai, loading), name="load", daemon=True).start()

    import uvloop

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(options, loading, began))
    except SystemExit as exit_:
        # uvicorn's way of saying that it can't listen; it has logged why.
        return exit_.code if isinstance(exit_.code, int) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("modelswap.engines.openvino_server", description="OpenVINO GenAI over HTTP")
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file or an OpenVINO IR folder")
    parser.add_argument(
        "--served-name", action="append", required=True, help="what requests call it; repeat for aliases"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="CPU", help="OpenVINO's name of the device")
    parser.add_argument("--threads", type=int, default=0, help="0: OpenVINO decides")
    parser.add_argument("--max-tokens-default", type=int, default=1024, help="for requests that set no limit")
    parser.add_argument("--cache-dir", default="", help="keeps the converted model, so that later starts are fast")
    parser.add_argument("--grace", type=float, default=8.0, help="seconds that running requests get after SIGTERM")
    return parser


def _load_genai(options: argparse.Namespace) -> Pipeline:
    from modelswap.engines.openvino_server import genai

    cache = Path(options.cache_dir).expanduser() if options.cache_dir else None
    return genai.load(options.model, genai.Options(options.device, options.threads, cache))


def _load(options: argparse.Namespace, load: Load, loading: Future[Pipeline]) -> None:
    try:
        loading.set_result(load(options))
    except BaseException as error:  # noqa: BLE001 - it is the main thread's to report
        loading.set_exception(error)


async def _serve(options: argparse.Namespace, loading: Future[Pipeline], began: float) -> int:
    import uvicorn

    from modelswap.engines.openvino_server.api import Api
    from modelswap.engines.openvino_server.worker import Worker

    asked_to_end = asyncio.Event()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        # Here, because uvicorn has just installed its own handlers, which take 0.2 s to end an idle server.
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, _on_signal, asked_to_end)
        yield

    worker = Worker(closing=asked_to_end.is_set)
    api = Api(worker, options.served_name, options.max_tokens_default, int(time.time()))
    server = uvicorn.Server(
        uvicorn.Config(
            api.app(lifespan),
            host=options.host,
            port=options.port,
            http="httptools",
            ws="none",
            log_config=None,
            access_log=False,
            # Longer than the gateway keeps idle connections, so that it is never we who close under a request.
            timeout_keep_alive=60,
            timeout_graceful_shutdown=options.grace,
        )
    )
    loaded = asyncio.create_task(_loaded(options.model, loading, worker, server, began))
    ending = asyncio.create_task(end(server, asked_to_end))
    try:
        await server.serve()
    finally:
        loaded.cancel()
        ending.cancel()
        await asyncio.wait([loaded, ending])
    return 1 if not loaded.cancelled() and not loaded.result() else 0


async def _loaded(model: Path, loading: Future[Pipeline], worker: Worker, server: uvicorn.Server, began: float) -> bool:
    """Put the pipeline in place; without one, end the server and return False."""
    try:
        worker.pipeline = await asyncio.wrap_future(loading)
    except CannotLoad as error:
        sys.stderr.write(f"error: cannot load {model}: {error}\n")
    except ImportError as error:
        sys.stderr.write(f"error: cannot import openvino_genai ({error}): pip install 'modelswap[openvino]'\n")
    except Exception as error:  # noqa: BLE001 - the library throws what it likes, and no model means no server
        sys.stderr.write(f"error: cannot load {model}: {type(error).__name__}: {error}\n")
    else:
        sys.stderr.write(f"loaded {model} in {time.monotonic() - began:.2f} s\n")
        return True
    server.should_exit = True
    return False


def _on_signal(asked_to_end: asyncio.Event) -> None:
    if asked_to_end.is_set():
        os._exit(1)
    asked_to_end.set()


async def end(server: uvicorn.Server, asked: asyncio.Event, leave: Callable[[int], Any] = os._exit) -> None:
    """Once ``asked``, end at once where nothing runs; else let uvicorn end when what runs has finished."""
    await asked.wait()
    state = server.server_state
    if state.tasks:
        # One that has just sent its last byte needs another moment to finish.
        await asyncio.wait(set(state.tasks), timeout=_MOMENT)
    if not state.tasks and not any(_unsent(connection.transport) for connection in state.connections):
        leave(0)
    server.should_exit = True


def _unsent(transport: Any) -> bool:
    return transport is not None and transport.get_write_buffer_size() > 0
