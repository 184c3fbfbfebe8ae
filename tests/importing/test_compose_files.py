"""Whole compose files: what comes out, that it loads, that no key is lost in silence and no secret copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from modelswap.importing import report
from modelswap.importing.result import CannotImport, Imported, Kind
from tests.importing.reading import compose, noted, plain, text

FILES = ["stack", "zoo"]
WAYS = [pytest.param(False, id="adopted"), pytest.param(True, id="managed")]
SECRETS = ["plain-sglang-key", "plain-llama-key", "hf_0123456789abcdef"]


@pytest.mark.parametrize("manage", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_golden(name: str, *, manage: bool) -> None:
    """Each file becomes exactly the config that lies beside it."""
    imported = compose(text(f"{name}.yaml"), manage=manage)
    assert imported.config == plain(f"{name}.{'managed' if manage else 'adopted'}.yaml")


@pytest.mark.parametrize("manage", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_what_comes_out_loads_and_says_the_same(name: str, *, manage: bool) -> None:
    """The written file is a valid config, and each of its models has what was found."""
    imported = compose(text(f"{name}.yaml"), manage=manage)
    config = report.verify(report.text(imported, "x"), imported, {}, "modelswap.yaml")
    assert list(config.models) == list(imported.config["models"]) == [found.name for found in imported.found]
    for name_, model in config.models.items():
        said = imported.config["models"][name_]
        assert model.runtime == ("managed" if manage else "adopted")
        assert said.get("command", []) == (model.command or [])
        assert [each.replace("${SGLANG_API_KEY}", "sglang_api_key") for each in said.get("args", [])] == model.args
        assert said.get("gpus", "auto") == model.gpus
        assert said.get("volumes", []) == model.volumes


@pytest.mark.parametrize("manage", WAYS)
def test_no_secret_is_copied(*, manage: bool) -> None:
    """A literal key or token stands neither in the file nor in a note; a variable takes its place."""
    imported = compose(text("zoo.yaml"), manage=manage)
    everything = report.text(imported, "x") + repr(imported)
    assert not [secret for secret in SECRETS if secret in everything]
    assert "SGLANG_API_KEY" in imported.variables
    assert noted(imported, Kind.ACTION, "services.gguf.environment", "LLAMA_API_KEY")
    assert noted(imported, Kind.ACTION, "services.sgl.command", "SGLANG_API_KEY")


def test_two_secrets_of_one_name_get_two_names() -> None:
    """Two services with different literal keys don't end up with one variable."""
    imported = compose(
        "services:\n"
        "  a: {image: vllm/vllm-openai, command: --model org/a --api-key first}\n"
        "  b: {image: vllm/vllm-openai, command: --model org/b --api-key second}\n"
        "  c: {image: vllm/vllm-openai, command: --model org/c --api-key first}\n"
    )
    keys = {name: model["api_key"] for name, model in imported.config["models"].items()}
    assert keys == {"a": "${VLLM_API_KEY}", "b": "${B_VLLM_API_KEY}", "c": "${VLLM_API_KEY}"}


def leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key below ``path``."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield (*path, key)
            yield from leaves(each, (*path, key))


def without(value: Any, path: tuple[str, ...]) -> Any:
    """Return a copy of ``value`` that lacks the key at ``path``."""
    result = copy.deepcopy(value)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return result


def outcome(value: Any, *, manage: bool) -> Any:
    """Return everything that a user sees of an import."""
    try:
        imported = compose(yaml.safe_dump(value, sort_keys=False), manage=manage)
    except CannotImport as error:
        return str(error)
    return seen(imported)


def seen(imported: Imported) -> Any:
    """Return an import's outcome for comparison."""
    return imported.config, imported.notes, imported.ignored, imported.comments


EVERYTHING = """
image: vllm/vllm-openai:v1
command: --model org/name --max-model-len 4096
entrypoint: [vllm, serve]
environment: {A: b, HF_TOKEN: "${HF_TOKEN}"}
env_file: llm.env
ports: ["8001:8000"]
volumes: ["./m:/m:ro", {type: tmpfs, target: /t}]
deploy:
  resources:
    reservations: {devices: [{count: 2, capabilities: [gpu]}], memory: 1g}
    limits: {memory: 8g}
  replicas: 2
devices: [/dev/fuse]
shm_size: 8gb
ipc: host
ulimits: {memlock: -1}
network_mode: host
extra_hosts: {hub.local: 10.0.0.5}
pull_policy: always
working_dir: /work
stop_grace_period: 20s
container_name: c
restart: always
depends_on: [db]
healthcheck: {test: true}
labels: {a: b}
logging: {driver: none}
profiles: [p]
secrets: [s]
stop_signal: SIGINT
user: "1000"
cap_add: [SYS_ADMIN]
mem_limit: 9g
tty: "true"
hostname: h
x_unheard_of: 1
"""


@pytest.mark.long
def test_every_key_of_a_service_counts() -> None:
    """Taking any key out of a service changes the config or the notes: none is read for nothing, none overlooked."""
    service = yaml.safe_load(EVERYTHING)
    whole = {"services": {"llm": service, "db": {"image": "postgres"}}}
    full = outcome(whole, manage=True)
    assert not isinstance(full, str)
    # What stands in a key that is left behind as a whole is left behind with it.
    wholes = {"healthcheck", "logging", "labels", "limits"}
    keys = [path for path in leaves(service, ("services", "llm")) if wholes.isdisjoint(path[:-1])]
    assert [path for path in keys if outcome(without(whole, path), manage=True) == full] == []


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_every_key_of_a_file_counts(name: str) -> None:
    """The same for whole files, as far as it is about models."""
    whole = yaml.safe_load(yaml.safe_dump(plain(f"{name}.yaml")))
    whole.pop("x-vllm", None)
    full = outcome(whole, manage=True)
    models = [each.host.rpartition(" ")[2] for each in compose(text(f"{name}.yaml")).found]
    keys = [path for path in leaves(whole, ()) if len(path) < 4 and (path[0] != "services" or path[1:2] != ())]
    keys = [path for path in keys if path[0] != "services" or path[1] in models]
    silent = {".".join(path) for path in keys if outcome(without(whole, path), manage=True) == full}
    # Volumes keep the names that compose gives them; a port that is the usual one need not be said.
    harmless = {"volumes", "volumes.vllm-cache", "volumes.ollama"}
    harmless |= {"services.llava-llm.restart", "services.llava-llm.expose", "services.tgi.expose"}
    assert silent <= harmless


def test_unknown_keys_of_a_file_are_named() -> None:
    """A top-level key that Compose may know one day is named; extension fields are the user's own."""
    imported = compose(
        "version: '3.8'\nx-mine: {a: b}\nwat: 1\nmodels: {smol: {model: ai/smollm2}}\nsecrets: {s: {file: x}}\n"
        "services: {a: {image: vllm/vllm-openai, command: --model org/a}}",
        manage=True,
    )
    lost = {note.key for note in imported.notes if note.kind is Kind.LOST}
    assert lost == {"wat", "models", "secrets"}
