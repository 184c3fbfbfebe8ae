"""The doctor on the GPU, weights, disks and host memory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modelswap.cli.doctor import disk, gpu, outside, weights
from modelswap.cli.doctor.finding import Finding, Level
from modelswap.cli.doctor.gpu import Rights
from modelswap.cli.doctor.scene import Gpu, ToldElsewhere
from modelswap.devices.amdcards import Nodes
from modelswap.devices.amdgpu import AmdGpuDevice
from modelswap.devices.base import Holder
from modelswap.devices.nvml import NvmlDevice
from modelswap.runtimes.docker.images import Image
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.testing.fake_amdgpu import FakeAmdMachine
from modelswap.testing.fake_nvml import FakeNvml
from modelswap.weights.repo import Repo
from tests.cli.doctoring import GIB, WHOLE, FakeDocker, cached, config, gpu_of, levels, scene

OK, NOTE, WARNING, PROBLEM = Level.OK, Level.NOTE, Level.WARNING, Level.PROBLEM
VLLM = "a: {model: org/m, program: [vllm], args: [--gpu-memory-utilization, 0.5]}"
OURS, THEIRS = "a" * 64, "b" * 64


# GPU


@pytest.mark.parametrize(
    ("found", "device", "levels_"),
    [
        (gpu_of(free=20), "{}", [OK]),
        (Gpu("slot", "slot", None, None), "{kind: slot}", [OK]),
        (Gpu("slot", "slot", None, "no driver"), "{}", [WARNING]),
        (Gpu("nvml", "nvml", None, "there is no GPU 3"), "{kind: nvml, index: 3}", [PROBLEM]),
        (Gpu("L4", "nvml", None, "fallen off the bus"), "{}", [PROBLEM]),
    ],
)
def test_the_device_can_be_read_or_not(found: Gpu, device: str, levels_: list[Level]) -> None:
    """A slot is right where it was asked for; a GPU that was asked for must be there."""
    loaded = config(f"{VLLM}}}\ndevice: {device}\nscheduling: {{linger: 2")
    told = gpu.of_device(found, loaded)
    assert levels(told) == levels_
    assert found.why is None or found.why in told[0].message


def test_no_gpu_is_no_news_where_no_model_wants_one() -> None:
    """Models beside the device need none."""
    loaded = config("a: {engine: custom, command: [x], device: none}")
    assert levels(gpu.of_device(Gpu("slot", "slot", None, "no driver"), loaded)) == [NOTE]


def radeon(*files: str) -> Gpu:
    """Return an AMD GPU that is used by these device files."""
    return Gpu("Radeon", "amdgpu", gpu_of(free=20).reading, amd=(Nodes(files),), own=files)


@pytest.mark.parametrize(
    ("rights", "expected", "words"),
    [
        ((Rights(True, True, "render"), Rights(True, True, "video")), [], ""),
        ((Rights(True, False, "render"), Rights(True, False, "video")), [PROBLEM], "usermod -aG render,video $USER"),
        ((Rights(True, False, "render"), Rights(True, True, "video")), [PROBLEM], "usermod -aG render $USER"),
        ((Rights(False), Rights(False)), [WARNING, WARNING], "devices: [/dev/kfd, /dev/dri]"),
    ],
)
def test_who_may_use_an_amd_gpu(rights: tuple[Rights, Rights], expected: list[Level], words: str) -> None:
    """Engines that are our processes need its device files: missing groups are named, and missing files."""
    files = ("/dev/kfd", "/dev/dri/renderD128")
    found = gpu.of_rights(radeon(*files), config(VLLM), dict(zip(files, rights, strict=True)).__getitem__)
    assert levels(found) == expected
    assert all(words in str(each.remedy) for each in found)


def test_rights_are_looked_at_where_they_matter(tmp_path: Path) -> None:
    """Not for other GPUs, nor for models in containers; without ROCm's file that is what there is to say."""
    file = tmp_path / "renderD128"
    file.touch()
    assert gpu.of_rights(gpu_of(free=1), config(VLLM)) == []
    assert gpu.of_rights(radeon("/dev/none"), config("a: {image: i, model: m}")) == []
    (found,) = gpu.of_rights(radeon(str(file)), config(VLLM))
    assert found.level is NOTE and "Vulkan only" in found.message
    assert levels(gpu.of_rights(radeon(str(tmp_path / "none")), config(VLLM))) == [NOTE, WARNING]


