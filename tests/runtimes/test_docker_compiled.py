"""What engines compile is kept beyond their containers, in one volume for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import structlog

from modelswap.engines.base import Address, StandbyPlan
from modelswap.engines.registry import engine_for
from modelswap.runtimes.base import StartOrder
from modelswap.runtimes.docker.body import BODY, create_body, standby_body
from modelswap.runtimes.docker.compiled import PLACE, Kept, barred, kept
from modelswap.runtimes.docker.images import Image
from modelswap.runtimes.docker.opening import open_runtime
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec import config
from modelswap.spec.config import Model
from tests.runtimes.docker_fake import fake_docker

IMAGE = Image("sha256:1", ("vllm", "serve"), (8000,))
AROUND = Surroundings(compile_cache="compiled")
MOUNT = f"compiled:{PLACE}"
OWN = {
    "VLLM_CACHE_ROOT": "/c/vllm",
    "TRITON_CACHE_DIR": "/c/triton",
    "TORCHINDUCTOR_CACHE_DIR": "/c/inductor",
    "FLASHINFER_WORKSPACE_BASE": "/c",
    "CUDA_CACHE_PATH": "/c/cuda",
}
"""As the compose files said it before modelswap did it by itself."""


def model(**fields: Any) -> Model:
    return Model.model_validate({"model": "/models/m", "image": "img", **fields})


def body(spec: Model, image: Image = IMAGE, around: Surroundings = AROUND) -> dict[str, Any]:
    launch = engine_for(spec.engine).launch("m", spec, Address("0.0.0.0", 8000), image.entrypoint)
    order = StartOrder(
        instance="i", model="m", definition="d", spec=spec, launch=launch, address=Address("0.0.0.0", 8000)
    )
    return create_body(order, image, around, port=8000, published=None, gpu=0, owner="me", env={})


def variables(made: dict[str, Any]) -> dict[str, str]:
    return dict(each.split("=", 1) for each in made["Env"])


def test_every_cache_of_vllm_is_in_the_one_volume() -> None:
    """vLLM's own, Triton's, Inductor's, FlashInfer's and the driver's, each in a folder of its own."""
    made = body(model())
    assert made["HostConfig"]["Binds"] == [MOUNT]
    assert variables(made) == {
        "VLLM_CACHE_ROOT": "/var/cache/modelswap/vllm",
        "TRITON_CACHE_DIR": "/var/cache/modelswap/triton",
        "TORCHINDUCTOR_CACHE_DIR": "/var/cache/modelswap/inductor",
        "FLASHINFER_WORKSPACE_BASE": "/var/cache/modelswap",
        "CUDA_CACHE_PATH": "/var/cache/modelswap/cuda",
    }


def test_sglang_has_its_own_besides() -> None:
    """SGLang and vLLM share what their libraries compile."""
    made = body(model(engine="sglang"))
    assert made["HostConfig"]["Binds"] == [MOUNT]
    assert variables(made)["SGLANG_CACHE_DIR"] == "/var/cache/modelswap/sglang"
    assert variables(made)["TRITON_CACHE_DIR"] == variables(body(model()))["TRITON_CACHE_DIR"]
    assert "VLLM_CACHE_ROOT" not in variables(made)


@pytest.mark.parametrize("spec", [model(engine="llamacpp"), model(engine="custom", command=["serve"])])
def test_engines_that_compile_nothing_get_none(spec: Model) -> None:
    """Nor does a program of which nothing is known."""
    assert kept(spec, IMAGE, AROUND) == Kept()


def test_it_can_be_switched_off() -> None:
    """Without a place for it nothing is said to the engine either, wherever else something is mounted."""
    assert kept(model(), IMAGE, Surroundings()) == Kept()
    assert kept(model(volumes=[f"/srv:{PLACE}"]), IMAGE, Surroundings()) == Kept()


def test_what_the_model_says_itself_stays() -> None:
    """Who had set it up before has the very container as before, and who says one thing gets the rest."""
    before = model(env=OWN, volumes=["own:/c"])
    assert body(before)["Labels"][BODY] == body(before, around=Surroundings())["Labels"][BODY]
    some = variables(body(model(env={"TRITON_CACHE_DIR": "/t"})))
    assert some["TRITON_CACHE_DIR"] == "/t" and some["VLLM_CACHE_ROOT"].startswith(str(PLACE))


