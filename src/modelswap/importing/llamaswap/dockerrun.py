"""``docker run …`` and its like: what container a command line makes or starts.

Options without a value are those of Docker's reference for ``docker run``; all others take one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from modelswap.importing.service import Port, Service, Volume, size
from modelswap.importing.words import program

_TOOLS: Final = frozenset({"docker", "podman", "nerdctl"})
_FLAGS: Final = frozenset(
    {"detach", "disable-content-trust", "help", "init", "interactive", "no-healthcheck", "oom-kill-disable"}
    | {"privileged", "publish-all", "quiet", "read-only", "rm", "sig-proxy", "tty", "use-api-socket"}
)
_SHORT: Final = {
    "a": "attach",
    "c": "cpu-shares",
    "d": "detach",
    "e": "env",
    "h": "hostname",
    "i": "interactive",
    "l": "label",
    "m": "memory",
    "P": "publish-all",
    "p": "publish",
    "q": "quiet",
    "t": "tty",
    "u": "user",
    "v": "volume",
    "w": "workdir",
}
_MEANINGLESS: Final = frozenset(
    {"rm", "detach", "interactive", "tty", "init", "sig-proxy", "name", "attach", "quiet", "no-healthcheck"}
    | {"restart", "log-driver", "pull-policy"}
)


@dataclass(slots=True)
class DockerRun:
    """A container to be made; ``service.lost`` names the options that ours can't have. ``tool`` is docker or podman."""

    tool: str
    service: Service
    env_files: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Existing:
    """A container that exists: ``name`` is its own, or its compose service's."""

    name: str
    compose: bool


def parse(name: str, words: list[str]) -> DockerRun | Existing | None:
    """Return what ``words`` have to do with a container, for the model ``name``; None if nothing."""
    if not words:
        return None
    tool, rest = program(words[0]), words[1:]
    if tool in ("docker-compose", "podman-compose"):
        return _compose(rest)
    if tool not in _TOOLS:
        return None
    if rest[:1] == ["compose"]:
        return _compose(rest[1:])
    rest = rest[1:] if rest[:1] == ["container"] else rest
    if rest[:1] == ["start"]:
        names = [word for word in rest[1:] if not word.startswith("-")]
        return Existing(names[0], compose=False) if names else None
    return _run(name, tool, rest[1:]) if rest[:1] == ["run"] else None


def _compose(words: list[str]) -> Existing | None:
    if "up" not in words and "start" not in words:
        return None
    begin = words.index("up" if "up" in words else "start")
    names = [word for word in words[begin + 1 :] if not word.startswith("-") and not word.isdigit()]
    return Existing(names[0], compose=True) if len(names) == 1 else None


def _run(name: str, tool: str, words: list[str]) -> DockerRun | None:
    run = DockerRun(tool, Service(name))
    index = 0
    while index < len(words) and words[index].startswith("-"):
        word = words[index]
        index += 1
        options, value = _options(word)
        for option in options[:-1]:
            _take(run, option, "")
        last = options[-1]
        if last not in _FLAGS and value is None:
            value = words[index] if index < len(words) else ""
            index += 1
        _take(run, last, value or "")
    if index >= len(words):
        return None
    run.service.image = words[index]
    run.service.command = words[index + 1 :]
    return run


def _options(word: str) -> tuple[list[str], str | None]:
    """Return the options in one word (``-it`` are two), and the last one's value if it is in it, too."""
    if word.startswith("--"):
        name, equals, value = word[2:].partition("=")
        return [name], value if equals else None
    letters = word[1:]
    found: list[str] = []
    for index, letter in enumerate(letters):
        option = _SHORT.get(letter, letter)
        found.append(option)
        if option not in _FLAGS:
            return found, letters[index + 1 :].removeprefix("=") or None
    return found, None


def _take(run: DockerRun, option: str, value: str) -> None:
    service = run.service
    taker = _TAKERS.get(option)
    if taker is not None:
        taker(service, value)
    elif option == "env-file":
        run.env_files.append(value)
    elif option not in _MEANINGLESS:
        service.lost.append((f"--{option}", "there is no such setting for containers of ours"))