def test_engines_that_could_use_another_gpu_are_named() -> None:
    """The watched one isn't theirs by itself; a container's GPUs, one that is named and several at once are settled."""
    two = replace(gpu_of(free=20), uuid="GPU-1", count=2)
    elsewhere = "c: {engine: custom, command: [x], env: {CUDA_VISIBLE_DEVICES: '1'}}"
    settled = f"b: {{image: i, model: m}}, {elsewhere}, d: {{engine: custom, command: [x], device: none}}"
    several = "e: {model: m, program: [vllm], args: [-tp, 2]}"
    loaded = config(f"{VLLM}, {settled}, {several}")
    (found,) = gpu.of_others(two, loaded, {})
    assert found.level is WARNING and "keeps a off" in found.message
    assert "CUDA_VISIBLE_DEVICES: GPU-1" in str(found.remedy)
    assert gpu.of_others(two, loaded, {"CUDA_VISIBLE_DEVICES": "1"}) == []
    assert gpu.of_others(two, config(settled), {}) == []
    assert gpu.of_others(gpu_of(free=20), loaded, {}) == []


async def test_an_nvidia_gpu_is_looked_at_with_its_name_to_cuda() -> None:
    """And with how many there are."""
    device = NvmlDevice.open(1, FakeNvml(gpus=2))
    found = await outside._read(device)
    await device.aclose()
    assert (found.uuid, found.count) == ("GPU-1", 2)


async def test_an_amd_gpu_is_looked_at_with_its_files(tmp_path: Path) -> None:
    """What other checks need to know of it comes with its reading."""
    machine = FakeAmdMachine(tmp_path / "root")
    machine.add_card("0000:03:00.0", number=0)
    machine.add_card("0000:04:00.0", number=1)
    device = AmdGpuDevice.open(1, machine.root)
    found = await outside._read(device)
    await device.aclose()
    assert (found.kind, found.own, len(found.amd)) == ("amdgpu", ("/dev/dri/renderD129",), 2)
    assert gpu.of_device(found, config(VLLM))[0].message == "AMD GPU 1002:744c: 24.0 GiB of 24.0 GiB free"


def share(size: float | None, *, ours: bool) -> gpu.Share:
    """Return a holder of ``size`` GiB."""
    held = None if size is None else int(size * GIB)
    return gpu.Share(Holder(5, "python3", held), ours, "python3 (pid 5)")


@pytest.mark.parametrize(
    ("free", "shares", "expected"),
    [
        (24, [], [OK]),
        (11, [share(12, ours=True)], [OK]),
        (2, [share(None, ours=True)], [OK]),
        (11, [share(12, ours=False)], [PROBLEM, NOTE]),
        (11, [share(None, ours=False)], [PROBLEM, NOTE]),
        (20, [share(0.1, ours=False)], [OK]),
        (20, [share(3, ours=False)], [OK, NOTE]),
        (11, [], [PROBLEM]),
    ],
)
def test_room_on_the_device(free: float, shares: list[gpu.Share], expected: list[Level]) -> None:
    """What our own models hold counts as free, since they are put out; what others hold doesn't."""
    found = gpu.of_room(config(VLLM), gpu_of(free=free), shares)
    assert levels(found) == expected
    if expected == [PROBLEM, NOTE]:
        assert "it wants 12.0 GiB, and at most 11.0 GiB can be free: python3 (pid 5) holds the rest" in found[0].message
        assert "--gpu-memory-utilization" in str(found[0].remedy)


def test_sglang_takes_a_share_of_the_device_by_its_own_option() -> None:
    """The remedy names it."""
    models = "a: {engine: sglang, model: org/m, args: [--mem-fraction-static, 0.5], program: [x]}"
    (found,) = gpu.of_room(config(models), gpu_of(free=11), [])
    assert found.level is PROBLEM and "--mem-fraction-static" in str(found.remedy)


def test_models_that_can_never_fit_or_dont_say() -> None:
    """More than the device has is a problem; what isn't known is worth a word; the CPU's models are left out."""
    models = (
        "a: {engine: custom, command: [x], memory: 80GiB}, b: {engine: custom, command: [x]}, c: {container: llm},"
        " d: {engine: custom, command: [x], device: none}, e: {container: other, memory: 22GiB}"
    )
    found = gpu.of_room(config(models), gpu_of(free=21), [])
    assert levels(found) == [PROBLEM, PROBLEM, NOTE]
    assert "it wants 80.0 GiB of device memory, and NVIDIA L4 has 24.0 GiB" in found[0].message
    assert found[1].remedy == "end what else uses the GPU, or lower models.e.memory"
    assert found[2].message.endswith(": b, c")


