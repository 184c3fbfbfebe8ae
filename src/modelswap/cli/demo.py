"""``modelswap demo``: the main job on real weights, without a GPU or a config file."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
import yaml
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from modelswap.cli import addresses, demo_table
from modelswap.cli.chat import Reply, stream_chat
from modelswap.cli.client import AdminClient
from modelswap.cli.demo_screen import Screen
from modelswap.cli.failure import ExitCode, Failure
from modelswap.cli.running import run_stack
from modelswap.cli.settings import load_config
from modelswap.cli.stack import Stack
from modelswap.cli.weights import default_cache, smollm2
from modelswap.protocol.errors import ModelswapError
from modelswap.spec.config import Config

HOST: Final = "127.0.0.1"
CHAT: Final = "smol-chat"
CODER: Final = "smol-coder"
MAX_TOKENS: Final = 64

Turn = tuple[tuple[str, str], ...]
"""Requests that are sent together: model and prompt."""

TURNS: Final[tuple[Turn, ...]] = (
    ((CHAT, "In one sentence: what is a graphics card?"),),
    ((CHAT, "Name three colours of the rainbow."),),
    ((CODER, "Write a Python function that adds two numbers."),),
    (
        (CODER, "Write a shell command that counts the lines of a file."),
        (CHAT, "In one sentence: why is the sky blue?"),
    ),
    ((CODER, "In one sentence: what is a Python list?"),),
)


def demo(*, once: bool, port: int, orchestrator_port: int) -> ExitCode:
    """Show the main job and stay up, or end if ``once``; raises `Failure`."""
    console = Console(highlight=False)
    _check_engine()
    _intro(console)
    cache = default_cache() / "demo"
    weights = _weights(console, default_cache())
    ports = choose_ports(port, orchestrator_port, console)
    path = write_config(cache, weights, *ports)
    return present(console, path, cache / f"services-{ports[0]}.log", once=once)


def present(console: Console, path: Path, log: Path, *, once: bool) -> ExitCode:
    """Run the config file at ``path``, show the requests, and stay up unless ``once``; raises `Failure`.

    The services log to ``log``.
    """
    show = _Show(console, load_config(path), path, log, once)
    console.print("starting orchestrator and gateway", style="dim")
    with log.open("wb") as output:
        try:
            code = asyncio.run(run_stack(show.config, path, show.say, show.run, output=output))
        except Failure as failure:
            raise Failure(str(failure), _with_log(failure.remedy, log), failure.code) from failure
    console.print("stopped", style="dim")
    if show.failed:
        return ExitCode.FAILED
    return ExitCode.INTERRUPTED if not show.shown else code


def choose_ports(gateway: int, orchestrator: int, console: Console) -> tuple[int, int]:
    """Return the ports to use: those asked for, or free ones in place of those that are taken."""
    chosen: list[int] = []
    for what, port in (("gateway", gateway), ("orchestrator", orchestrator)):
        found = addresses.unusable(HOST, port)
        if found is None and port not in chosen:
            chosen.append(port)
            continue
        free = addresses.free_port(HOST, {gateway, orchestrator, *chosen})
        reason = found.reason if found else f"port {port} is the gateway's"
        console.print(Text(f"{reason}: the {what} uses {free} instead", "yellow"))
        chosen.append(free)
    return chosen[0], chosen[1]


def write_config(folder: Path, weights: Path, port: int, orchestrator_port: int) -> Path:
    """Write the demo's config file and return its path."""
    compiled = str(folder / "openvino")
    config = {
        "models": {
            CHAT: {"engine": "openvino", "model": str(weights), "args": ["--cache-dir", compiled]},
            CODER: {
                "engine": "openvino",
                "model": str(weights),
                "args": ["--cache-dir", compiled, "--threads", "1", "--max-tokens-default", "256"],
            },
        },
        "gateway": {"host": HOST, "port": port},
        "orchestrator": {
            "host": HOST,
            "port": orchestrator_port,
            # One state folder a port, so that two demos don't take each other's engines for their own.
            "state_dir": str(folder / f"state-{port}"),
        },
        "scheduling": {"linger": 0.5},
        "device": {"kind": "slot"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"modelswap-{port}.yaml"
    path.write_text("# Written by `modelswap demo` at every start.\n" + yaml.safe_dump(config, sort_keys=False))
    return path


@dataclass(slots=True)
class _Show:
    """What is seen while the stack runs."""

    console: Console
    config: Config
    path: Path
    log: Path
    once: bool
    failed: bool = False
    shown: bool = False
    replies: list[Reply] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.console.print(Text(line, "dim"), soft_wrap=True)

    async def run(self, stack: Stack) -> None:
        console = self.console
        console.print(
            Text.assemble("gateway ", (stack.gateway_url, "bold"), "  orchestrator ", (stack.orchestrator_url, "bold"))
        )
        console.print(
            Padding(
                f"{len(self.config.models)} models, one slot: each request below names one; "
                "when that isn't the one running, modelswap swaps.",
                (0, 0, 1, 0),
            )
        )
        async with AdminClient(stack.orchestrator_url) as admin, _session() as http:
            for turn in TURNS:
                self.replies += await Screen(console, admin).show(
                    [_asking(http, stack.gateway_url, model, prompt) for model, prompt in turn], turn
                )
            status = await admin.status()
        console.print(demo_table.table(demo_table.rows(self.replies, _records(status))))
        self.shown = True
        self.failed = any(reply.error for reply in self.replies)
        if not self.once:
            self._farewell(stack)
            await asyncio.Event().wait()

    def _farewell(self, stack: Stack) -> None:
        url = stack.gateway_url
        body = f'{{"model": "{CODER}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
        lines = [
            f"curl {url}/v1/models",
            f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
            f"modelswap status --url {stack.orchestrator_url}",
        ]
        self.console.print("It stays up. Try, in another terminal:", style="bold")
        for line in lines:
            self.console.print(Text(f"  {line}", "cyan"), soft_wrap=True)
        self.console.print(Text(f"Config: {self.path}   service logs: {self.log}", "dim"), soft_wrap=True)
        self.console.print(Text("Ctrl-C stops everything.", "bold"))


def _asking(
    http: aiohttp.ClientSession, url: str, model: str, prompt: str
) -> Callable[[Callable[[str], None]], Awaitable[Reply]]:
    return lambda on_text: stream_chat(http, url, model, prompt, max_tokens=MAX_TOKENS, on_text=on_text)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600.0))