@pytest.mark.parametrize("env", [{"XDG_CACHE_HOME": "/x"}, {"TRITON_HOME": "/x"}])
def test_a_variable_that_says_it_for_several_counts(env: dict[str, str]) -> None:
    """Caches that follow it are left where it says."""
    [said] = env
    left = {"XDG_CACHE_HOME": "VLLM_CACHE_ROOT", "TRITON_HOME": "TRITON_CACHE_DIR"}[said]
    assert left not in kept(model(env=env), IMAGE, AROUND).env


@pytest.mark.parametrize(
    ("volume", "left"),
    [
        ("own:/root/.cache/vllm", {"VLLM_CACHE_ROOT"}),
        ("own:/root/.cache/", {"VLLM_CACHE_ROOT"}),
        ("/srv/root:/root", {"VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"}),
        ("own:/root/.cache/huggingface", set()),
    ],
)
def test_where_a_volume_keeps_it_already_it_stays(volume: str, left: set[str]) -> None:
    """What was compiled into a volume at an engine's usual place is not compiled again for our sake."""
    given = kept(model(volumes=[volume]), IMAGE, AROUND)
    assert given.mount == MOUNT
    assert not left & given.env.keys() and "TORCHINDUCTOR_CACHE_DIR" in given.env


def test_a_model_may_mount_its_own_at_our_place() -> None:
    """Docker takes one mount for one place; what can't be written is no place to compile into."""
    own = model(volumes=[f"/srv/compiled:{PLACE}/"])
    made = body(own)
    assert made["HostConfig"]["Binds"] == own.volumes
    assert variables(made)["VLLM_CACHE_ROOT"] == f"{PLACE}/vllm"
    assert kept(model(volumes=[f"/srv/compiled:{PLACE}:ro"]), IMAGE, AROUND) == Kept()


@pytest.mark.parametrize(
    ("user", "root"), [("", True), ("0", True), ("root", True), ("0:0", True), ("root:wheel", True), ("vllm", False)]
)
def test_an_image_that_is_not_root_gets_none(user: str, root: bool) -> None:
    """A new volume is root's, and an engine that can't write to its cache won't start; its own folder is its own."""
    image = Image("sha256:2", (), (), user)
    assert (kept(model(), image, AROUND) == kept(model(), IMAGE, AROUND)) is root
    assert barred(model(), image, AROUND) is not root
    own = model(volumes=[f"/srv/compiled:{PLACE}"])
    assert kept(own, image, AROUND).env == kept(model(), IMAGE, AROUND).env
    assert not barred(own, image, AROUND) and not barred(model(), image, Surroundings())


def test_who_waits_for_a_model_waits_with_the_same_cache() -> None:
    """A standby compiles into what its model will look into, and may take its place."""
    plans, bodies = [], []
    for spec in (model(), model(model="/models/other", args=["--seed", "1"])):
        launch = engine_for("vllm").launch("m", spec, Address("0.0.0.0", 8000), IMAGE.entrypoint)
        plan = engine_for("vllm").standby(spec, launch)
        assert isinstance(plan, StandbyPlan)
        plans.append(plan)
        bodies.append(standby_body(plan, spec, IMAGE, AROUND, port=8000, published=None, gpu=0, owner="me", env={}))
    made = body(model())
    assert plans[0].key == plans[1].key and bodies[0]["Labels"][BODY] == bodies[1]["Labels"][BODY]
    assert bodies[0]["HostConfig"] == made["HostConfig"] and bodies[0]["Env"] == made["Env"]


async def test_an_image_that_is_not_root_is_told_once(tmp_path: Path) -> None:
    """However many models and containers are made from it."""
    async with fake_docker(tmp_path / "docker.sock") as fake:
        fake.images["img"] = {"Id": "sha256:3", "Config": {"Entrypoint": ["vllm", "serve"], "User": "vllm"}}
        docker = config.Docker(host=fake.host)
        async with open_runtime(tmp_path / "state", docker, gpu=0, port_of=lambda _: 8000) as runtime:
            with structlog.testing.capture_logs() as logs:
                for name in ("one", "two"):
                    place = await runtime.allocate(model())
                    launch = engine_for("vllm").launch(name, model(), place.address, place.program)
                    await runtime.create(
                        StartOrder(
                            instance="i", model=name, definition="d", spec=model(), launch=launch, address=place.address
                        )
                    )
        [told] = [entry for entry in logs if entry["log_level"] == "warning"]
        assert f"mount a folder that its user may write at {PLACE}" in told["event"]
        assert (told["image"], told["user"]) == ("img", "vllm")
        assert [each.body["HostConfig"]["Binds"] for each in fake.containers.values()] == [[], []]
