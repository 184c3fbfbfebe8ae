"""Models in containers that somebody else made: are they there, and made as it takes to swap them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

from modelswap.cli.doctor.finding import Finding, fine, note, problem, warning
from modelswap.cli.doctor.scene import Scene, ToldElsewhere
from modelswap.engines import options
from modelswap.engines.registry import FROM_HUB, engine_for
from modelswap.protocol.errors import ModelswapError
from modelswap.runtimes.docker import sharing
from modelswap.runtimes.docker.body import container_port
from modelswap.runtimes.docker.inspected import command_of
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.spec.config import Model

_LOOPBACK: Final = ("127.", "::1")
_DOCKERS_SHM: Final = 64 << 20
_WHOLE: Final = 1 << 40

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
        *_options(name, model, command_of(inspected), total),
        *_kept(name, model, inspected, around),
        *_shared_memory(name, model, inspected),
    ]


def weights_of(inspected: Inspected) -> str | None:
    """Return which weights a vLLM or SGLang container is started with; None where its command doesn't say."""
    words = command_of(inspected)
    return options.value(words, "--model", "--model-path") or _positional(words)


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
    told = options.whole(options.value(command_of(inspected), "--port", "-p"))
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
            message,
            "give it one in the compose file (deploy.resources.reservations.devices; for AMD devices: [/dev/kfd, "
            "/dev/dri]), or device: none",
        )


def _options(name: str, model: Model, words: Sequence[str], total: int | None) -> Iterator[Finding]:
    if model.engine not in FROM_HUB:
        return
    engine = engine_for(model.engine)
    # As if it were ours: then the engine reads its options, or knows what is usual.
    told = model.model_copy(update={"container": None, "compose_service": None, "args": list(words)})
    slots = engine.slots(told)
    if slots != engine.slots(model):
        message = f"{name}: it runs {slots} requests at once, as its command says, and modelswap doesn't know"
        yield note(message, f"say models.{name}.concurrency: {slots}")
    if model.memory is None and model.device == "gpu":
        share = (engine.device_bytes(told, _WHOLE) or 0) / _WHOLE
        size = f"{share * total / (1 << 30):.0f}GiB" if total else f"{share:g} of the GPU's, e.g. 20GiB"
        message = f"{name}: it takes {share:.0%} of the GPU's memory, which modelswap doesn't know"
        yield note(message, f"say models.{name}.memory: {size}")
    served = options.value(words, "--served-model-name", "--model", "--model-path") or _positional(words)
    # SGLang minds no name that it is called by.
    wanted = model.model or (name if model.engine == "vllm" else None)
    if served is not None and wanted is not None and wanted not in (served, *_names(words)):
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
    if model.engine not in FROM_HUB:
        return
    hub = sharing.hub_of(inspected)
    source = sharing.behind(inspected, hub) if hub is not None else None
    weights = weights_of(inspected) or ""
    if hub is not None and source is None and not weights.startswith("/"):
        message = f"{name}: its weights are downloaded again whenever its container is made anew ({hub} is not mounted)"
        yield warning(message, f"mount the Hugging Face cache at {_home(hub)} in its compose file")
    elif source is not None and around.hf_cache and not sharing.shares_cache(inspected, around.hf_cache):
        message = f"{name}: its Hugging Face cache ({_home(source)}) is another than modelswap's ({around.hf_cache})"
        yield note(message, _one_cache(source, around))
    caches = sharing.caches_of(inspected)
    told = sharing.environment(inspected).get("VLLM_CACHE_ROOT")
    compiled = PurePosixPath(told) if told else caches / "vllm" if caches is not None else None
    if model.engine != "vllm" or compiled is None or options.given(command_of(inspected), "--enforce-eager"):
        return
    if sharing.behind(inspected, compiled) is None:
        message = f"{name}: what vLLM compiles (minutes of a first start) is lost whenever its container is made anew"
        yield note(message, f"keep it in a volume mounted at {compiled}")


def _home(hub: PurePosixPath) -> PurePosixPath:
    return hub.parent if hub.name == "hub" else hub


def _one_cache(source: PurePosixPath, around: Surroundings) -> str:
    """Return how both come to look into one cache: what can be mounted as a whole can be ours, too."""
    home = source.parent
    if source.name == "hub" and (home.is_absolute() or len(home.parts) == 1):
        return f"say docker.hf_cache: {home}, so that weights are fetched to where it looks"
    return f"mount {around.hf_cache} as its HF_HOME in its compose file, so that weights are fetched to where it looks"


def _shared_memory(name: str, model: Model, inspected: Inspected) -> Iterator[Finding]:
    host = inspected.get("HostConfig", {})
    parallel = options.parallelism(command_of(inspected))
    little = int(host.get("ShmSize") or _DOCKERS_SHM) <= _DOCKERS_SHM and host.get("IpcMode") != "host"
    if model.engine in FROM_HUB and parallel > 1 and little:
        message = f"{name}: {parallel} workers share 64 MiB of memory, Docker's default; NCCL wants more"
        yield problem(message, "say ipc: host, or shm_size: 8gb, in its compose file")
