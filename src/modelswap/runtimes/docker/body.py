"""A managed container as the Docker Engine API wants it described; pure.

Bodies hold secrets (API keys, tokens): never log one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

import msgspec

from modelswap.devices.amdcards import Nodes
from modelswap.engines.base import Address, Launch, StandbyPlan
from modelswap.engines.registry import FROM_HUB
from modelswap.runtimes.base import StartOrder
from modelswap.runtimes.docker import gpus
from modelswap.runtimes.docker.compiled import kept
from modelswap.runtimes.docker.images import Image
from modelswap.runtimes.docker.surroundings import Surroundings
from modelswap.runtimes.logfiles import safe_name
from modelswap.spec.config import Model

MODEL: Final = "io.modelswap.model"
OWNER: Final = "io.modelswap.owner"
DEFINITION: Final = "io.modelswap.definition"
BODY: Final = "io.modelswap.body"
IMAGE: Final = "io.modelswap.image"
"""The labels of a managed container; ``IMAGE`` is the image's id, so that a tag that has moved is noticed."""
STANDBY: Final = "io.modelswap.standby"
"""The label of a container that is made to wait; its value is the plan's key."""
STANDBY_SCRIPT: Final = "/modelswap_standby.py"
STANDBY_SOCKET: Final = "/tmp/modelswap-standby.sock"  # noqa: S108 - in a container of its own

_UNCOUNTED: Final = frozenset({OWNER, DEFINITION, BODY})
_LOOPBACK: Final = "127.0.0.1"
_HF_HOME: Final = "/root/.cache/huggingface"
_HF_PLACES: Final = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
_HF_PASSED: Final = ("HF_TOKEN", "HF_ENDPOINT")
# vLLM's workers talk through shared memory, for which Docker's 64 MiB are too few. Pages that aren't used cost nothing.
_VLLM_SHM_BYTES: Final = 8 << 30
_NOT_OURS: Final = ("host", "none", "container:")


def container_name(model: str) -> str:
    """Return the name of a model's managed container, different for different models."""
    return f"modelswap-{safe_name(model)}"


def container_port(spec: Model, exposed: Sequence[int], usual: int) -> int:
    """Return the port an engine listens at in its container: what the config says, else what is exposed, else usual.

    Of several exposed ones the ``usual`` is taken if it is among them, else the lowest.
    """
    if spec.port is not None:
        return spec.port
    return usual if usual in exposed or not exposed else min(exposed)


