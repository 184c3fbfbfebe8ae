"""What models in containers must keep to, and the section ``docker``.

The rules look at the plain values, so that they speak up also where another part of the file is wrong. No message shows
a value: it may come from the environment.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from modelswap.spec import volumes
from modelswap.spec.errors import Path, dotted, nearest
from modelswap.spec.tree import Tree

HOSTS: Final = ("container", "compose_service", "image")
ADOPTED: Final = frozenset({"container", "compose_service"})
IMAGE_ONLY: Final = (
    *("entrypoint", "volumes", "gpus", "devices", "shm_size", "ipc", "ulimits", "network", "extra_hosts", "pull"),
)
_FIXED: Final = ("command", "args", "program", "env", "cwd")
_WHERE_IT_IS_MADE: Final = "set it where the container is made (the compose file)"
_LATER: Final = {
    "args": f"{_WHERE_IT_IS_MADE}; what modelswap must know of it goes into 'concurrency' and 'memory'",
}
ULIMITS: Final = (
    *("core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio"),
    *("rttime", "sigpending", "stack"),
)
_IPC: Final = ("host", "private", "shareable", "none")
_SERVICE: Final = re.compile(r"[a-zA-Z0-9._-]+")
_PROJECT: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")
_CDI: Final = re.compile(r"[\w.-]+/[\w.-]+=[\w.:-]+")
_GPU: Final = re.compile(r"[0-9]+|(?:GPU|MIG)-[0-9a-fA-F/-]+")
_PART: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
# As distribution/reference reads it: [HOST[:PORT]/]PATH[:TAG][@DIGEST].
_IMAGE: Final = re.compile(
    rf"(?:[a-zA-Z0-9.-]+(?::[0-9]+)?/)?{_PART}(?:/{_PART})*(?::\w[\w.-]{{0,127}})?(?:@[a-z0-9+._-]+:[0-9a-fA-F]{{32,}})?",
    re.ASCII,
)
_LONGEST: Final = 400


def check(tree: Tree, path: Path, model: dict[str, Any]) -> None:
    """Add a problem to ``tree`` for every rule of containers that the model at ``path`` breaks."""
    hosts = [key for key in HOSTS if model.get(key) is not None]
    for other in hosts[1:]:
        hint = "keep one: a container that exists ('container', 'compose_service'), or an 'image' to make one from"
        tree.add((*path, other), f"not together with '{hosts[0]}'", hint, at_key=True)
    if hosts and model.get("engine") == "openvino":
        tree.add((*path, hosts[0]), "engine 'openvino' runs in no container", "leave it out", at_key=True)
    if "image" in hosts:
        _managed(tree, path, model)
    else:
        for key in (key for key in IMAGE_ONLY if model.get(key) is not None):
            hint = _WHERE_IT_IS_MADE if hosts else "say which 'image', or leave it out"
            tree.add((*path, key), "only with 'image'", hint, at_key=True)
        if hosts:
            _adopted(tree, path, model, hosts[0])
        elif model.get("port") is not None:
            hint = "a process is given a free port each time ({port} in 'command'); leave it out"
            tree.add((*path, "port"), "only for models in a container", hint, at_key=True)
    _told(
        tree, (*path, "container"), model, volumes.NAME.fullmatch, "not a container's name", "`docker ps -a` shows them"
    )
    _told(
        tree,
        (*path, "compose_service"),
        model,
        _SERVICE.fullmatch,
        "not a compose service's name",
        "`docker compose config --services` shows them",
    )


def _adopted(tree: Tree, path: Path, model: dict[str, Any], host: str) -> None:
    for key in (key for key in _FIXED if model.get(key) is not None):
        hint = _LATER.get(key, _WHERE_IT_IS_MADE)
        tree.add((*path, key), f"not with '{host}': that container has it already", hint, at_key=True)


def _managed(tree: Tree, path: Path, model: dict[str, Any]) -> None:
    if model.get("program") is not None:
        hint = "say 'entrypoint', or leave it out: the image knows its own program"
        tree.add((*path, "program"), "not with 'image'", hint, at_key=True)
    example = "e.g. vllm/vllm-openai:v0.33.0; all but the tag is written in small letters"
    _told(tree, (*path, "image"), model, _image, "not an image's name", example)
    entrypoint = model.get("entrypoint")
    if isinstance(entrypoint, list) and entrypoint[:1] == [""] and (*path, "entrypoint", 0) not in tree.unreadable:
        tree.add((*path, "entrypoint"), "names no program", "e.g. entrypoint: [vllm, serve]", at_key=True)
    _volumes(tree, (*path, "volumes"), model.get("volumes"))
    _gpus(tree, (*path, "gpus"), model.get("gpus"))
    for place, device in _items(tree, (*path, "devices"), model.get("devices")):
        if not device.startswith("/dev/"):
            tree.add(place, "not a device file", "e.g. /dev/kfd, or /dev/dri for all in it")
    for place, entry in _items(tree, (*path, "extra_hosts"), model.get("extra_hosts")):
        if not _is_extra_host(entry):
            tree.add(place, "wants NAME:ADDRESS", "e.g. hub.local:10.0.0.5, or NAME:host-gateway for Docker's machine")
    ipc = model.get("ipc")
    close = _nearest(ipc, _IPC) if isinstance(ipc, str) else None
    _told(tree, (*path, "ipc"), model, _is_ipc, f"wants one of {', '.join(_IPC)}, container:NAME", close)
    _ulimits(tree, (*path, "ulimits"), model.get("ulimits"))
    _network(tree, (*path, "network"), model.get("network"))


def _volumes(tree: Tree, path: Path, given: object) -> None:
    targets: dict[str, Path] = {}
    for place, text in _items(tree, path, given):
        try:
            volume = volumes.parse(text)
        except ValueError as error:
            tree.add(place, str(error))
            continue
        target = volume.target.rstrip("/")
        if target in targets:
            tree.add(place, f"has the same target as {dotted(targets[target])}", "give one of them another")
        elif not target:
            tree.add(place, "would replace all of the image", "mount it on a folder, e.g. /srv/models:/models")
        targets.setdefault(target, place)


def _gpus(tree: Tree, path: Path, given: object) -> None:
    if isinstance(given, list) and not given:
        tree.add(path, "names no GPU", "say gpus: none for a model that needs none")
    for place, gpu in _items(tree, path, given):
        if gpu in ("auto", "all", "none"):
            tree.add(place, f"'{gpu}' doesn't stand in a list", f"write gpus: {gpu}")
        elif not _GPU.fullmatch(gpu) and not _CDI.fullmatch(gpu):
            tree.add(place, "not a GPU", "wants an index such as 0, or a UUID as `nvidia-smi -L` shows it (GPU-…)")


def _ulimits(tree: Tree, path: Path, given: object) -> None:
    if not isinstance(given, dict):
        return
    for name, value in given.items():
        if name not in ULIMITS:
            hint = _nearest(name, ULIMITS) or f"there are {', '.join(ULIMITS)}"
            tree.add((*path, name), "not a resource limit", hint, at_key=True)
        elif isinstance(value, int) and value < -1:
            tree.add((*path, name), "must be at least -1", "-1 means no limit")


def _network(tree: Tree, path: Path, given: object) -> None:
    if not isinstance(given, str) or path in tree.unreadable:
        return
    if given == "host":
        tree.add(path, "'host' would open the engine to whoever reaches the machine", "leave it out, or name a network")
    elif given == "none" or given.startswith("container:"):
        tree.add(path, "the engine could not be reached there", "leave it out, or name a network")
    elif not volumes.NAME.fullmatch(given):
        tree.add(path, "not a network's name", "`docker network ls` shows them")


def check_all(tree: Tree, models: dict[str, Any]) -> None:
    """Add a problem to ``tree`` for every container that two models claim."""
    taken: dict[tuple[str, str], Path] = {}
    for name, model in models.items():
        for key in ADOPTED & model.keys() if isinstance(model, dict) else ():
            path: Path = ("models", name, key)
            claimed = model[key]
            if not isinstance(claimed, str) or path in tree.unreadable:
                continue
            first = taken.setdefault((key, claimed), path)
            if first != path:
                what = "container" if key == "container" else "compose service"
                hint = "a container serves one model; say 'aliases' or 'adapters' for more names"
                tree.add(path, f"this {what} belongs to {dotted(first[:2])} already", hint)


def check_docker(tree: Tree, docker: object) -> None:
    """Add a problem to ``tree`` for every rule that the section ``docker`` breaks."""
    if not isinstance(docker, dict):
        return
    path: Path = ("docker",)
    hint = docker_host_hint(str(docker.get("host")))
    _told(tree, (*path, "host"), docker, is_docker_host, "not an address of Docker", hint)
    _told(tree, (*path, "project"), docker, _PROJECT.fullmatch, "not a compose project's name", "`docker compose ls`")
    _network(tree, (*path, "network"), docker.get("network"))
    hint = "an absolute folder of Docker's machine, or a volume's name"
    _told(tree, (*path, "hf_cache"), docker, _is_source, "not something to mount", hint)
    hint = f"{hint}; false for none"
    _told(tree, (*path, "compile_cache"), docker, _is_source, "not something to mount", hint)


def docker_host_hint(text: str) -> str:
    """Return how to write ``text``, which is no address of Docker that we could use."""
    if text.startswith("ssh:"):
        return "forward it (ssh -NL /path/docker.sock:/var/run/docker.sock HOST), and write unix:///path/docker.sock"
    return "write unix:///var/run/docker.sock or tcp://HOST:PORT"


def is_docker_host(text: str) -> bool:
    """Return whether ``text`` is an address that Docker can have for us."""
    if text.startswith("unix://"):
        return text.removeprefix("unix://").startswith("/")
    name, _, port = text.removeprefix("tcp://").rpartition(":")
    return text.startswith("tcp://") and bool(name) and port.isdecimal() and 0 < int(port[:6]) <= 65535


def _is_source(text: str) -> bool:
    return text.startswith(("/", "~/")) or volumes.NAME.fullmatch(text) is not None


def _is_extra_host(text: str) -> bool:
    name, _, address = text.partition(":")
    if not name or any(character.isspace() for character in name):
        return False
    if address == "host-gateway":
        return True
    try:
        ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        return False
    return True


def _is_ipc(text: str) -> bool:
    return text in _IPC or text.startswith("container:")


def _image(text: str) -> object:
    return len(text) <= _LONGEST and _IMAGE.fullmatch(text)


def _told(
    tree: Tree,
    path: Path,
    section: dict[str, Any],
    right: Callable[[str], object],
    message: str,
    hint: str | None = None,
) -> None:
    value = section.get(str(path[-1]))
    if isinstance(value, str) and path not in tree.unreadable and not right(value):
        tree.add(path, message, hint)


def _items(tree: Tree, path: Path, given: object) -> Iterator[tuple[Path, str]]:
    for index, item in enumerate(given if isinstance(given, list) else ()):
        if isinstance(item, str) and (*path, index) not in tree.unreadable:
            yield (*path, index), item


def _nearest(word: str, words: tuple[str, ...]) -> str | None:
    found = nearest(word, words)
    return f"did you mean '{found}'?" if found else None