def _env(service: Service, value: str) -> None:
    name, equals, given = value.partition("=")
    service.env[name] = given if equals else None


def _volume(service: Service, value: str) -> None:
    source, _, rest = value.partition(":")
    target, _, mode = rest.partition(":")
    if target:
        named = not source.startswith(("/", ".", "~"))
        service.volumes.append(Volume(source, target, "ro" in mode.split(","), named))
    else:
        service.lost.append(("--volume", f"the nameless volume at {source}; name it to keep what is in it"))


def _mount(service: Service, value: str) -> None:
    parts = dict(part.partition("=")[::2] for part in value.split(","))
    source = parts.get("source") or parts.get("src")
    target = parts.get("target") or parts.get("dst") or parts.get("destination")
    if source and target and parts.get("type", "volume") in ("bind", "volume"):
        read_only = "readonly" in parts or "ro" in parts
        service.volumes.append(Volume(source, target, read_only, parts.get("type") != "bind"))
    else:
        service.lost.append(("--mount", "only folders and volumes can be mounted"))


def _publish(service: Service, value: str) -> None:
    front, _, target = value.partition("/")[0].rpartition(":")
    address, _, published = front.rpartition(":")
    if target.isdigit():
        service.ports.append(Port(int(target), published, address))


def _gpus(service: Service, value: str) -> None:
    text = value.strip("\"'")
    if match := re.search(r"device=([^\"']+)", text):
        service.gpus = [each for each in match[1].split(",") if "=" not in each]
    else:
        count = text.partition(",")[0].removeprefix("count=")
        service.gpus = int(count) if count.isdigit() else "all"


def _device(service: Service, value: str) -> None:
    if value.startswith("nvidia.com/gpu="):
        given = value.partition("=")[2]
        known = service.gpus if isinstance(service.gpus, list) else []
        service.gpus = "all" if given == "all" else [*known, given]
    else:
        service.devices.append(value)


def _ulimit(service: Service, value: str) -> None:
    name, _, limits = value.partition("=")
    limit = limits.rpartition(":")[2]
    if re.fullmatch(r"-?\d+", limit):
        service.ulimits[name] = int(limit)


def _network(service: Service, value: str) -> None:
    if value in ("host", "none") or value.startswith("container:"):
        service.lost.append(("--network", "an engine is reached through a network of its own"))
    elif value not in ("bridge", "default"):
        service.network = value


def _runtime(service: Service, value: str) -> None:
    if value == "nvidia":
        service.gpus = service.gpus or "all"
    else:
        service.lost.append(("--runtime", f"containers of ours can't have the runtime {value}"))


def _entrypoint(service: Service, value: str) -> None:
    service.entrypoint = [value] if value else None


def _pull(service: Service, value: str) -> None:
    service.pull = "always" if value == "always" else "never" if value == "never" else None


def _grace(service: Service, value: str) -> None:
    service.grace = float(value) if value.isdigit() else None


def _set(name: str) -> Callable[[Service, str], None]:
    return lambda service, value: setattr(service, name, value)


_TAKERS: Final[dict[str, Callable[[Service, str], None]]] = {
    "env": _env,
    "volume": _volume,
    "mount": _mount,
    "publish": _publish,
    "expose": lambda service, value: service.exposed.append(int(value)) if value.isdigit() else None,
    "gpus": _gpus,
    "device": _device,
    "ulimit": _ulimit,
    "network": _network,
    "net": _network,
    "runtime": _runtime,
    "entrypoint": _entrypoint,
    "pull": _pull,
    "stop-timeout": _grace,
    "shm-size": lambda service, value: setattr(service, "shm_size", size(value)),
    "ipc": _set("ipc"),
    "workdir": _set("folder"),
    "add-host": lambda service, value: service.extra_hosts.append(value.replace("=", ":", 1)),
}