@pytest.mark.parametrize(
    ("cgroup", "environ", "ours", "what"),
    [
        ("", b"A=1\0MODELSWAP_INSTANCE=x\0", True, "python3 (pid 7)"),
        ("", b"MODELSWAP_MODEL=x\0", False, "python3 (pid 7)"),
        (f"0::/system.slice/docker-{OURS}.scope\n", b"", True, "python3 (pid 7, container coder)"),
        (f"1:cpu:/docker/{THEIRS}\n", b"", False, f"python3 (pid 7, container {THEIRS[:12]})"),
    ],
)
def test_whose_a_holder_is(cgroup: str, environ: bytes, ours: bool, what: str) -> None:
    """By the id in its environment, or by its container."""
    found = gpu.share_of(Holder(7, "python3"), {OURS}, {OURS: "coder"}, lambda _: (cgroup, environ))
    assert (found.ours, found.what) == (ours, what)


def test_a_holder_of_this_machine_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment and its container come from /proc; one that has ended is a stranger."""
    mine = gpu.share_of(Holder(os.getpid(), "pytest"), set(), {})
    assert not mine.ours and f"pid {os.getpid()}" in mine.what
    assert not gpu.share_of(Holder(2**22 + 1, "gone"), set(), {}).ours


async def test_fitting_is_looked_at_with_docker_or_without() -> None:
    """Containers of ours are known where Docker is asked anyway; a device without memory has no room to judge."""
    here = gpu_of(free=11, holders=(Holder(2**22 + 1, "?", 12 * GIB),))
    found = await gpu.fits(scene(VLLM, gpu=here))
    assert levels(found) == [PROBLEM, NOTE]
    found = await gpu.fits(scene(VLLM + ", b: {container: c1, memory: 1GiB}", gpu=here, docker=FakeDocker(made={OURS})))
    assert levels(found) == [OK, PROBLEM, NOTE]
    with pytest.raises(ToldElsewhere):
        await gpu.fits(scene(VLLM, gpu=Gpu("slot", "slot", None)))


# Weights


async def test_weights_that_are_here(tmp_path: Path) -> None:
    """All, in part, not at all: with the size of what is here, and how to fetch the rest."""
    hub = tmp_path / "hf" / "hub"
    cached(hub, "org/whole", WHOLE)
    cached(hub, "org/part", WHOLE)
    (hub / "models--org--part" / "blobs" / "1").unlink()
    (hub / "models--org--part" / "blobs" / "1.incomplete").write_bytes(b"w" * 4096)
    models = ", ".join(f"{name}: {{model: org/{name}, program: [vllm]}}" for name in ("whole", "part", "none"))
    found = await weights.here(scene(models, env={"HF_HOME": str(tmp_path / "hf")}))
    assert levels(found) == [OK, NOTE, NOTE]
    assert "whole: org/whole is downloaded (8.0 KiB)" in found[0].message
    assert "part: org/part is only in part (" in found[1].message
    assert found[2].message == "none: org/none is not downloaded yet"
    assert found[2].remedy is not None and "modelswap pull none (if its licence" in found[2].remedy


async def test_a_token_needs_no_hint(tmp_path: Path) -> None:
    """Whoever has one, or gives the model one, isn't told to."""
    env = {"HF_HOME": str(tmp_path), "HF_TOKEN": "t"}
    (found,) = await weights.here(scene(VLLM, env=env))
    assert found.remedy == "fetch it ahead of time: modelswap pull a"
    given = VLLM.replace("args:", "env: {HF_TOKEN: t}, args:")
    (found,) = await weights.here(scene(given, env={"HF_HOME": str(tmp_path)}))
    assert found.remedy == "fetch it ahead of time: modelswap pull a"


async def test_weights_of_containers(tmp_path: Path) -> None:
    """They are looked for in the folder that is mounted; a volume can't be looked into from the host."""
    cached(tmp_path / "hub", "org/m", WHOLE)
    models = "a: {image: i, model: org/m}"
    docker = FakeDocker(surroundings=Surroundings(hf_cache=str(tmp_path)))
    assert levels(await weights.here(scene(models, docker=docker))) == [OK]
    docker = FakeDocker(surroundings=Surroundings(hf_cache="hf-volume"))
    (found,) = await weights.here(scene(models, docker=docker))
    assert found.level is NOTE and "can't be seen from here" in found.message
    inside = Surroundings(container="c", network="n", hf_cache="hf-volume")
    env = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": "/where/no/container/looks"}
    assert levels(await weights.here(scene(models, docker=FakeDocker(surroundings=inside), env=env))) == [OK]
    own = f"a: {{engine: sglang, image: i, model: org/m, volumes: ['{tmp_path}:/root/.cache/huggingface']}}"
    assert levels(await weights.here(scene(own, docker=FakeDocker(surroundings=Surroundings(hf_cache="/x"))))) == [OK]
    (found,) = await weights.here(scene(own, docker=FakeDocker(surroundings=inside), env=env))
    assert "can't be seen from here" in found.message


