"""Models in containers that somebody else made: are they there, and made as it takes to swap them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

from modelswap.cli.doctor.finding import Finding, fine, note, problem, warning
from modelswap.cli.doctor.images import COMPILED, parallelism
from modelswap.cli.doctor.scene import Scene, ToldElsewhere
from modelswap.engines import options
from modelswap.engines.registry import engine_for
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.docker.body import container_port
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import Model

_LOOPBACK: Final = ("127.", "::1")
_CACHE: Final = PurePosixPath("/root/.cache/huggingface")
_DOCKERS_SHM: Final = 64 << 20
_USUAL_SHARE: Final = 0.92

Inspected = Mapping[str, Any]


async def made_right(scene: Scene) -> list[Finding]:
    """Look at each container."""
    adopted = scene.models("adopted")
    if not adopted:
        raise ToldElsewhere
    around, gpu = await scene.around(), await scene.gpu()
    findings: list[Finding] = []
    for name, model in adopted.items():
        try:
            inspected = await scene.container(name, model)
        except ModelswapError as missing:
            message, _, remedy = str(missing).removeprefix(f"model {name}: ").partition("; ")
            findings.append(problem(f"{name}: {message}", remedy or "see `docker ps -a`"))
            continue
        findings += of_container(name, model, inspected, around, gpu.reading.total if gpu.reading else None)
    return findings


def of_container(
    name: str, model: Model, inspected: Inspected, around: Surroundings, total: int | None = None
) -> list[Finding]:
    """Judge one container; ``total`` is the device's memory in bytes."""
    state = inspected.get("State", {}).get("Status", "?")
    called = str(inspected.get("Name", "")).lstrip("/")
    return [
        fine(f"{name}: the container {called} is there ({state})"),
        *_restarts(name, inspected),
        *_port(name, model, inspected, around),
        *_open(name, inspected),
        *_gpu(name, model, inspected),
        *_options(name, model, command(inspected), total),
        *_kept(name, model, inspected, around),
        *_shared_memory(name, model, inspected),
    ]


def command(inspected: Inspected) -> list[str]:
    """Return the words that the container's process is started with; a shell's line is taken apart."""
    config = inspected.get("Config", {})
    words = [*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ())]
    taken: list[str] = []
    for word in words:
        try:
            taken += shlex.split(word) if " " in word else [word]
        except ValueError:
            taken.append(word)
    return taken


def weights_of(inspected: Inspected) -> str | None:
    """Return which weights a vLLM container is started with; None where its command doesn't say."""
    words = command(inspected)
    return options.value(words, "--model") or _positional(words)


def cache_of(inspected: Inspected) -> tuple[PurePosixPath, str | None]:
    """Return where in a container the Hugging Face cache is, and what is mounted there (None: nothing)."""
    place = PurePosixPath(_env(inspected).get("HF_HOME") or str(_CACHE))
    return place, _mounted(inspected, place)


def _env(inspected: Inspected) -> dict[str, str]:
    pairs = (str(each).partition("=") for each in inspected.get("Config", {}).get("Env") or ())
    return {name: value for name, _, value in pairs}


def _mounted(inspected: Inspected, place: PurePosixPath) -> str | None:
    """Return the volume's name, or the folder, that is mounted at ``place`` or above it."""
    around = [
        (str(each.get("Destination", "")), str(each.get("Name") or each.get("Source") or ""))
        for each in inspected.get("Mounts") or ()
        if place.is_relative_to(str(each.get("Destination", "")))
    ]
    return max(around, key=lambda mount: len(mount[0]))[1] if around else None


def _restarts(name: str, inspected: Inspected) -> Iterator[Finding]:
    policy = (inspected.get("HostConfig", {}).get("RestartPolicy") or {}).get("Name") or "no"
    if policy != "no":
        message = f"{name}: Docker restarts its container by itself ({policy}), also while another model has the GPU"
        yield warning(message, 'modelswap sets it to "no"; say restart: "no" in the compose file, so that it stays')


def _port(name: str, model: Model, inspected: Inspected, around: Surroundings) -> Iterator[Finding]:
    config = inspected.get("Config", {})
    exposed = sorted(
        int(number)
        for number, _, kind in (port.partition("/") for port in config.get("ExposedPorts") or {})
        if number.isdigit() and kind in ("", "tcp")
    )
    port = container_port(model, exposed, engine_for(model.engine).port())
    if model.port is None and not exposed and model.engine == "custom":
        yield warning(f"{name}: nobody says where it listens; port {port} is a guess", f"say models.{name}.port")
    told = options.whole(options.value(command(inspected), "--port", "-p"))
    if told is not None and told != port:
        message = f"{name}: its command listens at port {told}, and modelswap would ask at {port}"
        yield problem(message, f"say models.{name}.port: {told}")
    yield from _reached(name, inspected, around, port)


