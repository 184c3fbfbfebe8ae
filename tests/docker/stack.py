"""The compose project of ``deploy/compose`` as a user runs it, with the engines' image replaced by a simulated one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import stat
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import openai
import yaml

from tests.ports import free_port
from tests.system.stack import until

REPOSITORY: Final = Path(__file__).resolve().parents[2]
ENGINES: Final = ("mistral-llm", "coder-llm", "llava-llm")
WEIGHTS: Final = {
    "mistral": "mistralai/Mistral-7B-Instruct-v0.3",
    "coder": "Qwen/Qwen2.5-Coder-7B-Instruct",
    "llava": "llava-hf/llava-v1.6-mistral-7b-hf",
}
"""Models by name, and what the shipped files load for them."""
IMAGE: Final = os.environ.get("MODELSWAP_TEST_IMAGE", "modelswap:latest")
ENGINE_IMAGE: Final = os.environ.get("MODELSWAP_TEST_ENGINE", "modelswap-engine:latest")
PROXY_IMAGE: Final = os.environ.get("MODELSWAP_TEST_PROXY", "modelswap-haproxy:latest")
DEADLINE: Final = 60.0

_HUB: Final = """
import threading, hub
with hub.serving("0.0.0.0", 8000) as served:
    files = {"config.json": b"{}", "model.safetensors": bytes(100_000)}
    served.repositories |= {name: hub.Repository(files) for name in %r}
    threading.Event().wait()
"""
_CONTAINER: Final = "multimodal-stack-orchestrator"
_USUAL_PORTS: Final = (8080, 8888)


class _Reset:
    """Compose's tag for what is to be taken away."""


_RESET: Final = _Reset()


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(_Reset, lambda dumper, _: dumper.represent_scalar("!reset", "null"))


