"""Which server a command line or an image is, and what it says."""

from __future__ import annotations

from typing import Any

import pytest

from modelswap.importing.servers import by_image, recognise
from modelswap.importing.words import split


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        ("vllm/vllm-openai", "vllm"),
        ("vllm/vllm-openai:v0.11.0@sha256:abc", "vllm"),
        ("registry.local:5000/rocm/vllm:latest", "vllm"),
        ("nvcr.io/nvidia/vllm:25.09-py3", "vllm"),
        ("lmcache/vllm-openai:latest", "vllm"),
        ("ghcr.io/vllm-project/vllm-router:x", None),
        ("ghcr.io/ggml-org/llama.cpp:server-cuda", "llamacpp"),
        ("ghcr.io/ggerganov/llama.cpp:full", "llamacpp"),
        ("ghcr.io/ggml-org/llama.cpp:light", None),
        ("my/llama-server:1", "llamacpp"),
        ("ghcr.io/someone/ik-llama-cpp:server", "llamacpp"),
        ("ghcr.io/abetlen/llama-cpp-python:latest", None),
        ("lmsysorg/sglang:v0.5.3-cu129", "sglang"),
        ("lmsysorg/sglang-router", None),
        ("ghcr.io/huggingface/text-generation-inference:3.3", "tgi"),
        ("ghcr.io/huggingface/text-embeddings-inference:1.8", None),
        ("ollama/ollama", "ollama"),
        ("ghcr.io/open-webui/open-webui:ollama", None),
        ("postgres:16", None),
        ("", None),
    ],
)
def test_images(image: str, kind: str | None) -> None:
    """An image is known by its repository, not by what else is in its name."""
    assert by_image(image) == kind


VLLM = "vllm/vllm-openai"
LLAMA = "ghcr.io/ggml-org/llama.cpp:server"


@pytest.mark.parametrize(
    ("image", "command", "expected"),
    [
        (VLLM, "--model org/m --port 9 --host 0.0.0.0", {"model": "org/m", "port": 9, "args": ()}),
        (VLLM, "org/m --dtype half", {"model": "org/m", "args": ("--dtype", "half")}),
        (VLLM, "serve org/m --port 9", {"program": ("vllm", "serve"), "model": "org/m", "port": 9}),
        (VLLM, "--served_model_name a b --model=m", {"names": ("a", "b"), "model": "m", "args": ()}),
        (
            VLLM,
            "m --served-model-name a,b --api-key k1 k2 -tp 2",
            {"names": ("a", "b"), "key": "k1", "args": ("-tp", "2")},
        ),
        ("x", "vllm serve m --port=70000", {"kind": "vllm", "program": ("vllm", "serve"), "model": "m", "port": None}),
        (
            "x",
            "/v/bin/python -m vllm.entrypoints.openai.api_server --model m",
            {"kind": "vllm", "program": ("/v/bin/python", "-m", "vllm.entrypoints.openai.api_server"), "model": "m"},
        ),
        ("x", "uv run vllm serve m", {"program": ("uv", "run", "vllm", "serve"), "model": "m"}),
        (
            "x",
            "bash -lc 'cd /x; pip install y && exec vllm serve m --port 9 # why'",
            {"in_shell": True, "model": "m", "port": 9},
        ),
        ("x", 'sh -c "vllm serve $MODEL --port 9"', {"in_shell": True, "model": None, "port": 9}),
        (LLAMA, "-m /m.gguf -a x,y -ngl 99", {"model": "/m.gguf", "names": ("x", "y"), "args": ("-ngl", "99")}),
        (LLAMA, "-hf org/repo:Q4 --mmproj p", {"model": "org/repo:Q4", "args": ("--mmproj", "p")}),
        (LLAMA, "--models-dir /models", {"many": True, "model": None}),
        ("ghcr.io/ggml-org/llama.cpp:full", "--server -m /m.gguf", {"model": "/m.gguf", "args": ()}),
        ("", "/opt/llama-server-b7000 -m x --api-key a,b", {"kind": "llamacpp", "key": "a"}),
        ("", r"C:\llama\llama-server.exe -m x".replace("\\", "\\\\"), {"kind": "llamacpp", "model": "x"}),
        (
            "x",
            "python3 -m sglang.launch_server --model-path m --port 30001",
            {"kind": "sglang", "model": "m", "port": 30001, "args": ()},
        ),
        ("lmsysorg/sglang", "sglang serve --model m --served-model-name s", {"kind": "sglang", "names": ("s",)}),
        (
            "lmsysorg/sglang",
            "python -m sglang.launch_server --model-path=org/m --host 0.0.0.0 --tp 2 --api-key k",
            {"model": "org/m", "key": "k", "args": ("--tp", "2", "--api-key", "k")},
        ),
        ("x", "text-generation-launcher --model-id m -p 8081", {"kind": "tgi", "model": "m", "port": 8081}),
        ("ollama/ollama", "", {"kind": "ollama", "many": True, "port": None}),
        ("x", "ollama serve", {"kind": "ollama"}),
    ],
)
def test_command_lines(image: str, command: str, expected: dict[str, Any]) -> None:
    """Names, port, key and model are read whatever way they are written; what we set ourselves is taken out."""
    server = recognise(image, [], split(command, "cmd"), {})
    assert server is not None
    assert {key: getattr(server, key) for key in expected} == expected


def test_environments() -> None:
    """What may be said in variables is read there, the command line first."""
    env = {"LLAMA_ARG_MODEL": "/e.gguf", "LLAMA_ARG_PORT": "9", "LLAMA_API_KEY": "k", "LLAMA_ARG_ALIAS": "n", "X": "y"}
    server = recognise(LLAMA, [], ["--port", "10"], env)
    assert server is not None
    assert (server.model, server.port, server.key, server.names) == ("/e.gguf", 10, "k", ("n",))
    assert "X" not in server.env
    tgi = recognise("ghcr.io/huggingface/text-generation-inference", [], [], {"MODEL_ID": "m", "PORT": "3000"})
    assert tgi is not None
    assert (tgi.model, tgi.port) == ("m", 3000)


def test_a_wrapper_is_part_of_the_program() -> None:
    """An entrypoint of somebody's own stays in front, and isn't taken for the model."""
    server = recognise(VLLM, ["/wrap.sh"], ["--model", "m"], {})
    assert server is not None
    assert (server.program, server.model) == (("/wrap.sh",), "m")


@pytest.mark.parametrize("command", ["", "nginx -g 'daemon off;'", "python app.py", "bash -c", "bash x.sh -c y"])
def test_other_commands_are_unknown(command: str) -> None:
    """What is no server that we know is none."""
    assert recognise("some/app", [], split(command, "cmd"), {}) is None
