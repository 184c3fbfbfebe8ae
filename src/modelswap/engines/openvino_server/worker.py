"""One generation at a time, in one thread; the rest wait in order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from modelswap.engines.openvino_server.pipeline import GenerationFailed, Params, Pipeline, Prompt, Result
from modelswap.engines.openvino_server.text import StopFilter
from modelswap.protocol.errors import Code, ModelswapError


class Worker:
    """Runs generations for the event loop that it is used from.

    ``closing`` says whether the server has been told to end: then what runs goes on, and what waits is refused.
    """

    def __init__(self, closing: Callable[[], bool] = lambda: False) -> None:
        self.pipeline: Pipeline | None = None
        self.running = 0
        self.waiting = 0
        self._closing = closing
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")

    async def run(self, prompt: Prompt, params: Params, emit: Callable[[str], None]) -> Result:
        """Wait for a turn, generate, call ``emit`` on the loop for every piece of text, and return the result.

        Cancelling it while it waits gives its place up; while it runs, generation stops before the next token.
        Raises `ModelswapError`.
        """
        self.waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            return await self._generate(prompt, params, emit)
        finally:
            self.running -= 1
            self._turn.release()

    async def _generate(self, prompt: Prompt, params: Params, emit: Callable[[str], None]) -> Result:
        if self._closing():
            raise ModelswapError("the engine is shutting down", code=Code.SHUTTING_DOWN)
        if self.pipeline is None:
            raise ModelswapError("the model is still loading", code=Code.SHUTTING_DOWN)
        generation = _Generation(self.pipeline, prompt, params, asyncio.get_running_loop(), emit)
        finished = asyncio.get_running_loop().run_in_executor(self._thread, generation)
        try:
            return await asyncio.shield(finished)
        except asyncio.CancelledError:
            generation.cancelled.set()
            # The turn is given up only when the thread is free again.
            await asyncio.wait([finished])
            if not finished.cancelled():
                finished.exception()
            raise

    def close(self) -> None:
        """End the thread, which must be idle."""
        self._thread.shutdown()


class _Generation:
    def __init__(
        self,
        pipeline: Pipeline,
        prompt: Prompt,
        params: Params,
        loop: asyncio.AbstractEventLoop,
        emit: Callable[[str], None],
    ) -> None:
        self.cancelled = threading.Event()
        self._pipeline = pipeline
        self._prompt = prompt
        self._params = params
        self._loop = loop
        self._emit = emit
        self._filter = StopFilter(params.stop)

    def __call__(self) -> Result:
        try:
            result = self._pipeline.generate(self._prompt, self._params, self._on_text)
        except ModelswapError:
            raise
        except Exception as error:
            # Whatever the library throws fails this request, not the server.
            raise GenerationFailed(f"generation failed: {type(error).__name__}: {error}") from error
        if self._filter.stopped:
            return msgspec.structs.replace(result, finish="stop")
        self._send(self._filter.flush())
        return result

    def _on_text(self, text: str) -> bool:
        if text and not self.cancelled.is_set():
            self._send(self._filter.push(text))
        return not (self.cancelled.is_set() or self._filter.stopped)

    def _send(self, text: str) -> None:
        if text:
            self._loop.call_soon_threadsafe(self._emit, text)