def _records(status: dict[str, Any]) -> Sequence[dict[str, Any]]:
    return list(status.get("last_swaps", []))


def _check_engine() -> None:
    if importlib.util.find_spec("openvino_genai") is None:
        raise Failure(
            "the embedded engine, OpenVINO GenAI, is not installed",
            "pip install 'modelswap[openvino]' (wheels exist for Linux x86-64 and arm64, macOS and Windows)",
        )


def _intro(console: Console) -> None:
    import modelswap

    console.print(Text.assemble((f"modelswap {modelswap.__version__} demo", "bold cyan"), ": real weights, no GPU"))
    console.print(
        Text(
            f"One set of weights (SmolLM2-135M-Instruct) is shown as two models, {CHAT} and {CODER}: the same file "
            "under two engine configurations, each with an engine process of its own.",
            "dim",
        )
    )


def _weights(console: Console, cache: Path) -> Path:
    """Return the path of the weights; shows what is done to get them."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=1.0, visible=False)
        last = ("", -1)

        def tell(label: str, fraction: float | None) -> None:
            nonlocal last
            progress.update(bar, description=label, completed=fraction or 0.0, visible=True)
            quarter = int((fraction or 0.0) * 4)
            if not console.is_terminal and (label, quarter) != last:
                console.print(f"{label}: {quarter * 25} %")
            last = (label, quarter)

        try:
            return smollm2(cache, tell)
        except ModelswapError as error:
            raise Failure(str(error)) from error


def _with_log(remedy: str | None, log: Path, lines: int = 15) -> str:
    """Return ``remedy`` with the services' last log lines, which say what the user can't see otherwise."""
    tail: list[str] = []
    with contextlib.suppress(OSError):
        tail = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([f"{remedy or 'see the log'} ({log}), which ends with:", *(f"    {line}" for line in tail)])
