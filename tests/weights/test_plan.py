"""What a model loads from the hub, by its config alone."""

from __future__ import annotations

from typing import Any

import pytest

from modelswap.spec.config import Model
from modelswap.weights.plan import Wanted, hub_id, wanted
from modelswap.weights.repo import ALL, Repo, choose

LLAMA = [
    "README.md", "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "model.safetensors.index.json", "original/consolidated.00.pth",
    "original/params.json", "original/tokenizer.model", "pytorch_model.bin", "special_tokens_map.json",
    "tokenizer.json", "chat_template.jinja", "model-Q4_K_M.gguf", "figures/speed.png",
]  # fmt: skip


def plan(**fields: Any) -> Wanted | None:
    """Return what such a model wants, with no file of that name here."""
    return wanted("m", Model(**fields), local=lambda *_: None)


def repos(**fields: Any) -> list[tuple[str, str | None]]:
    """Return the repositories and revisions of such a model."""
    found = plan(**fields)
    return [] if found is None else [(repo.repo, repo.revision) for repo in found.repos]


def weights(args: list[str], names: list[str]) -> list[str]:
    """Return which weights are taken with such arguments."""
    found = plan(model="org/name", args=args)
    assert found is not None
    return [name for name in choose(found.repos[0], names) if name.endswith((".safetensors", ".bin", ".pt", ".gguf"))]


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "/models/llama"},
        {"model": "./llama"},
        {"model": "../llama"},
        {"model": "~/llama"},
        {"model": "s3://bucket/llama"},
        {"model": "a/b/c"},
        {},
        {"engine": "llamacpp", "model": "org/name", "args": ["-hf", "org/name"]},
        {"engine": "custom", "model": "org/name", "command": ["serve"]},
        {"model": "org/name", "container": "mistral-llm"},
        {"model": "org/name", "env": {"VLLM_USE_MODELSCOPE": "True"}},
        {"model": "org/name", "engine": "sglang", "env": {"SGLANG_USE_MODELSCOPE": "1"}},
        {"model": "org/name", "image": "vllm", "args": ["--download-dir", "/weights"]},
    ],
)
def test_nothing_is_wanted(fields: dict[str, Any]) -> None:
    """Folders, other engines and containers that nobody says share our cache want nothing from us."""
    assert plan(**fields) is None


def test_a_folder_that_is_here_goes_first_for_processes_alone() -> None:
    """vLLM prefers a folder of that name; in a container there is none of ours."""
    assert wanted("m", Model(model="gpt2"), local=lambda *_: "here") is None
    assert wanted("m", Model(model="gpt2", image="vllm"), local=lambda *_: "here") is not None


@pytest.mark.parametrize("runtime", [{}, {"image": "vllm/vllm-openai"}])
def test_a_model_wants_its_repository_at_its_revision(runtime: dict[str, Any]) -> None:
    """Processes and managed containers are the same in this."""
    args = ["--max-model-len", "4096", "--revision=v2"]
    assert repos(model="org/name", args=args, **runtime) == [("org/name", "v2")]


def test_an_adopted_container_counts_if_it_shares_our_cache() -> None:
    """Only the caller can know that."""
    assert wanted("m", Model(model="org/name", compose_service="x"), mounted=True) is not None


def test_tokenizer_draft_and_lora_are_wanted_too() -> None:
    """Each from its own repository; local LoRA modules and what is named twice add nothing."""
    args = [
        "--tokenizer", "org/tok", "--revision", "v2",
        "--speculative-config", '{"model": "org/draft", "num_speculative_tokens": 3}',
        "--lora-modules", "a=org/lora-a", "b=/local/lora", '{"name": "c", "path": "org/lora-c"}', "d=org/lora-a",
        "--enforce-eager",
    ]  # fmt: skip
    found = plan(model="org/name", args=args)
    assert found is not None
    assert [(repo.repo, repo.revision) for repo in found.repos] == [
        ("org/name", "v2"),
        ("org/tok", "v2"),
        ("org/draft", None),
        ("org/lora-a", None),
        ("org/lora-c", None),
    ]
    assert found.repos[1].weights == ()
    assert found.repos[2].weights
    assert choose(found.repos[3], ["a.txt", "b.pth", "onnx/c"]) == ["a.txt", "b.pth", "onnx/c"]