def create_body(
    order: StartOrder,
    image: Image,
    around: Surroundings,
    *,
    port: int,
    published: int | None,
    gpu: int,
    owner: str,
    amd: Sequence[Nodes] = (),
    env: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Return what ``POST /containers/create`` is told.

    ``port`` is where the engine listens in the container, ``published`` the loopback port of Docker's host that leads
    there (None: none does). ``gpu`` is the index of the config's device; ``amd`` are all AMD GPUs if it is one.
    ``owner`` is our state folder's id. ``env`` is our own environment, of which a model from the Hugging Face hub gets
    ``HF_TOKEN`` and ``HF_ENDPOINT``. Raises `StartFailed` if an AMD GPU is asked for that isn't there.
    """
    spec, launch = order.spec, order.launch
    variables, binds = dict(launch.env), list(spec.volumes)
    if _from_hub(spec):
        for name in _HF_PASSED:
            if env.get(name):
                variables.setdefault(name, env[name])
        if around.hf_cache and not _has_cache(spec):
            variables["HF_HOME"] = _HF_HOME
            binds.append(f"{around.hf_cache}:{_HF_HOME}")
    compiled = kept(spec, image, around)
    variables |= compiled.env
    binds += [compiled.mount] if compiled.mount else []
    network = spec.network or around.network
    host: dict[str, Any] = {
        # Reaps what engines leave behind, and passes SIGTERM on to programs that wouldn't hear it as PID 1.
        "Init": True,
        "RestartPolicy": {"Name": "no"},
        "Binds": binds,
        "Ulimits": [{"Name": name, "Soft": limit, "Hard": limit} for name, limit in sorted(spec.ulimits.items())],
        "ExtraHosts": list(spec.extra_hosts),
        **gpus.settings(spec, around, gpu, amd),
    }
    if network:
        host["NetworkMode"] = network
    if spec.ipc is not None:
        host["IpcMode"] = spec.ipc
    if spec.shm_size is not None:
        host["ShmSize"] = int(spec.shm_size)
    elif spec.engine in FROM_HUB and spec.ipc is None:
        host["ShmSize"] = _VLLM_SHM_BYTES
    body: dict[str, Any] = {
        "Image": spec.image,
        "Entrypoint": list(launch.argv[:1]),
        "Cmd": list(launch.argv[1:]),
        "Env": [f"{name}={value}" for name, value in sorted(variables.items())],
        "HostConfig": host,
    }
    if launch.cwd is not None:
        body["WorkingDir"] = launch.cwd
    # Such networks have no ports to publish.
    if not network.startswith(_NOT_OURS):
        body["ExposedPorts"] = {f"{port}/tcp": {}}
        if published is not None:
            host["PortBindings"] = {f"{port}/tcp": [{"HostIp": _LOOPBACK, "HostPort": str(published)}]}
    labels = {MODEL: order.model, OWNER: owner, DEFINITION: order.definition, IMAGE: image.id}
    body["Labels"] = labels
    labels[BODY] = fingerprint(body)
    return body


def standby_body(
    plan: StandbyPlan,
    spec: Model,
    image: Image,
    around: Surroundings,
    *,
    port: int,
    published: int | None,
    gpu: int,
    owner: str,
    amd: Sequence[Nodes] = (),
    env: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Return the body of a container in which ``plan`` waits for a start of ``spec``, or of a model like it.

    Its label `BODY` is equal for the bodies of models that can take each other's place.
    """
    launch = Launch((*plan.python, STANDBY_SCRIPT, "wait", STANDBY_SOCKET, *plan.hints), plan.env)
    order = StartOrder(
        instance="", model="", definition="", spec=spec, launch=launch, address=Address(_LOOPBACK, port), standby=plan
    )
    body = create_body(order, image, around, port=port, published=published, gpu=gpu, amd=amd, owner=owner, env=env)
    shared = {name: value for name, value in body.items() if name not in ("Entrypoint", "Cmd")}
    shared["Labels"] = {IMAGE: image.id}
    body["Labels"] = {OWNER: owner, STANDBY: plan.key, IMAGE: image.id, BODY: fingerprint(shared)}
    return body


def fingerprint(body: Mapping[str, Any]) -> str:
    """Return a digest of what a container is made from; equal for two that can stand for each other.

    The labels of `OWNER`, `DEFINITION` and `BODY` don't count, nor does the number of a published port, only whether
    there is one. The digest (SHA-256) tells nothing of the secrets in it.
    """
    host = dict(body.get("HostConfig", {}))
    if "PortBindings" in host:
        host["PortBindings"] = sorted(host["PortBindings"])
    labels = {name: value for name, value in body.get("Labels", {}).items() if name not in _UNCOUNTED}
    counted = {**body, "HostConfig": host, "Labels": labels}
    return hashlib.sha256(msgspec.json.encode(counted, order="deterministic")).hexdigest()


def _from_hub(spec: Model) -> bool:
    return spec.engine in FROM_HUB and spec.model is not None and not spec.model.startswith(("/", "."))


def _has_cache(spec: Model) -> bool:
    if any(name in spec.env for name in _HF_PLACES):
        return True
    hub = PurePosixPath(_HF_HOME) / "hub"
    # SOURCE:TARGET[:OPTIONS]
    targets = [PurePosixPath(volume.split(":")[1]) for volume in spec.volumes if ":" in volume]
    return any(hub.is_relative_to(target) for target in targets)
