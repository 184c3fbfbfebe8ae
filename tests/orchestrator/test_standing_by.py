"""Which engine processes are kept waiting, and when."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from modelswap.engines.base import Address, Engine, Place, StandbyPlan
from modelswap.engines.registry import engine_for
from modelswap.orchestrator.standing_by import UNKNOWN_PYTHON, USUAL_BYTES, affordable, host_bytes, plans
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import StandbyState
from modelswap.spec.config import Model
from tests.orchestrator.fakes import World

PROGRAM = ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"]


class Images:
    """Places in containers; one image isn't here yet."""

    async def allocate(self, spec: Model) -> Place:
        """Return a place with vLLM's entrypoint."""
        if spec.image == "missing":
            raise ModelswapError("not here")
        return Place(Address("0.0.0.0", 8000), ("vllm", "serve"))


def vllm(**fields: object) -> Model:
    """Return a vLLM model."""
    base = {"program": PROGRAM} if "image" not in fields and "container" not in fields else {}
    return Model.model_validate({"engine": "vllm", "model": "org/name", **base, **fields})


async def planned(**models: Model) -> list[StandbyPlan]:
    """Return the plans for a config of these models."""
    engines: dict[str, Engine] = {name: engine_for(model.engine) for name, model in models.items()}
    return await plans(models, engines, Images())


async def test_one_serves_all_models_of_an_environment() -> None:
    """Models of the same Python and environment share a plan; another environment needs its own."""
    found = await planned(a=vllm(), b=vllm(args=["--max-model-len", "10"]), c=vllm(env={"A": "b"}))
    assert len(found) == 2
    assert [plan.python for plan in found] == [("/venv/bin/python",)] * 2
    assert {frozenset(plan.env.items()) for plan in found} == {frozenset(), frozenset({("A", "b")})}


async def test_an_api_key_needs_no_standby_of_its_own() -> None:
    """The key is told when the server starts, and waits in nobody's environment."""
    found = await planned(a=vllm(api_key="k3y"), b=vllm())
    assert len(found) == 1
    assert "k3y" not in repr(found)


async def test_whom_it_would_not_help_has_none() -> None:
    """A single model, one that wants none, an adopted container, an engine without standby, an image not yet pulled."""
    assert await planned(a=vllm()) == []
    others = {
        "b": vllm(standby=False),
        "c": vllm(container="x"),
        "d": Model(engine="llamacpp", model="/m.gguf", program=["llama-server"]),
        "e": vllm(image="missing"),
    }
    assert await planned(**others) == []


async def test_a_command_that_hides_its_python_is_told_once() -> None:
    """Who looks for the reason of cold starts finds it in the log."""
    models = {"a": vllm(program=["/start.sh"]), "b": vllm(), "c": vllm(program=["/start.sh"], standby=False)}
    engines: dict[str, Engine] = {name: engine_for(model.engine) for name, model in models.items()}
    told: set[str] = set()
    with capture_logs() as logs:
        for _ in range(2):
            assert len(await plans(models, engines, Images(), told)) == 1
    assert [(one["model"], one["reason"]) for one in logs] == [("a", UNKNOWN_PYTHON)]


async def test_a_container_waits_like_its_model() -> None:
    """The plan of a managed model tells what container it is to wait in."""
    model = vllm(image="vllm/vllm-openai:v1")
    [plan] = await planned(a=model, b=vllm(standby=False))
    assert plan.spec == model
    assert plan.python == ("python3",)


@pytest.mark.parametrize(("spare", "kept"), [(3 * USUAL_BYTES, 2), (USUAL_BYTES + 5, 1), (5, 0)])
def test_only_what_the_memory_allows_is_kept(spare: int, kept: int) -> None:
    """The first plans are kept; what is there already counts with what it takes."""
    wanted = [StandbyPlan(key, ("python",), Path("x"), {}) for key in "ab"]
    assert affordable(wanted, [], spare, quiet=True) == wanted[:kept]
    there = [StandbyState(key="a", ready=True, pid=1, host_bytes=USUAL_BYTES)]
    assert affordable(wanted, there, spare - USUAL_BYTES, quiet=True) == wanted[:kept]


def test_nothing_is_made_while_somebody_waits() -> None:
    """A standby that is there stays, one that isn't has to wait for quiet."""
    wanted = [StandbyPlan(key, ("python",), Path("x"), {}) for key in "ab"]
    there = [StandbyState(key="b", ready=True, pid=1, host_bytes=1)]
    assert affordable(wanted, there, 10 * USUAL_BYTES, quiet=False) == [wanted[1]]


def test_one_that_failed_is_no_one_that_is_there() -> None:
    """A problem takes no memory."""
    wanted = [StandbyPlan("a", ("python",), Path("x"), {})]
    assert affordable(wanted, [StandbyState(key="a", problem="no vLLM")], 0, quiet=True) == []


def test_one_that_is_being_made_is_not_let_go_for_what_it_takes() -> None:
    """What it will take was granted when it was begun; while it grows, less is free, and it would be made for ever."""
    wanted = [StandbyPlan("a", ("python",), Path("x"), {})]
    there = [StandbyState(key="a", pid=1)]
    assert affordable(wanted, there, 100, quiet=True) == wanted
    assert affordable(wanted, there, -1, quiet=True) == []


async def test_what_one_will_take_counts_from_the_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sleepers can't be promised the memory that a standby is about to fill."""
    states = [
        StandbyState(key="a", pid=1),
        StandbyState(key="b", ready=True, pid=2, host_bytes=5),
        StandbyState(key="c", problem="no vLLM"),
    ]
    monkeypatch.setattr(world.runtime, "standbys", lambda: states)
    assert host_bytes(world.outside) == USUAL_BYTES + 5
