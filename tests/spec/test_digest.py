"""When a reload must start an engine anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from modelswap.spec.config import Hook, Hooks, Model
from modelswap.spec.digest import definition

BASE = Model(engine="vllm", model="m", args=["--a"], env={"A": "1"}, aliases=["x"], api_key=SecretStr("k"))


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "llamacpp"},
        {"model": "n"},
        {"args": ["--b"]},
        {"args": []},
        {"program": ["vllm", "serve"]},
        {"env": {"A": "2"}},
        {"cwd": Path("/srv")},
        {"aliases": ["y"]},
        {"aliases": []},
        {"api_key": SecretStr("other")},
        {"api_key": None},
        {"device": "none"},
        {"sleep": "on"},
    ],
    ids=str,
)
def test_what_changes_the_engine_changes_the_digest(change: dict[str, Any]) -> None:
    """Everything an engine is started from counts, secrets included."""
    assert definition("a", BASE.model_copy(update=change)) != definition("a", BASE)


@pytest.mark.parametrize(
    "change",
    [
        {"priority": 5},
        {"health_interval": 3.0},
        {"stop_grace": 3.0},
        {"start_timeout": 3.0},
        {"concurrency": 3},
        {"canary": "none"},
        {"memory": 5},
        {"adapters": ["lora"]},
        {"ttl": 60.0},
        {"idle": "stop"},
        {"pin": True},
        {"preload": True},
        {"standby": False},
        {"hooks": Hooks(after_load=[Hook(url="/x")])},
    ],
    ids=str,
)
def test_what_only_we_read_does_not(change: dict[str, Any]) -> None:
    """A running engine goes on when only our own handling of it changes."""
    assert definition("a", BASE.model_copy(update=change)) == definition("a", BASE)


@pytest.mark.parametrize(
    "change",
    [
        {"image": "vllm:2"},
        {"entrypoint": ["vllm", "serve"]},
        {"volumes": ["v1:/x"]},
        {"gpus": ["0"]},
        {"gpus": "none"},
        {"devices": ["/dev/kfd"]},
        {"shm_size": 5},
        {"ipc": "host"},
        {"ulimits": {"memlock": -1}},
        {"network": "other"},
        {"extra_hosts": ["a:10.0.0.1"]},
        {"port": 9000},
        {"aliases": ["y"]},
        {"env": {"A": "2"}},
    ],
    ids=str,
)
def test_what_changes_a_container_of_ours_changes_the_digest(change: dict[str, Any]) -> None:
    """All that its container is created from counts."""
    managed = BASE.model_copy(update={"image": "vllm:1"})
    assert definition("a", managed.model_copy(update=change)) != definition("a", managed)


def test_when_an_image_is_pulled_does_not() -> None:
    """Another ``pull`` fetches at another time, and changes nothing of what runs."""
    managed = BASE.model_copy(update={"image": "vllm:1"})
    assert definition("a", managed.model_copy(update={"pull": "always"})) == definition("a", managed)


def test_somebody_elses_container_is_only_what_it_is_and_where_it_listens() -> None:
    """Names are ours alone there; another container, service, port or served name is another engine."""
    adopted = Model(container="llm-1", model="org/m", aliases=["x"])
    same = definition("a", adopted)
    assert definition("b", adopted.model_copy(update={"aliases": ["y", "z"]})) == same
    changes: list[dict[str, Any]] = [
        {"container": "llm-2"},
        {"container": None, "compose_service": "llm-1"},
        {"port": 9},
        {"model": "n"},
    ]
    assert all(definition("a", adopted.model_copy(update=change)) != same for change in changes)
    assert len({definition("a", adopted.model_copy(update=change)) for change in changes}) == len(changes)


def test_saying_a_default_aloud_changes_nothing() -> None:
    """A key with its default value and a missing key start the same engine, today's keys and tomorrow's."""
    assert definition("a", BASE.model_copy(update={"gpus": "auto", "volumes": []})) == definition("a", BASE)


def test_names_count_for_engines_that_are_told_them() -> None:
    """A custom server knows neither our name nor its aliases; the others are started with them."""
    assert definition("b", BASE) != definition("a", BASE)
    custom = Model(engine="custom", command=["x"], aliases=["y"])
    assert definition("a", custom) == definition("b", custom.model_copy(update={"aliases": []}))


def test_sglang_is_told_one_name_and_no_key() -> None:
    """Aliases and the key are between the gateway and the clients; another name is another server."""
    model = Model(engine="sglang", model="m")
    same = definition("a", model)
    assert definition("a", model.model_copy(update={"aliases": ["x"], "api_key": SecretStr("k")})) == same
    assert definition("b", model) != same


def test_the_embedded_server_is_told_its_grace() -> None:
    """A change of grace reaches the embedded server only through a new start."""
    embedded = Model(engine="openvino", model="m")
    assert definition("a", embedded) != definition("a", embedded.model_copy(update={"stop_grace": 2.0}))
    assert definition("a", embedded) == definition("a", embedded.model_copy(update={"concurrency": 2}))


def test_a_digest_is_short_stable_and_hides_the_key() -> None:
    """It is the same in every process, fits a label, and shows nothing of what went in."""
    assert definition("a", BASE) == definition("a", BASE.model_copy())
    assert len(definition("a", BASE)) == 16
    int(definition("a", BASE), 16)