def _reached(name: str, inspected: Inspected, around: Surroundings, port: int) -> Iterator[Finding]:
    host = inspected.get("HostConfig", {})
    if host.get("NetworkMode") == "host":
        if around.container:
            message = f"{name}: it is on the host's network, which can't be reached from our container"
            yield problem(message, "take network_mode: host away from it in the compose file")
        return
    networks = inspected.get("NetworkSettings", {}).get("Networks") or {}
    ids = {str(endpoint.get("NetworkID")) for endpoint in networks.values()}
    if any(network and network in {*networks, *ids} for network in (around.network, *around.networks)):
        return
    if around.container:
        message = f"{name}: it is on {', '.join(networks) or 'no network'}, where it can't be reached from ours"
        yield problem(message, f"put it on {around.network or 'a network of ours'}, or name another in docker.network")
    elif not (host.get("PortBindings") or {}).get(f"{port}/tcp"):
        message = f"{name}: its port {port} isn't published on this machine, so it can't be reached"
        yield problem(message, f'say ports: ["127.0.0.1::{port}"] in its compose file, and create it anew')


def _open(name: str, inspected: Inspected) -> Iterator[Finding]:
    bindings = inspected.get("HostConfig", {}).get("PortBindings") or {}
    for port, published in sorted(bindings.items()):
        places = [str(binding.get("HostIp") or "0.0.0.0") for binding in published or ()]
        everywhere = [place for place in places if not place.startswith(_LOOPBACK)]
        if everywhere:
            message = f"{name}: its port {port} is published on {everywhere[0]}: the network can use it past modelswap"
            number = port.partition("/")[0]
            yield warning(message, f'say ports: ["127.0.0.1::{number}"], or none, in its compose file')


def _gpu(name: str, model: Model, inspected: Inspected) -> Iterator[Finding]:
    host = inspected.get("HostConfig", {})
    given = host.get("DeviceRequests") or host.get("Devices") or host.get("Runtime") == "nvidia"
    if model.device == "gpu" and not given and not host.get("Privileged"):
        message = f"{name}: its container was given no GPU"
        yield warning(
            message, "give it one in the compose file (deploy.resources.reservations.devices), or device: none"
        )


def _options(name: str, model: Model, words: Sequence[str], total: int | None) -> Iterator[Finding]:
    if model.engine != "vllm":
        return
    slots = options.whole(options.value(words, "--max-num-seqs"))
    if slots is not None and model.concurrency is None and slots != engine_for("vllm").slots(model):
        message = f"{name}: it runs {slots} requests at once (--max-num-seqs), which modelswap doesn't know"
        yield note(message, f"say models.{name}.concurrency: {slots}")
    if model.memory is None and model.device == "gpu":
        share = options.share(options.value(words, "--gpu-memory-utilization")) or _USUAL_SHARE
        size = f"{share * total / (1 << 30):.0f}GiB" if total else f"{share:g} of the GPU's, e.g. 20GiB"
        message = f"{name}: it takes {share:.0%} of the GPU's memory, which modelswap doesn't know"
        yield note(message, f"say models.{name}.memory: {size}")
    served = options.value(words, "--served-model-name") or options.value(words, "--model") or _positional(words)
    if served is not None and served not in (model.model or name, *_names(words)):
        yield problem(f"{name}: it serves its model as {served}", f"say models.{name}.model: {served}")


def _positional(words: Sequence[str]) -> str | None:
    after = list(words[words.index("serve") + 1 :]) if "serve" in words else []
    return after[0] if after and not after[0].startswith("-") else None


def _names(words: Sequence[str]) -> list[str]:
    """Return all of ``--served-model-name``, which takes several."""
    names: list[str] = []
    for index, word in enumerate(words):
        if word.replace("_", "-") == "--served-model-name":
            for each in words[index + 1 :]:
                if each.startswith("-"):
                    break
                names.append(each)
    return names


def _kept(name: str, model: Model, inspected: Inspected, around: Surroundings) -> Iterator[Finding]:
    if model.engine != "vllm":
        return
    hub, source = cache_of(inspected)
    weights = weights_of(inspected) or ""
    if source is None and not weights.startswith("/"):
        message = f"{name}: its weights are downloaded again whenever its container is made anew ({hub} is not mounted)"
        yield warning(message, f"mount the Hugging Face cache at {hub} in its compose file")
    elif source is not None and around.hf_cache and source != around.hf_cache:
        message = f"{name}: its Hugging Face cache ({source}) is another than modelswap's ({around.hf_cache})"
        yield note(message, f"say docker.hf_cache: {source}, so that weights are fetched to where it looks")
    compiled = PurePosixPath(_env(inspected).get("VLLM_CACHE_ROOT") or str(COMPILED))
    eager = options.given(command(inspected), "--enforce-eager")
    if not eager and _mounted(inspected, compiled) is None:
        message = f"{name}: what vLLM compiles (minutes of a first start) is lost whenever its container is made anew"
        yield note(message, f"keep it in a volume mounted at {compiled}")


def _shared_memory(name: str, model: Model, inspected: Inspected) -> Iterator[Finding]:
    host = inspected.get("HostConfig", {})
    parallel = parallelism(command(inspected))
    little = int(host.get("ShmSize") or _DOCKERS_SHM) <= _DOCKERS_SHM and host.get("IpcMode") != "host"
    if model.engine == "vllm" and parallel > 1 and little:
        message = f"{name}: {parallel} workers share 64 MiB of memory, Docker's default; NCCL wants more"
        yield problem(message, "say ipc: host, or shm_size: 8gb, in its compose file")
