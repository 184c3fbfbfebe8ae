from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from modelswap.engines.openvino_server.api import Api
from modelswap.engines.openvino_server.pipeline import InvalidPrompt, Message, Params, Prompt, Result
from modelswap.engines.openvino_server.worker import Worker

PATIENCE = 30.0
HELLO: dict[str, Any] = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": "smol", "prompt": "Once"}


class ScriptedPipeline:
    """Says its pieces; from the piece ``held_from`` on, waits before each one while ``gate`` is closed."""

    def __init__(self) -> None:
        self.pieces = ["Hel", "", "lo!"]
        self.finish: Any = "stop"
        self.asked: list[tuple[Prompt, Params]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.held_from = 0
        self.given = 0
        self.failure: tuple[int, Exception] | None = None

    def generate(self, prompt: Prompt, params: Params, on_text: Callable[[str], bool]) -> Result:
        """See `Pipeline.generate`."""
        self.asked.append((prompt, params))
        self.given = 0
        for index, piece in enumerate(self.pieces):
            assert index < self.held_from or self.gate.wait(PATIENCE)
            if self.failure and self.failure[0] == index:
                raise self.failure[1]
            self.given += 1
            if not on_text(piece):
                break
        return Result(self.finish, 7, self.given)


class Answer:
    """One request's response as it arrives; ``leave`` is its client closing the connection."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.complete = False
        self.left = asyncio.Event()
        self.changed = asyncio.Event()

    def leave(self) -> None:
        """Close the connection."""
        self.left.set()

    async def send(self, message: Any) -> None:
        """Take what the application sends."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.complete = not message.get("more_body", False)
        self.changed.set()

    async def has(self, text: bytes) -> None:
        """Wait until ``text`` has arrived."""
        async with asyncio.timeout(PATIENCE):
            while text not in self.body:
                self.changed.clear()
                await self.changed.wait()

    def json(self) -> Any:
        """Return the body."""
        return msgspec.json.decode(self.body)

    def events(self) -> list[Any]:
        """Return the decoded events; the end marker as it is."""
        data = [event.removeprefix(b"data: ") for event in self.body.split(b"\n\n") if event]
        return ["[DONE]" if event == b"[DONE]" else msgspec.json.decode(event) for event in data]


class Client:
    """Speaks ASGI with the application, so that a test decides when exactly a client leaves."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.app = Api(worker, ["smol", "alias"], 99, 1700000000).app()

    async def run(self, answer: Answer, method: str, path: str, body: bytes) -> None:
        """Send one request and take its response."""
        asked = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if asked:
                return asked.pop()
            await answer.left.wait()
            return {"type": "http.disconnect"}

        scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", "app": self.app}
        await self.app(scope, receive, answer.send)

    def begin(self, path: str, body: Any) -> tuple[asyncio.Task[None], Answer]:
        """Send a request; return the task that serves it and its response so far."""
        answer = Answer()
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return asyncio.create_task(self.run(answer, "POST", path, raw)), answer

    async def post(self, path: str, body: Any) -> Answer:
        """Return the response to a request."""
        task, answer = self.begin(path, body)
        async with asyncio.timeout(PATIENCE):
            await task
        return answer

    async def chat(self, **fields: Any) -> Answer:
        """Return the response to a chat request."""
        return await self.post("/v1/chat/completions", HELLO | fields)

    async def text(self, **fields: Any) -> Answer:
        """Return the response to a text completion request."""
        return await self.post("/v1/completions", TEXT | fields)

    async def get(self, path: str, method: str = "GET") -> Answer:
        """Return the response to a request without a body."""
        answer = Answer()
        await self.run(answer, method, path, b"")
        return answer


async def settle() -> None:
    """Let the loop do all that follows from what has happened."""
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.fixture
def pipeline() -> ScriptedPipeline:
    """Return a pipeline that says Hello!."""
    return ScriptedPipeline()


@pytest.fixture
async def client(pipeline: ScriptedPipeline) -> AsyncIterator[Client]:
    """Return a client of a server whose model is loaded."""
    worker = Worker()
    worker.pipeline = pipeline
    yield Client(worker)
    pipeline.gate.set()
    worker.close()


async def test_chat(client: Client, pipeline: ScriptedPipeline) -> None:
    """A chat is answered in OpenAI's shape with the name that was asked for and the pipeline's own counts."""
    answer = await client.chat(model="alias")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "alias"
    message = {"role": "assistant", "content": "Hello!"}
    assert body["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "stop", "message": message}]
    assert body["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert pipeline.asked == [(Prompt(messages=(Message("user", "Hi"),)), Params(max_tokens=99))]


async def test_text(client: Client, pipeline: ScriptedPipeline) -> None:
    """A text completion is answered in its own shape, and its prompt goes to the model as it is."""
    pipeline.finish = "length"
    body = (await client.text(max_tokens=3)).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "length", "text": "Hello!"}]
    assert pipeline.asked == [(Prompt("Once"), Params(max_tokens=3))]
    assert (await client.text(prompt=["Twice"])).status == 200
    assert pipeline.asked[-1][0] == Prompt("Twice")


async def test_chat_streamed(client: Client) -> None:
    """A streamed chat sends the role, each piece of text, the finish reason and the end marker."""
    answer = await client.chat(stream=True)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answer.headers
    *chunks, done = answer.events()
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks]
    assert deltas == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Hel"}, None),
        ({"content": "lo!"}, None),
        ({}, "stop"),
    ]
    assert all("usage" not in chunk for chunk in chunks)
    assert answer.complete


async def test_text_streamed_with_usage(client: Client) -> None:
    """With `include_usage`, the last chunk carries the counts and no choice, and the others a null."""
    answer = await client.text(stream=True, stream_options={"include_usage": True})
    *chunks, last, done = answer.events()
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hel", "lo!", ""]
    assert [chunk["usage"] for chunk in chunks] == [None] * 3
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


async def test_an_empty_answer_streamed(client: Client, pipeline: ScriptedPipeline) -> None:
    """A model that ends at once gives a whole stream, too."""
    pipeline.pieces = [""]
    first, last, done = (await client.chat(stream=True)).events()
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert done == "[DONE]"


async def test_parameters_reach_the_model(client: Client, pipeline: ScriptedPipeline) -> None:
    """Every parameter that is understood arrives, with OpenAI's newer name for the limit first."""
    await client.chat(
        max_tokens=5,
        max_completion_tokens=6,
        temperature=0,
        top_p=0.5,
        top_k=4,
        seed=-3,
        presence_penalty=1,
        frequency_penalty=-0.5,
        stop=["a", "", "b"],
        n=1,
        logprobs=False,
        response_format={"type": "text"},
        tools=[],
        user="someone",
    )
    assert pipeline.asked[-1][1] == Params(
        max_tokens=6,
        temperature=0,
        top_p=0.5,
        top_k=4,
        seed=-3,
        presence_penalty=1,
        frequency_penalty=-0.5,
        stop=("a", "b"),
    )
    await client.chat(stop="x", top_k=-1, max_tokens=None, temperature=None)
    assert pipeline.asked[-1][1] == Params(max_tokens=99, stop=("x",))


async def test_content_in_parts(client: Client, pipeline: ScriptedPipeline) -> None:
    """Text parts are joined, and a message without content is empty."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await client.chat(messages=[{"role": "assistant", "content": None}, {"role": "user", "content": parts}])
    assert pipeline.asked[-1][0].messages == (Message("assistant", ""), Message("user", "one\ntwo"))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_over_pieces(client: Client, pipeline: ScriptedPipeline, stream: bool) -> None:
    """A stop string that spans pieces ends the answer and isn't in it, streamed or not."""
    answer = await client.chat(stop="llo", stream=stream)
    if stream:
        events = answer.events()
        assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == "He"
        assert events[-2]["choices"][0]["finish_reason"] == "stop"
    else:
        assert answer.json()["choices"][0]["message"]["content"] == "He"


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("chat/completions", b"{", 400, "invalid_json", None),
        ("chat/completions", b"\xff", 400, "invalid_json", None),
        ("chat/completions", b"[]", 400, "bad_request", None),
        ("chat/completions", {"messages": HELLO["messages"]}, 400, "missing_model", "model"),
        ("chat/completions", HELLO | {"model": "gpt"}, 404, "model_not_found", "model"),
        ("chat/completions", {"model": "smol"}, 400, "bad_request", "messages"),
        ("chat/completions", HELLO | {"messages": []}, 400, "bad_request", "messages"),
        ("chat/completions", HELLO | {"messages": [{"content": "x"}]}, 400, "bad_request", None),
        ("chat/completions", HELLO | {"max_tokens": 0}, 400, "bad_request", "max_tokens"),
        ("chat/completions", HELLO | {"temperature": "hot"}, 400, "bad_request", "temperature"),
        ("chat/completions", HELLO | {"temperature": 3}, 400, "bad_request", "temperature"),
        ("chat/completions", HELLO | {"n": 2}, 400, "bad_request", "n"),
        ("chat/completions", HELLO | {"logprobs": True}, 400, "bad_request", "logprobs"),
        ("chat/completions", HELLO | {"tools": [{"type": "function"}]}, 400, "bad_request", "tools"),
        ("chat/completions", HELLO | {"response_format": {"type": "json_object"}}, 400, "bad_request", None),
        ("completions", TEXT | {"prompt": ["a", "b"]}, 400, "bad_request", "prompt"),
        ("completions", TEXT | {"prompt": [1, 2]}, 400, "bad_request", "prompt"),
        ("completions", TEXT | {"logprobs": 0}, 400, "bad_request", "logprobs"),
        ("completions", TEXT | {"echo": True}, 400, "bad_request", "echo"),
        ("completions", TEXT | {"best_of": 3}, 400, "bad_request", "best_of"),
    ],
)
async def test_refusals(client: Client, path: str, body: Any, status: int, code: str, param: str | None) -> None:
    """What can't be served is refused in OpenAI's shape, with the field's name, before the model is asked."""
    answer = await client.post(f"/v1/{path}", body)
    error = answer.json()["error"]
    assert (answer.status, error["code"]) == (status, code)
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    if param:
        assert error["param"] == param


