"""The embedded server with OpenVINO GenAI and the real SmolLM2 weights."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from modelswap.cli.weights import default_cache, smollm2
from modelswap.engines.openvino_server import genai
from modelswap.engines.openvino_server.pipeline import CannotLoad, InvalidPrompt, Message, Params, Prompt
from modelswap.engines.openvino_server.text import Detokenizer

pytestmark = pytest.mark.openvino

PATIENCE = 120.0
STORY = Prompt(messages=(Message("user", "Write a story about the sea."),))
GREEDY = Params(max_tokens=40, temperature=0)


@pytest.fixture(scope="module")
def weights() -> Path:
    """Return the weights: MODELSWAP_WEIGHTS, else from the cache, else downloaded."""
    return smollm2(default_cache(), lambda stage, fraction: None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache for this module's starts."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(weights: Path, cache: Path) -> genai.GenAi:
    """Return the model, loaded from the GGUF file itself."""
    return genai.load(weights, genai.Options(cache=cache))


def said(model: genai.GenAi, prompt: Prompt, params: Params) -> tuple[str, Any]:
    """Return the whole text and the result."""
    pieces: list[str] = []

    def on_text(piece: str) -> bool:
        pieces.append(piece)
        return True

    result = model.generate(prompt, params, on_text)
    return "".join(pieces), result


def test_greedy_is_the_same_every_time(model: genai.GenAi) -> None:
    """Temperature 0 gives the same answer again, also after another one was given up halfway."""
    first, result = said(model, STORY, GREEDY)
    assert len(first) > 40
    assert (result.finish, result.completion_tokens) == ("length", 40)
    given_up = model.generate(Prompt("One two three"), GREEDY, lambda text: False)
    assert given_up.completion_tokens == 1
    assert said(model, STORY, GREEDY) == (first, result)


def test_the_kept_forms_say_the_same(model: genai.GenAi, weights: Path, cache: Path) -> None:
    """The converted and the compiled model answer as the GGUF file does."""
    reference = said(model, STORY, GREEDY)
    for _ in range(2):
        assert said(genai.load(weights, genai.Options(cache=cache)), STORY, GREEDY) == reference
    assert len(list(cache.glob("*/compiled-*/*.blob"))) == 1


def test_it_ends_by_itself(model: genai.GenAi) -> None:
    """The model's end token ends the answer, is counted, and isn't in the text."""
    text, result = said(model, Prompt(messages=(Message("user", "What is the capital of France?"),)), GREEDY)
    assert result.finish == "stop"
    assert result.completion_tokens < 40
    assert "<|im_end|>" not in text


def test_sampling_follows_the_seed(model: genai.GenAi) -> None:
    """The same seed gives the same sample; another, and none, give others."""

    def sample(seed: int | None) -> str:
        return said(model, STORY, Params(max_tokens=30, temperature=1.5, top_p=0.95, top_k=200, seed=seed))[0]

    assert sample(1) == sample(1)
    assert len({sample(1), sample(2), sample(-3), sample(None), sample(None)}) == 5


def test_penalties_are_understood(model: genai.GenAi) -> None:
    """Penalties change a greedy answer."""
    plain = Params(max_tokens=40, temperature=0)
    punished = Params(max_tokens=40, temperature=0, presence_penalty=1.5, frequency_penalty=1.5)
    prompt = Prompt("a a a a a a a a")
    assert said(model, prompt, plain)[0] != said(model, prompt, punished)[0]


def test_characters_over_tokens(model: genai.GenAi) -> None:
    """Characters that the real tokenizer splits over tokens come out whole."""
    text = "😀🎉日本語 한국어 naïve “quotes” 👩‍👩‍👧"
    tokens = [int(token) for token in model.tokenizer.encode(text, add_special_tokens=False).input_ids.data[0]]
    assert len(tokens) > len(text.split())
    detokenizer = Detokenizer(model.decode)
    pieces = [detokenizer.push(token) for token in tokens]
    assert "".join(pieces) + detokenizer.flush() == text
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_prompts_it_can_not_take(model: genai.GenAi, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty prompt and one beyond the context are refused; what barely fits is answered with what room is left."""
    assert model.context == 8192
    with pytest.raises(InvalidPrompt, match="empty"):
        said(model, Prompt(""), GREEDY)
    monkeypatch.setattr(model, "context", 50)
    with pytest.raises(InvalidPrompt, match="context of 50"):
        said(model, Prompt("word " * 50), GREEDY)
    _, result = said(model, STORY, GREEDY)
    assert (result.finish, result.prompt_tokens, result.completion_tokens) == ("length", 37, 13)


def test_a_broken_file(weights: Path, tmp_path: Path) -> None:
    """A file that ends early is refused with a reason, where OpenVINO alone would crash."""
    broken = tmp_path / "broken.gguf"
    with weights.open("rb") as whole:
        broken.write_bytes(whole.read(50_000_000))
    with pytest.raises(CannotLoad, match="ends too early"):
        genai.load(broken, genai.Options())


@asynccontextmanager
async def serving(weights: Path, cache: Path) -> AsyncIterator[tuple[str, aiohttp.ClientSession]]:
    """Run the real server; it must end with status 0 when asked."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", str(weights), "--served-name", "smol", "--port", str(port), "--cache-dir", str(cache)]
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "modelswap.engines.openvino_server", *words, stderr=PIPE
    )
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as http, asyncio.timeout(PATIENCE):
            while await health(http, url) != 200:
                assert server.returncode is None
                await asyncio.sleep(0.01)
            yield url, http
        server.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            await server.communicate()
        assert server.returncode == 0
    finally:
        if server.returncode is None:
            server.kill()
            await server.communicate()


async def health(http: aiohttp.ClientSession, url: str) -> int:
    """Return the status of the health check, 0 while nobody listens."""
    try:
        async with http.get(f"{url}/health") as response:
            return response.status
    except aiohttp.ClientConnectorError:
        return 0


async def test_served(weights: Path, cache: Path) -> None:
    """Over HTTP: streamed and unstreamed answers and counts agree, stop strings end, a leaving client frees it."""
    chat: dict[str, Any] = {"model": "smol", "temperature": 0, "max_tokens": 40}
    chat["messages"] = [{"role": "user", "content": "Write a story about the sea."}]
    async with serving(weights, cache) as (url, http):
        path = f"{url}/v1/chat/completions"
        async with http.post(path, json=chat) as response:
            whole = await response.json()
        text = whole["choices"][0]["message"]["content"]
        streamed = chat | {"stream": True, "stream_options": {"include_usage": True}}
        async with http.post(path, json=streamed) as response:
            events = (await response.read()).split(b"\n\n")
        *chunks, last = [msgspec.json.decode(event[6:]) for event in events if event and event[6:] != b"[DONE]"]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
        assert last["usage"] == whole["usage"]
        assert whole["usage"]["completion_tokens"] == 40

        stop = text[10:20]
        async with http.post(path, json=chat | {"stop": stop}) as response:
            stopped = await response.json()
        assert stopped["choices"][0]["message"]["content"] == text[: text.index(stop)]
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert stopped["usage"]["completion_tokens"] < 40

        async with http.post(path, json=streamed | {"max_tokens": 1900}) as response:
            await response.content.readline()
        async with http.post(path, json=chat) as response:
            assert (await response.json())["choices"] == whole["choices"]
