"""How a simulated engine is started: its command line, as a struct."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from modelswap.testing.engine.behaviour import USUAL, Behaviour, parse_faults

Flavour = Literal["vllm", "sglang"]
_KEY = "VLLM_API_KEY"
_DEV_MODE = "VLLM_SERVER_DEV_MODE"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that can be said to a simulated engine at its start; each one is a command line option, too."""

    model: str = "sim"
    """The name it serves and names in every answer."""
    aliases: tuple[str, ...] = ()
    """More names that it serves."""
    host: str = "127.0.0.1"
    port: int = 0
    """0 = a free one."""
    instance: str | None = None
    """Default: ``MODELSWAP_INSTANCE`` from the environment, else one made up."""
    load_seconds: float = 0.0
    """Between start and readiness; ``/health`` is 503 meanwhile."""
    listen_late: bool = False
    """Refuse connections while loading, instead of answering 503."""
    tokens: int = 8
    """Pieces in an answer."""
    tokens_per_second: float = 0.0
    """0 = as fast as they are read."""
    slots: int = 256
    """Requests running at once; the rest wait in the engine."""
    api_key: str | None = None
    """Guards ``/v1/…``, as vLLM's does."""
    keep_alive: float = 5.0
    """Idle connections are closed after this long."""
    gpu_ledger: str | None = None
    """The file that simulates the device."""
    gpu_bytes: int = 0
    """What it holds while awake."""
    residue_bytes: int | None = None
    """What it holds while asleep. Default: a twentieth."""
    sleepable: bool = False
    """Serve the sleep endpoints."""
    flavour: Flavour = "vllm"
    """Whose endpoints to serve, besides OpenAI's."""
    sleep_seconds: float = 0.0
    wake_seconds: float = 0.0
    quiet: bool = False
    """Log no requests."""
    behaviour: Behaviour = USUAL
    """Faults."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of `parse`."""
    made = argparse.ArgumentParser(prog="modelswap.testing.engine", description="A simulated LLM engine.")
    made.add_argument("--model", default="sim", metavar="NAME")
    made.add_argument("--alias", action="append", default=[], metavar="NAME", dest="aliases")
    made.add_argument("--host", default="127.0.0.1")
    made.add_argument("--port", type=int, default=0)
    made.add_argument("--instance")
    made.add_argument("--load-seconds", type=float, default=0.0)
    made.add_argument("--listen-late", action="store_true")
    made.add_argument("--tokens", type=int, default=8)
    made.add_argument("--tokens-per-second", type=float, default=0.0)
    made.add_argument("--slots", type=int, default=256)
    made.add_argument("--api-key")
    made.add_argument("--keep-alive", type=float, default=5.0)
    made.add_argument("--gpu-ledger", metavar="FILE")
    made.add_argument("--gpu-bytes", type=int, default=0)
    made.add_argument("--residue-bytes", type=int)
    made.add_argument("--sleepable", action="store_true")
    made.add_argument("--sleep-seconds", type=float, default=0.0)
    made.add_argument("--wake-seconds", type=float, default=0.0)
    made.add_argument("--flavour", choices=get_args(Flavour), default="vllm")
    made.add_argument("--quiet", action="store_true")
    real = made.add_argument_group("instead, as vLLM and SGLang take them", "so that their adapters can start it, too")
    real.add_argument("--served-model-name", nargs="+", metavar="NAME", help="--model and --alias")
    real.add_argument("--model-path", metavar="IGNORED")
    real.add_argument("--max-num-seqs", "--max-running-requests", type=int, dest="slots")
    real.add_argument("--enable-sleep-mode", action="store_true", help=f"--sleepable, with {_DEV_MODE}=1")
    real.add_argument("--enable-memory-saver", action="store_true", help="--sleepable")
    real.add_argument("--enable-weights-cpu-backup", action="store_true", help="without it, sleep loses the weights")
    made.add_argument(
        "--fault", action="append", default=[], metavar="KEY[=VALUE]", help="a field of Behaviour; may be repeated"
    )
    return made


def parse(argv: Sequence[str] | None = None) -> Options:
    """Read a command line; ends the program with status 2 and a message if it makes no sense."""
    reader = parser()
    said = vars(reader.parse_args(argv))
    try:
        said["behaviour"] = parse_faults(said.pop("fault"))
    except msgspec.ValidationError as error:
        reader.error(f"argument --fault: {error}")
    said["aliases"] = tuple(said["aliases"])
    _as_real_ones_do(said)
    return Options(**said)


def _as_real_ones_do(said: dict[str, Any]) -> None:
    """Put what was said in vLLM's or SGLang's words into ours."""
    del said["model_path"]
    if names := said.pop("served_model_name"):
        said["model"], said["aliases"] = names[0], (*said["aliases"], *names[1:])
    sleepers = [said.pop("enable_sleep_mode") and os.environ.get(_DEV_MODE) == "1", said.pop("enable_memory_saver")]
    said["sleepable"] = said["sleepable"] or any(sleepers)
    backed_up = said.pop("enable_weights_cpu_backup")
    if sleepers[1] and not backed_up:
        said["behaviour"] = msgspec.structs.replace(said["behaviour"], garbled=1)
    said["api_key"] = said["api_key"] or os.environ.get(_KEY)


def command(options: Options, *, host: str = "{host}", port: str = "{port}") -> list[str]:
    """Return the command that starts an engine with ``options``; by default as a config's ``command`` wants it."""
    argv = [sys.executable, "-m", "modelswap.testing.engine", "--host", host, "--port", port]
    for field, default in msgspec.structs.asdict(Options()).items():
        value = getattr(options, field)
        if field in ("host", "port") or value == default:
            continue
        option = "--" + field.replace("_", "-")
        match value:
            case Behaviour():
                asked = msgspec.to_builtins(value)
                argv += [f"--fault={key}={str(said).lower() if said is True else said}" for key, said in asked.items()]
            case tuple():
                argv += [f"--alias={alias}" for alias in value]
            case True:
                argv.append(option)
            case _:
                argv.append(f"{option}={value}")
    return argv


def own_instance(options: Options) -> str:
    """Return the id of this very start."""
    return options.instance or os.environ.get("MODELSWAP_INSTANCE") or f"sim-{os.urandom(4).hex()}"


def ledger_path(options: Options) -> Path | None:
    """Return where the simulated device is; None if the engine needs none."""
    return Path(options.gpu_ledger) if options.gpu_ledger and options.gpu_bytes else None