async def test_an_image_is_refused(client: Client) -> None:
    """A content part that isn't text is refused, and not ignored."""
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    answer = await client.chat(messages=[{"role": "user", "content": parts}])
    assert answer.status == 400
    assert "image_url" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_the_model_refuses(client: Client, pipeline: ScriptedPipeline, stream: bool) -> None:
    """A prompt that the model can't take is a 400, streamed or not, because nothing was sent before."""
    pipeline.failure = (0, InvalidPrompt("the prompt is too long"))
    answer = await client.chat(stream=stream)
    assert answer.status == 400
    assert answer.json()["error"]["message"] == "the prompt is too long"


async def test_a_failure_in_the_middle(client: Client, pipeline: ScriptedPipeline) -> None:
    """A generation that fails after its first text ends the stream with an error event and no end marker."""
    pipeline.failure = (2, RuntimeError("lost"))
    answer = await client.chat(stream=True)
    assert answer.status == 200
    assert answer.complete
    *_, text, error = answer.events()
    assert text["choices"][0]["delta"] == {"content": "Hel"}
    assert error["error"]["code"] == "internal_error"
    assert "lost" in error["error"]["message"]
    assert (await client.chat()).status == 500


async def test_a_client_that_leaves_a_stream_frees_the_model(client: Client, pipeline: ScriptedPipeline) -> None:
    """When the client of a stream goes, generation stops at the next token, and the next request is served."""
    pipeline.pieces = ["x"] * 100
    pipeline.held_from = 2
    pipeline.gate.clear()
    task, answer = client.begin("/v1/chat/completions", HELLO | {"stream": True})
    await answer.has(b'"x"')
    answer.leave()
    await settle()
    pipeline.gate.set()
    async with asyncio.timeout(PATIENCE):
        await task
    assert pipeline.given <= 3
    assert (client.worker.running, client.worker.waiting) == (0, 0)
    assert b"[DONE]" not in answer.body
    pipeline.pieces = ["y"]
    assert (await client.chat()).json()["choices"][0]["message"]["content"] == "y"