def test_sglang_wants_the_same_in_its_own_words() -> None:
    """Draft and adapters are named by other options; Mistral's own format isn't what it loads by itself."""
    args = ["--speculative-draft-model-path", "org/draft", "--lora-paths", "a=org/lora-a", "org/lora-b", "--tp", "2"]
    found = plan(engine="sglang", model="org/name", args=args)
    assert found is not None
    assert [repo.repo for repo in found.repos] == ["org/name", "org/draft", "org/lora-a", "org/lora-b"]
    assert found.repos[0].weights[0] == "*.safetensors"
    narrowed = plan(engine="sglang", model="org/name", args=["--load-format", "mistral"])
    assert narrowed is not None and narrowed.repos[0].weights == ("consolidated*.safetensors",)


def test_a_draft_without_a_model_wants_nothing() -> None:
    """N-gram drafts have no weights."""
    args = ["--speculative-config", '{"method": "ngram", "model": "ngram"}']
    assert repos(model="org/name", args=args) == [("org/name", None)]


def test_a_download_folder_holds_weights_and_the_usual_cache_the_rest() -> None:
    """That is how vLLM divides them."""
    found = plan(model="org/name", args=["--download-dir=/weights"])
    assert found is not None
    kept, rest = found.repos
    assert (kept.folder, rest.folder) == ("/weights", None)
    assert "tokenizer.json" in choose(rest, LLAMA)
    assert "model-00001-of-00002.safetensors" in choose(kept, LLAMA)
    assert "model-00001-of-00002.safetensors" not in choose(rest, LLAMA)


def test_safetensors_go_first_and_originals_are_left() -> None:
    """Of several formats one is taken, with all that configures it."""
    found = plan(model="org/name")
    assert found is not None
    assert choose(found.repos[0], LLAMA) == [
        "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "special_tokens_map.json",
        "tokenizer.json", "chat_template.jinja",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "names", "taken"),
    [
        ([], ["pytorch_model.bin", "model.pt"], ["pytorch_model.bin"]),
        ([], ["model.pt"], ["model.pt"]),
        ([], ["model.safetensors", "consolidated.safetensors"], ["consolidated.safetensors"]),
        (["--load-format", "hf"], ["model.safetensors", "x.bin"], ["model.safetensors"]),
        (["--load-format", "pt"], ["model.safetensors", "x.pt"], ["x.pt"]),
        (["--load-format=dummy"], ["model.safetensors"], []),
        ([], ["unet/model.safetensors"], ["unet/model.safetensors"]),
        (["--ignore-patterns", "extra*", "old*"], ["a.safetensors", "old.safetensors"], ["a.safetensors"]),
    ],
)
def test_the_format_is_chosen_as_vllm_does(args: list[str], names: list[str], taken: list[str]) -> None:
    """By what is at the top of the repository, and by what the arguments say."""
    assert weights(args, names) == taken


def test_a_quantisation_or_a_file_of_gguf_weights_can_be_named() -> None:
    """Only that one is taken."""
    for model in ("org/name:Q4_K_M", "org/name/model-Q4_K_M.gguf"):
        found = plan(model=model)
        assert found is not None
        assert found.repos[0].repo == "org/name"
        taken = choose(found.repos[0], [*LLAMA, "model-Q8_0.gguf"])
        assert "model-Q4_K_M.gguf" in taken
        assert not {"model-Q8_0.gguf", "model-00001-of-00002.safetensors"} & set(taken)


@pytest.mark.parametrize(
    ("text", "can_be"),
    [
        ("gpt2", True),
        ("org/na.me-1_b", True),
        ("a--b", False),
        ("", False),
        ("-x", False),
        ("a b", False),
        (".x", False),
    ],
)
def test_what_can_be_an_id(text: str, can_be: bool) -> None:
    """The hub's own rule."""
    assert hub_id(text) is can_be


def test_all_of_a_repository_is_all() -> None:
    """Nothing is put aside then."""
    assert choose(Repo(repo="o/n", extra=ALL), LLAMA) == LLAMA
