"""Which engine processes are kept waiting, and when."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from structlog.testing import capture_logs

from modelswap.core.snapshot import Snapshot, SwapView
from modelswap.core.swap import Phase
from modelswap.engines.base import Address, Engine, Launch, Place, StandbyPlan
from modelswap.engines.registry import engine_for
from modelswap.orchestrator import sleepers, standing_by
from modelswap.orchestrator.facts import Configured
from modelswap.orchestrator.preparing import NoWeights, Weights
from modelswap.orchestrator.standing_by import (
    CAN_STAND_BY,
    UNKNOWN_PYTHON,
    USUAL_BYTES,
    affordable,
    host_bytes,
    moving,
    plans,
)
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.base import StandbyState
from modelswap.spec.config import Config, EngineName, Model
from modelswap.testing.waiting import until
from tests.orchestrator.fakes import World

PROGRAM = ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"]


def snapshot(*swaps: SwapView) -> Snapshot:
    """Return a state in which only these swaps go on."""
    return Snapshot(begun=True, generation=1, models=(), instances=(), devices=(), swaps=swaps, gateways=())


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


class Seen(NoWeights):
    """Weights of which some folders can be seen, by the models' names."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders

    async def folder(self, name: str, spec: Model) -> Path | None:
        """See `Weights`."""
        return self.folders.get(name)


async def planned(weights: Weights | None = None, /, **models: Model) -> list[StandbyPlan]:
    """Return the plans for a config of these models."""
    engines: dict[str, Engine] = {name: engine_for(model.engine) for name, model in models.items()}
    return await plans(models, engines, Images(), weights or NoWeights())


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
            assert len(await plans(models, engines, Images(), NoWeights(), told)) == 1
    assert [(one["model"], one["reason"]) for one in logs] == [("a", UNKNOWN_PYTHON)]


async def test_a_container_waits_like_its_model() -> None:
    """The plan of a managed model tells what container it is to wait in."""
    model = vllm(image="vllm/vllm-openai:v1")
    [plan] = await planned(a=model, b=vllm(standby=False))
    assert plan.spec == model
    assert plan.python == ("python3",)


async def test_it_imports_what_its_models_are_made_of(tmp_path: Path) -> None:
    """In a container, too, where what a model is loaded from can be seen; without that it still waits."""
    seen = {}
    for name, text in (("a", '{"architectures": ["One"]}'), ("b", '{"architectures": ["Two", "One"]}'), ("c", "{")):
        seen[name] = tmp_path / name
        seen[name].mkdir()
        (seen[name] / "config.json").write_text(text)
    models = {name: vllm(image="img", model=f"org/{name}") for name in "abcd"}
    [plan] = await planned(Seen(seen), **models)
    assert [hint for hint in plan.hints if not hint.startswith("--")] == ["One", "Two"]
    [plan] = await planned(**models)
    assert plan.hints == ("--program=vllm",)
    [plan] = await planned(Seen(seen), a=vllm(), b=vllm())
    assert plan.hints == ("One", "Two")


async def test_a_process_sees_its_own_folder(tmp_path: Path) -> None:
    """Nobody needs to tell what lies at a path of this machine."""
    (tmp_path / "config.json").write_text('{"architectures": ["Own"]}')
    [plan] = await planned(a=vllm(model=str(tmp_path)), b=vllm(model=".", cwd=str(tmp_path)))
    assert plan.hints == ("Own",)


class Desk:
    """As much of an orchestrator as keeps standbys; a model comes in while ``busy``."""

    def __init__(self, config: Config, weights: Weights) -> None:
        self.configured = Configured.of(config, engine_for)
        self.weights = weights
        self.kept: list[list[StandbyPlan]] = []
        self.busy = False
        self.shell: Any = self
        self.outside: Any = SimpleNamespace(runtime=self)
        self.looked = 0

    def snapshot(self) -> Any:
        """See `Shell`."""
        self.looked += 1
        coming = SwapView(device="gpu", source="a", target="b", phase=Phase.IN, seconds=1.0, phases={})
        return snapshot(coming) if self.busy else snapshot()

    def standbys(self) -> list[StandbyState]:
        """See `Runtime`."""
        return []

    async def stand_by(self, plans: list[StandbyPlan]) -> None:
        """See `Runtime`."""
        self.kept.append(plans)


async def test_what_a_swap_brought_is_known_to_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that were downloaded for a swap tell what the standby that follows had better import."""
    monkeypatch.setattr(standing_by, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(standing_by, "QUIET_FOR", 0.01)
    monkeypatch.setattr(sleepers, "spare", lambda _: 10 * USUAL_BYTES)
    (tmp_path / "config.json").write_text('{"architectures": ["New"]}')
    weights = Seen({})
    desk = Desk(Config(models={"a": vllm(), "b": vllm()}), weights)
    keeping = asyncio.create_task(standing_by.keep_standing_by(desk))
    try:
        await until(lambda: bool(desk.kept and desk.kept[-1]))
        assert desk.kept[-1][0].hints == ()
        desk.busy, looked = True, desk.looked
        await until(lambda: desk.looked > looked + 1)
        weights.folders["b"] = tmp_path
        desk.busy = False
        await until(lambda: bool(desk.kept[-1]) and desk.kept[-1][0].hints == ("New",))
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


@pytest.mark.parametrize(("spare", "kept"), [(3 * USUAL_BYTES, 2), (USUAL_BYTES + 5, 1), (5, 0)])
def test_only_what_the_memory_allows_is_kept(spare: int, kept: int) -> None:
    """The first plans are kept; what is there already counts with what it takes."""
    wanted = [StandbyPlan(key, ("python",), Path("x"), {}) for key in "ab"]
    assert affordable(wanted, [], spare, quiet=True) == wanted[:kept]
    there = [StandbyState(key="a", ready=True, pid=1, host_bytes=USUAL_BYTES)]
    assert affordable(wanted, there, spare - USUAL_BYTES, quiet=True) == wanted[:kept]


@pytest.mark.parametrize("phase", Phase)
def test_one_may_be_made_while_a_model_drains(phase: Phase) -> None:
    """Whoever waits for the next model gains by it; once the old one goes, the machine is the new one's."""
    swap = SwapView(device="gpu", source="a", target="b", phase=phase, seconds=1.0, phases={})
    assert moving(snapshot(swap)) == (phase is not Phase.DRAIN)
    assert not moving(snapshot())


def test_nothing_is_made_without_quiet() -> None:
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


def test_the_engines_that_stand_by_are_those_with_a_plan() -> None:
    """What is told of the others, in the log and by doctor, is true."""
    launch = Launch(("vllm", "serve"), {})
    models = [Model(engine=kind, model="x", image="x") for kind in get_args(EngineName)]
    assert {one.engine for one in models if engine_for(one.engine).standby(one, launch)} == CAN_STAND_BY
