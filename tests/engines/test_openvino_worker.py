from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from modelswap.engines.openvino_server.pipeline import GenerationFailed, InvalidPrompt, Params, Prompt, Result
from modelswap.engines.openvino_server.worker import Worker
from modelswap.protocol.errors import Code, ModelswapError

PATIENCE = 30.0


class SteppedPipeline:
    """Gives one token for each permit; says when a generation begins and ends."""

    def __init__(self, tokens: int = 3) -> None:
        self.tokens = tokens
        self.permits = threading.Semaphore(0)
        self.asked = 0
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.failure: Exception | None = None

    def generate(self, prompt: Prompt, params: Params, on_text: Callable[[str], bool]) -> Result:
        """See `Pipeline.generate`."""
        self.begun.append(prompt.text)
        count = 0
        try:
            for count in range(1, self.tokens + 1):
                self.asked += 1
                assert self.permits.acquire(timeout=PATIENCE)
                if self.failure:
                    raise self.failure
                if not on_text(f"{prompt.text}{count} "):
                    break
            return Result("length", 1, count)
        finally:
            self.ended.append(f"{prompt.text}:{count}")


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - it has no event to wait for
            await asyncio.sleep(0.001)


async def settle() -> None:
    """Let the loop do all that follows from what has happened."""
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.fixture
def pipeline() -> SteppedPipeline:
    """Return a pipeline that has no permits yet."""
    return SteppedPipeline()


@pytest.fixture
async def worker(pipeline: SteppedPipeline) -> AsyncIterator[Worker]:
    """Return a worker of that pipeline."""
    worker = Worker()
    worker.pipeline = pipeline
    yield worker
    worker.close()


def start(worker: Worker, text: str, stop: tuple[str, ...] = ()) -> tuple[asyncio.Task[Result], list[str]]:
    """Ask for a generation; return its task and the text that it gives out."""
    pieces: list[str] = []
    params = Params(max_tokens=10, stop=stop)
    return asyncio.create_task(worker.run(Prompt(text), params, pieces.append)), pieces


async def test_pieces_come_while_it_generates(worker: Worker, pipeline: SteppedPipeline) -> None:
    """Text reaches the loop token by token, all of it before the result."""
    task, pieces = start(worker, "a")
    pipeline.permits.release()
    await until(lambda: pieces == ["a1 "])
    assert not task.done()
    pipeline.permits.release(2)
    assert await task == Result("length", 1, 3)
    assert pieces == ["a1 ", "a2 ", "a3 "]


async def test_one_at_a_time_in_order(worker: Worker, pipeline: SteppedPipeline) -> None:
    """Requests run one after the other as they came, and the counts say so."""
    tasks = [start(worker, text)[0] for text in "abcd"]
    await until(lambda: pipeline.begun == ["a"] and worker.waiting == 3)
    assert worker.running == 1
    pipeline.permits.release(12)
    await asyncio.gather(*tasks)
    assert pipeline.begun == ["a", "b", "c", "d"]
    assert (worker.running, worker.waiting) == (0, 0)


async def test_cancelled_while_running_stops_at_the_next_token(worker: Worker, pipeline: SteppedPipeline) -> None:
    """A cancelled generation ends with its next token, and the next request runs only after that."""
    first, pieces = start(worker, "a")
    second, _ = start(worker, "b")
    pipeline.permits.release()
    await until(lambda: bool(pieces) and pipeline.asked == 2)
    first.cancel()
    await settle()
    assert pipeline.begun == ["a"]
    pipeline.permits.release()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert pipeline.ended == ["a:2"]
    pipeline.permits.release(3)
    await second
    assert pipeline.ended == ["a:2", "b:3"]
    assert pieces == ["a1 "]


async def test_cancelled_while_waiting_gives_its_place_up(worker: Worker, pipeline: SteppedPipeline) -> None:
    """A request whose client leaves while it waits never reaches the model."""
    first, _ = start(worker, "a")
    second, _ = start(worker, "b")
    third, _ = start(worker, "c")
    await until(lambda: worker.waiting == 2)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert worker.waiting == 1
    pipeline.permits.release(6)
    await asyncio.gather(first, third)
    assert pipeline.begun == ["a", "c"]


async def test_a_stop_string_ends_it(worker: Worker, pipeline: SteppedPipeline) -> None:
    """Generation stops at a stop string that spans tokens; it isn't given out, and the reason is `stop`."""
    task, pieces = start(worker, "a", stop=(" a2",))
    pipeline.permits.release(3)
    result = await task
    assert "".join(pieces) == "a1"
    assert result == Result("stop", 1, 2)


async def test_text_held_back_comes_at_the_end(worker: Worker, pipeline: SteppedPipeline) -> None:
    """What might have become a stop string and didn't isn't lost."""
    task, pieces = start(worker, "a", stop=("a3 and more",))
    pipeline.permits.release(3)
    assert (await task).finish == "length"
    assert "".join(pieces) == "a1 a2 a3 "


async def test_a_failure_fails_only_its_own_request(worker: Worker, pipeline: SteppedPipeline) -> None:
    """What the library throws becomes `GenerationFailed`, and the next request is served."""
    pipeline.failure = RuntimeError("bad shape")
    pipeline.permits.release(10)
    with pytest.raises(GenerationFailed, match="bad shape"):
        await start(worker, "a")[0]
    pipeline.failure = InvalidPrompt("too long")
    with pytest.raises(InvalidPrompt, match="too long"):
        await start(worker, "b")[0]
    pipeline.failure = None
    assert (await start(worker, "c")[0]).completion_tokens == 3


async def test_a_failure_after_cancellation_is_not_reported(worker: Worker, pipeline: SteppedPipeline) -> None:
    """A generation that fails when nobody waits for it any more leaves no trace."""
    task, _ = start(worker, "a")
    await until(lambda: pipeline.begun == ["a"])
    pipeline.failure = RuntimeError("late")
    task.cancel()
    await settle()
    pipeline.permits.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (worker.running, worker.waiting) == (0, 0)


async def test_closing_refuses_what_waits(pipeline: SteppedPipeline) -> None:
    """Once the server ends, the running generation finishes and the waiting ones are refused."""
    closing = threading.Event()
    worker = Worker(closing.is_set)
    worker.pipeline = pipeline
    first, _ = start(worker, "a")
    second, _ = start(worker, "b")
    await until(lambda: pipeline.begun == ["a"])
    closing.set()
    pipeline.permits.release(3)
    assert (await first).completion_tokens == 3
    with pytest.raises(ModelswapError) as refused:
        await second
    assert refused.value.code is Code.SHUTTING_DOWN
    worker.close()


async def test_without_a_model_nothing_runs() -> None:
    """A request that comes before the model is loaded is refused."""
    worker = Worker()
    with pytest.raises(ModelswapError, match="loading"):
        await start(worker, "a")[0]
    worker.close()