async def test_weights_of_somebody_elses_container(tmp_path: Path) -> None:
    """Its command says what it loads, its mounts where from; without a mount there is nothing to look for."""
    cached(tmp_path / "hub", "org/m", WHOLE)

    def container(source: str, cmd: list[str]) -> dict[str, Any]:
        mounts = [{"Type": "bind", "Source": source, "Destination": "/root/.cache/huggingface"}] if source else []
        return {"Config": {"Entrypoint": ["vllm", "serve"], "Cmd": cmd, "Env": []}, "Mounts": mounts}

    models = "a: {container: c1, model: served-name}"
    command = ["org/m", "--served-model-name", "served-name"]
    docker = FakeDocker(containers={"a": container(str(tmp_path), command)})
    (found,) = await weights.here(scene(models, docker=docker))
    assert found.level is OK and "a: org/m is downloaded" in found.message
    for other in (FakeDocker(containers={"a": container("", command)}), FakeDocker()):
        with pytest.raises(ToldElsewhere):
            await weights.here(scene(models, docker=other))
    inside = Surroundings(container="c", network="n", hf_cache=str(tmp_path))
    docker = FakeDocker(containers={"a": container(str(tmp_path), command)}, surroundings=inside)
    assert levels(await weights.here(scene(models, docker=docker, env={"HF_HOME": str(tmp_path)}))) == [OK]


@pytest.mark.parametrize(
    ("repo", "billions"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.3", 14),
        ("Qwen/Qwen2.5-0.5B", 1),
        ("Qwen/Qwen2.5-14B-Instruct-AWQ", 8.4),
        ("org/mixtral-8x7b-fp8", 56),
        ("microsoft/phi-4", None),
        ("org/b2b-model", None),
    ],
)
def test_sizes_are_guessed_from_names(repo: str, billions: float | None) -> None:
    """Parameters times what one takes; a name that doesn't say gives no guess."""
    assert weights.guess(repo) == (None if billions is None else pytest.approx(billions * 1e9))


async def test_cache_folders_must_be_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads and compiled code go there; what doesn't exist yet can be made."""
    env = {"HF_HOME": str(tmp_path / "hf"), "VLLM_CACHE_ROOT": str(tmp_path / "v"), "XDG_CACHE_HOME": str(tmp_path)}
    models = f"{VLLM}, b: {{engine: openvino, model: /x}}"
    found = await weights.caches(scene(models, env=env))
    assert levels(found) == [OK, OK, OK]
    assert [finding.message.split()[3] for finding in found] == [
        str(tmp_path / "hf" / "hub"),
        str(tmp_path / "v"),
        str(tmp_path / "modelswap"),
    ]
    monkeypatch.setattr("os.access", lambda *_: False)
    found = await weights.caches(scene(models, env=env))
    assert levels(found) == [WARNING] * 3 and "(a)" in found[0].message
    assert found[0].remedy is not None and found[0].remedy.startswith(f"sudo install -d -o $USER {tmp_path}/hf/hub,")
    (tmp_path / "hf" / "hub").mkdir(parents=True)
    found = await weights.caches(scene(models, env=env))
    assert found[0].remedy is not None and found[0].remedy.startswith(f"sudo chown -R $USER {tmp_path}/hf/hub,")
    with pytest.raises(ToldElsewhere):
        await weights.caches(scene())


async def test_what_an_engine_has_kept_as_root_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache can be written, and one of its repositories can't."""
    hub = tmp_path / "hub"
    for repo in ("org/m", "org/n"):
        cached(hub, repo, WHOLE)
    closed, access = hub / "models--org--m" / "blobs", os.access
    monkeypatch.setattr("os.access", lambda path, mode: path != closed and access(path, mode))
    models = "a: {model: org/m, program: [v], env: {VLLM_CACHE_ROOT: /}}, b: {model: org/n, program: [v]}"
    found = await weights.caches(scene(models, env={"HF_HOME": str(tmp_path), "VLLM_CACHE_ROOT": "/"}))
    assert levels(found) == [OK, WARNING, OK]
    assert f"{closed} can't be written by this user (a)" in found[1].message


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    """It is named, so that it can be moved."""
    (tmp_path / "hf").write_text("")
    found = weights.of_folder(tmp_path / "hf" / "hub", ["a"])
    assert found.level is PROBLEM and str(tmp_path / "hf") in found.message