async def test_a_client_that_leaves_before_the_first_token(client: Client, pipeline: ScriptedPipeline) -> None:
    """When a client goes while its answer isn't streamed, generation stops at the very next token."""
    pipeline.pieces = ["x"] * 100
    pipeline.gate.clear()
    for stream in (False, True):
        task, answer = client.begin("/v1/chat/completions", HELLO | {"stream": stream})
        count = len(pipeline.asked) + 1
        async with asyncio.timeout(PATIENCE):
            while len(pipeline.asked) < count:  # noqa: ASYNC110 - the pipeline's thread has no event
                await asyncio.sleep(0.001)
        answer.leave()
        await settle()
        pipeline.gate.set()
        async with asyncio.timeout(PATIENCE):
            await task
        assert pipeline.given == 1
        assert b"x" not in answer.body
        pipeline.gate.clear()


async def test_a_client_that_leaves_the_queue(client: Client, pipeline: ScriptedPipeline) -> None:
    """A request whose client goes while it waits inside never reaches the model."""
    pipeline.gate.clear()
    first, answer = client.begin("/v1/chat/completions", HELLO)
    second, left = client.begin("/v1/completions", TEXT)
    async with asyncio.timeout(PATIENCE):
        while client.worker.waiting < 1:  # noqa: ASYNC110 - a count has no event
            await asyncio.sleep(0.001)
    metrics = (await client.get("/metrics")).body.decode()
    assert "openvino_requests_running 1\n" in metrics
    assert "openvino_requests_waiting 1\n" in metrics
    left.leave()
    async with asyncio.timeout(PATIENCE):
        await second
    assert client.worker.waiting == 0
    pipeline.gate.set()
    await first
    assert answer.status == 200
    assert len(pipeline.asked) == 1


async def test_a_client_that_leaves_while_it_sends(client: Client, pipeline: ScriptedPipeline) -> None:
    """A request that never arrives whole isn't served."""

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await client.app(scope, receive, Answer().send)
    assert pipeline.asked == []


async def test_loading(pipeline: ScriptedPipeline) -> None:
    """While the model loads, health says so and requests are refused with a hint when to come back."""
    worker = Worker()
    client = Client(worker)
    health = await client.get("/health")
    assert (health.status, health.json()) == (503, {"status": "loading"})
    answer = await client.chat()
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    worker.pipeline = pipeline
    health = await client.get("/health")
    assert (health.status, health.json()) == (200, {"status": "ok"})
    worker.close()


async def test_models(client: Client) -> None:
    """The name and all aliases are listed."""
    body = (await client.get("/v1/models")).json()
    assert [model["id"] for model in body["data"]] == ["smol", "alias"]


async def test_unknown_paths_and_methods(client: Client) -> None:
    """What isn't there is refused in OpenAI's shape, too."""
    missing = await client.get("/v1/embeddings")
    assert (missing.status, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = await client.get("/v1/models", "DELETE")
    assert (wrong.status, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert "GET" in wrong.headers["allow"]
