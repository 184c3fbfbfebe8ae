"""How vLLM waits for a model in a container: in which Python, and which models share one."""

from __future__ import annotations

from typing import Any

import pytest

from modelswap.engines import vllm_standby
from modelswap.engines.base import Address, StandbyPlan
from modelswap.engines.vllm import Vllm
from modelswap.spec.config import Model

BASE: dict[str, Any] = {"engine": "vllm", "image": "vllm:1", "model": "org/one"}


def plan(program: tuple[str, ...] = ("vllm", "serve"), **more: Any) -> StandbyPlan | None:
    """Return the plan for a managed model whose image starts ``program``."""
    model = Model.model_validate({**BASE, **more}, strict=False)
    launch = Vllm().launch("m", model, Address("0.0.0.0", 8000), program)
    return Vllm().standby(model, launch)


@pytest.mark.parametrize(
    ("program", "python"),
    [
        (("vllm", "serve"), ("python3",)),
        (("/usr/bin/vllm", "serve"), ("python3",)),
        (("tini", "--"), ("tini", "--", "python3")),
        (("/opt/bin/python", "-m", "vllm.entrypoints.openai.api_server"), ("/opt/bin/python",)),
        (("python3", "-m", "something.else"), None),
        (("/start.sh",), None),
    ],
)
def test_it_waits_in_the_python_of_the_image(program: tuple[str, ...], python: tuple[str, ...] | None) -> None:
    """What wraps the image's program wraps the one that waits; of another program nothing is known."""
    made = plan(program)
    assert (None if made is None else made.python) == python


@pytest.mark.parametrize(
    "more",
    [
        {"image": "vllm:2"},
        {"volumes": ["/a:/b"]},
        {"shm_size": 1 << 20},
        {"gpus": "all"},
        {"device": "none"},
        {"network": "other"},
        {"env": {"A": "1"}},
        {"port": 9},
        {"model": "/models/one"},
    ],
)
def test_models_in_unlike_containers_do_not_share_one(more: dict[str, Any]) -> None:
    """Whatever a container is made of, beside its command, is in the key; so is who gets the weights' cache."""
    alike, other = plan(), plan(**more)
    assert alike is not None and other is not None
    assert alike.key != other.key


def test_models_that_differ_in_their_command_alone_share_one() -> None:
    """Arguments, names, keys and what only the scheduler looks at make no difference."""
    one, other = plan(), plan(model="org/two", args=["--max-model-len", "1"], aliases=["b"], api_key="k", priority=3)
    assert one is not None and other is not None
    assert one.key == other.key and one.env == other.env
    assert other.spec is not None and other.spec.model == "org/two"


@pytest.mark.parametrize(
    ("program", "env", "apart"),
    [
        (["/venv/bin/python"], {}, False),
        (["python"], {"PYTHONPATH": "/lib"}, False),
        (["venv/bin/python"], {}, True),
        (["python"], {"PYTHONPATH": "/lib:src"}, True),
    ],
)
def test_a_folder_makes_a_difference_where_something_is_found_from_it(
    monkeypatch: pytest.MonkeyPatch, program: list[str], env: dict[str, str], apart: bool
) -> None:
    """One waits where its Python, or what that imports, is looked for; else models of all folders share one."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    plans = []
    for folder in ("/one", "/two"):
        words = [*program, "-m", "vllm.entrypoints.openai.api_server"]
        fields = {"engine": "vllm", "model": "org/one", "program": words, "env": env, "cwd": folder}
        model = Model.model_validate(fields, strict=False)
        plans.append(Vllm().standby(model, Vllm().launch("m", model, Address("127.0.0.1", 8000))))
    assert plans[0] is not None and plans[1] is not None
    assert (plans[0].key != plans[1].key) is apart
    assert [plan.cwd for plan in plans if plan is not None] == (["/one", "/two"] if apart else [None, None])


@pytest.mark.parametrize(
    ("argv", "left"),
    [
        (["vllm", "serve", "-m"], ["vllm", "serve", "-m"]),
        (["uv", "run", "vllm", "serve", "m"], ["vllm", "serve", "m"]),
        (["python3", "-m", "mod", "--model", "serve"], ["python3", "-m", "mod", "--model", "serve"]),
        (["/entry.sh", "python3", "-m", "mod"], ["python3", "-m", "mod"]),
        (["vllm", "bench"], ["vllm", "bench"]),
    ],
)
def test_what_wraps_the_program_is_left_out(argv: list[str], left: list[str]) -> None:
    """The process that waited becomes the program itself."""
    assert vllm_standby.unwrapped(argv) == left