# Room


@pytest.mark.parametrize(
    ("free", "needed", "level", "words"),
    [
        (100 * GIB, 0, OK, "100.0 GiB of 200.0 GiB free for weights"),
        (100 * GIB, 30 * GIB, OK, "(about 30.0 GiB still to come)"),
        (20 * GIB, 30 * GIB, WARNING, "and about 30.0 GiB are still to come"),
        (1 * GIB, 0, WARNING, "little room"),
        (1 << 20, 30 * GIB, PROBLEM, "the disk is full"),
    ],
)
def test_room_on_a_disk(free: int, needed: int, level: Level, words: str) -> None:
    """What is still to come must fit, and a little must be left."""
    found = disk.of_disk(disk.Disk(200 * GIB, free, ["weights"], needed))
    assert found.level is level and words in found.message


async def test_what_is_still_to_come_is_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing weights by their names, missing images by their kinds, each once, on the disk where they go."""
    seen: list[disk.Disk] = []

    def keep(found: disk.Disk) -> Finding:
        seen.append(found)
        return Finding(OK, "")

    monkeypatch.setattr(disk, "of_disk", keep)
    cached(tmp_path / "hf" / "hub", "org/here-70b", WHOLE)
    models = (
        "a: {model: org/m-7b, program: [v]}, b: {model: org/here-70b, program: [v]}, c: {image: i, model: org/x},"
        " d: {image: i, model: org/y}, e: {image: here, model: org/z}, f: {engine: custom, image: j},"
        " g: {engine: custom, image: k, pull: never}, h: {engine: sglang, image: l, model: /m}"
    )
    docker = FakeDocker(images={"here": Image("1", (), ())}, told={"DockerRootDir": str(tmp_path / "docker")})
    env = {"HF_HOME": str(tmp_path / "hf"), "XDG_STATE_HOME": str(tmp_path)}
    await disk.room(scene(models, docker=docker, env=env))
    (only,) = seen
    assert only.needed == 14 * 10**9 + (30 + 10 + 30) * GIB
    assert only.uses == [
        f"state and logs ({tmp_path / 'modelswap'})",
        f"weights ({tmp_path / 'hf' / 'hub'})",
        f"images ({tmp_path / 'docker'})",
    ]


async def test_the_folder_for_what_engines_compile_is_named(tmp_path: Path) -> None:
    """Where it is a folder of this machine; a volume is Docker's to keep."""
    told = {"DockerRootDir": str(tmp_path / "docker")}
    for kept, named in ((str(tmp_path / "compiled"), True), ("volume", False)):
        docker = FakeDocker(surroundings=Surroundings(compile_cache=kept), told=told)
        found = await disk.room(scene("a: {image: i, model: /m}", docker=docker, env={"XDG_STATE_HOME": str(tmp_path)}))
        assert any(f"what engines compile ({kept})" in each.message for each in found) is named


async def test_dockers_disk_is_not_seen_from_a_container(tmp_path: Path) -> None:
    """Its folder there would be another one of the same name."""
    docker = FakeDocker(surroundings=Surroundings(container="c", network="n"), told={"DockerRootDir": str(tmp_path)})
    found = await disk.room(scene("a: {image: i, model: /m}", docker=docker, env={"XDG_STATE_HOME": str(tmp_path)}))
    assert "images" not in found[0].message


@pytest.mark.parametrize(("available", "level"), [(30, OK), (1, WARNING)], ids=["fine", "low"])
def test_host_memory(available: int, level: Level) -> None:
    """Little of it kills engines while they start."""
    assert disk.of_memory(64 * GIB, available * GIB).level is level


async def test_host_memory_of_this_machine() -> None:
    """It is read."""
    (found,) = await disk.memory(scene(VLLM))
    assert "host memory available" in found.message


async def test_what_a_download_of_unknown_size_may_take(tmp_path: Path) -> None:
    """A name that says nothing counts as ten gigabytes, a tokenizer alone as nothing, a cache we can't see neither."""
    loads = Repo(repo="org/m", weights=("*.safetensors",))
    assert await disk.still_to_come(weights.Wanted("a", loads, tmp_path)) == 10 * GIB
    assert await disk.still_to_come(weights.Wanted("a", Repo(repo="org/m"), tmp_path)) == 0
    assert await disk.still_to_come(weights.Wanted("a", loads, None)) == 0