def docker_socket() -> Path:
    """Return where the daemon listens that `docker` talks to."""
    return Path(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://"))


def environment() -> dict[str, str]:
    """Return our environment without what would change the project, and with a `docker` that knows Compose."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COMPOSE_", "COVERAGE_"))}
    ours = REPOSITORY / ".venv" / "docker"
    if "DOCKER_CONFIG" not in kept and ours.exists():
        kept["DOCKER_CONFIG"] = str(ours)
    return kept


async def run(*argv: str, cwd: Path | None = None) -> str:
    """Run a command to its end and return what it printed; fails the test if it fails."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        cwd=cwd,
        env=environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, f"{' '.join(argv)}: {process.returncode}\n{out.decode()}\n{err.decode()}"
    return out.decode()


async def docker(*arguments: str) -> str:
    """Run ``docker ARGUMENTS``."""
    return await run("docker", *arguments)


class ComposeStack:
    """One compose project, made from copies of the shipped files in ``folder``.

    ``files`` is what ``COMPOSE_FILE`` names; ``engine`` are options of the simulated engines. On a free machine it has
    the ports and the container name that the documentation names; otherwise others, and `as_written` puts those in.
    """

    def __init__(self, folder: Path, files: Sequence[str] = ("compose.yaml",), engine: Sequence[str] = ()) -> None:
        self.folder = folder / "compose"
        self.project = f"ms-{uuid.uuid4().hex[:8]}"
        self.managed = "compose.managed.yaml" in files
        self.files = [*files, "compose.test.yaml"]
        self._engine = " ".join(engine)
        self.gateway_port, self.orchestrator_port = _USUAL_PORTS
        self.container = _CONTAINER

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> ComposeStack:
        shutil.copytree(REPOSITORY / "deploy" / "compose", self.folder)
        if not await self._usual_names_are_free():
            self.gateway_port, self.orchestrator_port = free_port(), free_port()
            self.container = f"{self.project}-orchestrator"
        self._write_settings()
        try:
            await self.up()
        except BaseException:
            await self._tell()
            await self.remove()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            await self._tell()
        await self.remove()

    async def up(self) -> None:
        """Make the engines' containers and start the services, as README.md says; returns when both are well."""
        if not self.managed:
            await self.compose("--profile", "models", "create")
        await self.compose("up", "--detach")
        await until(self.healthy, "the stack is healthy")

    async def remove(self) -> None:
        """Take everything away that the project made."""
        await self.compose("--profile", "models", "down", "--timeout", "1")  # the managed ones hold the network, maybe
        for container in await self.managed_containers():
            await docker("rm", "--force", "--volumes", container)
        await self.compose("--profile", "models", "down", "--volumes", "--timeout", "1")
        await self._remove_volume(self._compile_cache)

    async def leftovers(self) -> list[str]:
        """Return what is left of the project, and of modelswap's own containers and volumes."""
        found: list[str] = []
        for label in (f"com.docker.compose.project={self.project}", "io.modelswap.owner"):
            for kind in ("container", "network", "volume"):
                every = ["--all"] if kind == "container" else []
                found += (await docker(kind, "ls", "--quiet", *every, "--filter", f"label={label}")).split()
        return found

    async def _usual_names_are_free(self) -> bool:
        for port in _USUAL_PORTS:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return False
        return not await docker("ps", "--all", "--quiet", "--filter", f"name=^{_CONTAINER}$")

    @property
    def _compile_cache(self) -> str:
        return f"{self.project}-compile-cache"

    async def _remove_volume(self, name: str) -> None:
        if await docker("volume", "ls", "--quiet", "--filter", f"name=^{name}$"):
            await docker("volume", "rm", name)

    def _write_settings(self) -> None:
        socket = docker_socket()
        settings = {
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_FILE": ":".join(self.files),
            "DOCKER_GID": str(socket.stat().st_gid),
            "DOCKER_SOCKET": str(socket),
            "GATEWAY_PORT": str(self.gateway_port),
            "ORCHESTRATOR_PORT": str(self.orchestrator_port),
            "ORCHESTRATOR_NAME": self.container,
            "MODELSWAP_IMAGE": IMAGE,
            "VLLM_IMAGE": ENGINE_IMAGE,
            "HAPROXY_IMAGE": PROXY_IMAGE,
            "HF_ENDPOINT": "http://model-hub:8000",
            "COMPILE_CACHE": self._compile_cache,
            "ENGINE_SHM_SIZE": "64mb",
            "DOCKER_PROXY_CREATE": "yes" if self.managed else "no",
        }
        assert stat.S_ISSOCK(socket.stat().st_mode)
        (self.folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        shutil.copy(REPOSITORY / "tests" / "weights" / "hub.py", self.folder)
        (self.folder / "compose.test.yaml").write_text(yaml.dump({"services": self._overrides()}, Dumper=_Dumper))
        if self.managed:
            config = self.folder / "modelswap.managed.yaml"
            shipped = config.read_text()
            assert "    env: &env\n" in shipped
            ours = f"    env: &env\n      SIM_ARGS: {json.dumps(self._engine)}\n"
            config.write_text(shipped.replace("    env: &env\n", ours))

    def _overrides(self) -> dict[str, Any]:
        """No GPU, no registry, a hub of our own, and health checks often enough not to be waited for."""
        often = {"interval": "1s"}
        found: dict[str, Any] = {
            "api-gateway": {"pull_policy": "never", "healthcheck": often},
            "model-orchestrator": {
                "pull_policy": "never",
                "healthcheck": often,
                "deploy": _RESET,
                "depends_on": ["model-hub"],
            },
            "model-hub": {
                "image": ENGINE_IMAGE,
                "pull_policy": "never",
                "entrypoint": ["/opt/modelswap/bin/python", "-c", _HUB % list(WEIGHTS.values())],
                "environment": {"PYTHONPATH": "/srv"},
                "volumes": ["./hub.py:/srv/hub.py:ro"],
                "init": True,
            },
        }
        if not self.managed:
            engine = {"pull_policy": "never", "deploy": _RESET, "environment": {"SIM_ARGS": self._engine}}
            found |= dict.fromkeys(ENGINES, engine)
        return found

    async def _tell(self) -> None:
        with contextlib.suppress(AssertionError):
            print(await self.compose("--profile", "models", "ps", "--all"))  # noqa: T201 - pytest shows it on failure
            print(await self.compose("logs", "--no-color", "--tail", "80"))  # noqa: T201

    # ── commands ─────────────────────────────────────────────────────────────────────────────────────────

    async def compose(self, *arguments: str) -> str:
        """Run ``docker compose ARGUMENTS`` in the project's folder."""
        return await run("docker", "compose", *arguments, cwd=self.folder)

    def as_written(self, command: str) -> list[str]:
        """Return a documented command line, to be run by a shell, with this project's ports and names."""
        for usual, ours in (
            ("localhost:8888", f"localhost:{self.orchestrator_port}"),
            ("localhost:8080", f"localhost:{self.gateway_port}"),
            (_CONTAINER, self.container),
        ):
            command = command.replace(usual, ours)
        return ["bash", "-o", "pipefail", "-c", command]

    async def shell(self, command: str) -> str:
        """Run a documented command line to its end, and return what it printed."""
        return await run(*self.as_written(command), cwd=self.folder)

    @contextlib.asynccontextmanager
    async def following(self, command: str) -> AsyncIterator[Following]:
        """Run a documented command line that goes on until it is interrupted."""
        process = await asyncio.create_subprocess_exec(
            *self.as_written(f"exec {command}"),
            cwd=self.folder,
            env=environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        following = Following(process)
        try:
            yield following
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            await following.end()

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────

    @property
    def base_url(self) -> str:
        """What OpenAI's clients take."""
        return f"http://127.0.0.1:{self.gateway_port}/v1"

    async def healthy(self) -> bool:
        """Return whether both services say that they are well."""
        try:
            for port in (self.orchestrator_port, self.gateway_port):
                if (await asyncio.to_thread(_get, f"http://127.0.0.1:{port}/health")).get("status") != "ok":
                    return False
        except (OSError, ValueError):
            return False
        return True

    async def ask(self, model: str, tokens: int = 2) -> str:
        """Ask a model through the gateway; returns which model the engine says it is."""
        async with openai.AsyncOpenAI(base_url=self.base_url, api_key="none", max_retries=0) as client:
            answer = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=tokens
            )
        return answer.model

    async def status(self) -> dict[str, Any]:
        """Return the orchestrator's status."""
        return await asyncio.to_thread(_get, f"http://127.0.0.1:{self.orchestrator_port}/status")

    async def swap(self, model: str) -> dict[str, Any]:
        """Make a model current."""
        url = f"http://127.0.0.1:{self.orchestrator_port}/ensure_model"
        return await asyncio.to_thread(_get, url, {"model": model})

    async def managed_containers(self) -> list[str]:
        """Return the ids of the containers that our orchestrator made."""
        if not self.managed:
            return []
        found = await docker("ps", "--all", "--quiet", "--no-trunc", "--filter", "label=io.modelswap.model")
        return found.split()

    async def engine_containers(self) -> dict[str, str]:
        """Return the engines' containers: id by model's name."""
        if self.managed:
            made = [await inspect(container) for container in await self.managed_containers()]
            return {document["Config"]["Labels"]["io.modelswap.model"]: document["Id"] for document in made}
        lines = await self.compose("--profile", "models", "ps", "--all", "--format", "json")
        found = [json.loads(line) for line in lines.splitlines()]
        return {
            each["Service"].removesuffix("-llm"): (await inspect(each["ID"]))["Id"]
            for each in found
            if each["Service"] in ENGINES
        }

    async def running_engines(self) -> set[str]:
        """Return the models whose containers run."""
        found = await self.engine_containers()
        return {model for model, container in found.items() if (await inspect(container))["State"]["Running"]}


class Following:
    """A command that goes on, and the lines it has printed so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.text = ""
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while chunk := await self._process.stdout.read(65536):
            self.text += chunk.decode(errors="replace")

    async def shows(self, *words: str) -> None:
        """Wait until one line has all ``words``."""

        def found() -> bool:
            return any(all(word in line for word in words) for line in self.text.splitlines())

        await until(found, f"{words} in:\n{self.text}")

    async def end(self) -> None:
        """Wait for its end."""
        async with asyncio.timeout(DEADLINE):
            await self._process.wait()
            await self._reading


async def inspect(container: str) -> dict[str, Any]:
    """Return what Docker knows of a container."""
    document: dict[str, Any] = json.loads(await docker("container", "inspect", container))[0]
    return document


def _get(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})  # noqa: S310 - http
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            found = json.load(error)
    return found
