"""The Protocol that every engine fulfils: facts about one server program, no state of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import aiohttp
import msgspec

from modelswap.engines.compiling import Cache
from modelswap.spec.config import Model


class Address(msgspec.Struct, frozen=True):
    """Where an instance listens; always an IP address, never a name."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The base URL, without a trailing slash."""
        return f"http://{self.host}:{self.port}"


class Launch(msgspec.Struct, frozen=True):
    """How to start an engine: an argument list (never a shell string), environment on top of ours, working folder."""

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str | None = None


class Place(msgspec.Struct, frozen=True):
    """Where an engine is to be started.

    ``address`` is what it must listen at. ``program`` is what the place starts by itself (an image's entrypoint, empty
    if it has none); None: the engine's program is to be found on this machine.
    """

    address: Address
    program: tuple[str, ...] | None = None


class StandbyPlan(msgspec.Struct, frozen=True):
    """How to have an engine's process wait for its model, started and with nothing left to import.

    ``python`` is the command of the interpreter that the engine runs in, ``script`` the one file that waits
    (`modelswap.engines.vllm_standby` tells how it is spoken to), ``hints`` what it may import beyond what all models
    need. Plans with the same ``key`` serve each other's models: it stands for interpreter and environment, and for the
    folder ``cwd`` where that makes a difference. With a ``spec`` it waits in a container like this model's, and ``key``
    stands for all of that, too.
    """

    key: str
    python: tuple[str, ...]
    script: Path
    env: dict[str, str]
    hints: tuple[str, ...] = ()
    spec: Model | None = None
    cwd: str | None = None


class Readiness(msgspec.Struct, frozen=True):
    """What an engine said about itself.

    ``ready`` is True when it serves our model. ``stage`` and ``fraction`` (0..1) describe loading, where it can tell.
    ``slots`` is what it runs at once, where it can tell once ready. ``problem`` is why it never will be ready as
    started (it serves another model, say).
    """

    ready: bool
    stage: str = "loading"
    fraction: float | None = None
    slots: int | None = None
    problem: str | None = None


class Diagnosis(msgspec.Struct, frozen=True):
    """Why an engine failed, in words for the user.

    ``permanent``: the same start would fail again. ``blameless``: chance or somebody else failed it, which says nothing
    about the model; another start may well succeed.
    """

    reason: str
    permanent: bool
    blameless: bool = False


class CanaryFailed(Exception):
    """The engine says it is ready, but did not answer the canary; the message says how."""


class CannotSleep(Exception):
    """The engine didn't go to sleep as told; the message says how. Whether it sleeps now is uncertain."""


class CannotWake(Exception):
    """The engine didn't wake as told; the message says how. What it holds now is uncertain."""


class WakeOutOfMemory(CannotWake):
    """There was too little device memory to wake. Once there is more, it may be told to wake again."""


class Engine(Protocol):
    """Facts about one server program.

    All calls over HTTP use the given session (the caller sets no time limit on it), take the instance's ``address``,
    send the model's ``api_key`` if there is one, and let `aiohttp.ClientError` and `TimeoutError` through.
    """

    kind: str

    def launch(self, name: str, model: Model, address: Address, program: Sequence[str] | None = None) -> Launch:
        """Return the command line that serves ``model`` under our ``name`` and its aliases at ``address``.

        It begins with ``program`` if that is given (a container image's entrypoint, which may be empty; paths are the
        container's then), else with a program found on this machine. Raises
        `modelswap.protocol.errors.ModelswapError` when it can't (a program that isn't installed, say).
        """
        ...

    def standby(self, model: Model, launch: Launch, weights: Path | None = None) -> StandbyPlan | None:
        """Return how to keep a process waiting that a start with ``launch`` can use; None if there is no way.

        ``weights`` is the folder that the model is loaded from, as we see it; None if it isn't here, or can't be seen.
        """
        ...

    def caches(self) -> tuple[Cache, ...]:
        """Return where it keeps what it compiles; nothing if it compiles nothing, or nobody knows."""
        ...

    def port(self) -> int:
        """Return the port that containers of this engine listen on if nobody says otherwise."""
        ...

    def slots(self, model: Model) -> int:
        """Return how many requests it runs at once, before it could be asked (`Model.concurrency` goes first)."""
        ...

    def upstream_name(self, name: str, model: Model) -> str | None:
        """Return what the engine calls the model; None if it knows our name and all aliases."""
        ...

    def stop_grace(self, model: Model) -> float:
        """Return the seconds it may take to end after SIGTERM (`Model.stop_grace` goes first)."""
        ...

    def device_bytes(self, model: Model, total: int) -> int | None:
        """Return what must be free on a device of ``total`` bytes before a start; None if the engine can't tell."""
        ...

    async def readiness(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> Readiness:
        """Ask once. A connection that is refused means not ready yet and is not an error."""
        ...

    async def running(self, http: aiohttp.ClientSession, model: Model, address: Address) -> int | None:
        """Return the engine's own count of running and waiting requests; None if it has none."""
        ...

    async def healthy(self, http: aiohttp.ClientSession, model: Model, address: Address) -> bool:
        """Return whether a ready engine still answers its health check with success."""
        ...

    async def canary(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> None:
        """Send the short request that proves it serves; raises `CanaryFailed`."""
        ...

    def sleep_levels(self, model: Model) -> tuple[int, ...]:
        """Return at which levels it can sleep as it is started: 1 keeps its weights in host memory, 2 drops them."""
        ...

    async def sleep(self, http: aiohttp.ClientSession, model: Model, address: Address, level: int) -> None:
        """Have it give up the device; returns once it says that it sleeps. Raises `CannotSleep`.

        It must have nothing to do, and is asked whether that is so. Its memory may be free only later. The caller
        limits the time: a first sleep may take minutes, because host memory is pinned then.
        """
        ...

    async def wake(self, http: aiohttp.ClientSession, model: Model, address: Address, level: int) -> None:
        """Wake it from ``level``; returns once it says that it is awake. Raises `CannotWake`, `WakeOutOfMemory`.

        The caller limits the time. What it then answers may be wrong, and is to be compared (`greedy`).
        """
        ...

    async def asleep(self, http: aiohttp.ClientSession, model: Model, address: Address) -> bool | None:
        """Return whether it sleeps, if only in part; None if it can't tell."""
        ...

    async def greedy(
        self, http: aiohttp.ClientSession, name: str, model: Model, address: Address, tokens: int
    ) -> tuple[str, ...] | None:
        """Return the first ``tokens`` tokens (or fewer) that it answers a fixed prompt with, the likeliest each time.

        None where there is no such thing (an embedder). Raises `CanaryFailed` if it answers with an error.
        """
        ...

    def diagnose(self, exit_code: int | None, log: Sequence[str]) -> Diagnosis:
        """Explain a start that failed from its exit code (negative: signal; None: still running) and last log lines."""
        ...
