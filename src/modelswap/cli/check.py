"""``modelswap check``: is the config file right, and does it look right."""

from __future__ import annotations

import ipaddress
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from modelswap.cli import addresses
from modelswap.cli.settings import load_config
from modelswap.cli.words import NONE
from modelswap.engines import options
from modelswap.engines.base import Address
from modelswap.engines.paths import is_there
from modelswap.engines.registry import FROM_HUB, engine_for
from modelswap.orchestrator.state import state_dir
from modelswap.protocol.errors import ModelswapError
from modelswap.spec import volumes
from modelswap.spec.config import Config, Model

Warned = tuple[str, str]
"""What looks wrong, and what to do about it (empty where the first says it all)."""

_IN_A_CONTAINER: Final = Path("/.dockerenv")


def check(path: Path) -> None:
    """Print what the config file says and what looks wrong; raises `Failure` if it can't be used."""
    config = load_config(path)
    console = Console(highlight=False)
    console.print(Text.assemble((str(path), "bold"), " is valid"), soft_wrap=True)
    console.print(summary(config))
    for message, remedy in warnings(config):
        console.print(Text.assemble(("warning: ", "yellow"), message, f": {remedy}" if remedy else ""), soft_wrap=True)


def summary(config: Config) -> Table:
    """Return the models and addresses as a table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "engine", "loads", "runs in", "device", "slots", "also called"):
        table.add_column(name, overflow="fold", justify="right" if name == "slots" else "left")
    for name, model in config.models.items():
        slots = model.concurrency or engine_for(model.engine).slots(model)
        others = ", ".join([*model.aliases, *model.adapters])
        table.add_row(
            *(Text(name, "bold"), model.engine, Text(_loads(model)), Text(host_of(model)), model.device, str(slots)),
            Text(others or NONE),
        )
    table.caption = (
        f"gateway {addresses.url(config.gateway.host, config.gateway.port)} "
        f"({config.gateway.workers} worker{'s' * (config.gateway.workers != 1)})\n"
        f"orchestrator {addresses.url(config.orchestrator.host, config.orchestrator.port)}\n"
        f"state {state_dir(config)}"
    )
    table.caption_justify = "left"
    return table


def host_of(model: Model) -> str:
    """Return in words what hosts a model."""
    if model.container is not None:
        return f"container {model.container}"
    if model.compose_service is not None:
        return f"compose service {model.compose_service}"
    return "a process" if model.image is None else f"image {model.image}"


def _loads(model: Model) -> str:
    return model.model or " ".join(model.command or []) or NONE


def warnings(config: Config) -> Iterator[Warned]:
    """Yield what parses but looks wrong, and what to do about it."""
    gateway, orchestrator = config.gateway, config.orchestrator
    for key, port in (("gateway.port", gateway.port), ("orchestrator.port", orchestrator.port)):
        if port == 0:
            yield f"{key} is 0, which no client could find", "name a port"
    # In a container it must be so, and what is published decides who reaches it.
    if orchestrator.host not in ("127.0.0.1", "::1", "localhost") and not _IN_A_CONTAINER.exists():
        yield (
            f"orchestrator.host is {orchestrator.host}: whoever reaches it can swap and stop models",
            "127.0.0.1 keeps it to this machine",
        )
    scheduling = config.scheduling
    if scheduling.max_wait >= scheduling.queue_timeout:
        wait, timeout = f"{scheduling.max_wait:g} s", f"{scheduling.queue_timeout:g} s"
        yield (
            f"scheduling.max_wait ({wait}) is not below scheduling.queue_timeout ({timeout})",
            "lower it: requests would time out before their model's turn",
        )
    if _open_docker(config.docker.host):
        yield (
            f"docker.host is {config.docker.host}: without TLS, whoever reaches it is root on that machine",
            "use a socket that is forwarded (ssh -NL), or set DOCKER_TLS_VERIFY and DOCKER_CERT_PATH",
        )
    for name, model in config.models.items():
        yield from ((f"models.{name}: {message}", remedy) for message, remedy in _model_warnings(name, model))


def _open_docker(host: str | None, env: Mapping[str, str] = os.environ) -> bool:
    if host is None or not host.startswith("tcp://") or env.get("DOCKER_TLS_VERIFY"):
        return False
    name = host.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return not ipaddress.ip_address(name).is_loopback
    except ValueError:
        # A name may lead to a proxy of the same compose project, which is how it should be.
        return "." in name


def _model_warnings(name: str, model: Model) -> Iterator[Warned]:
    match model.runtime:
        case "process":
            yield from _process_warnings(name, model)
        case "managed":
            yield from _image_warnings(name, model)
        case "adopted":
            pass  # only Docker knows more of it: `modelswap doctor`
    if model.runtime != "adopted" and model.engine == "custom" and _lacks_port(model):
        or_say = ", or say its 'port'" if model.runtime == "managed" else ""
        yield "its command has no {port}, so it can't listen where modelswap expects it", f"add {{port}}{or_say}"


def _lacks_port(model: Model) -> bool:
    if model.runtime == "managed" and (model.port is not None or not model.command):
        return False
    words = [*(model.command or ()), *model.args, *model.env.values()]
    return bool(model.command) and not any("{port}" in word for word in words)


def _process_warnings(name: str, model: Model) -> Iterator[Warned]:
    try:
        launch = engine_for(model.engine).launch(name, model, Address("127.0.0.1", 1))
    except ModelswapError as error:
        message, found, remedy = str(error).partition("; ")
        if not found:
            message, _, remedy = str(error).partition(". ")
        yield message, remedy
        return
    program = launch.argv[0]
    if "/" in program and not is_there(Path(launch.cwd or ".", program)):
        yield f"there is no program {program}", "mend its path, or install it"
    elif shutil.which(program, path=launch.env.get("PATH")) is None:
        yield f"{program} is not on PATH, or can't be executed", "give its full path, or install it"
    if launch.cwd is not None and not is_there(Path(launch.cwd, ".")):
        yield f"cwd {launch.cwd} is not a folder", "make it, or name another"
    if model.model and model.model.startswith(("/", "~", "./")) and not is_there(Path(model.model).expanduser()):
        yield f"there is no {model.model}", "mend the path, or download the model to it"


def _image_warnings(name: str, model: Model) -> Iterator[Warned]:
    targets = [PurePosixPath(volumes.parse(text).target) for text in model.volumes]
    loads = model.model if model.engine != "custom" else None
    if loads and loads.startswith("/") and not any(PurePosixPath(loads).is_relative_to(target) for target in targets):
        yield f"no volume puts {loads} into its container", "add one to 'volumes', unless the image has it"
    parallel = options.parallelism(model.args) if model.engine in FROM_HUB else 1
    if isinstance(model.gpus, list) and len(model.gpus) < parallel:
        message = f"--tensor-parallel-size {parallel} needs {parallel} GPUs, and 'gpus' names {len(model.gpus)}"
        yield message, "name as many in 'gpus'"
    if model.device == "gpu" and model.gpus == "none" and not model.devices:
        yield "with gpus: none it takes a turn on a GPU that it can't see", "say device: none, or gpus: auto"
