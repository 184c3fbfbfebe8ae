"""Any other server that speaks OpenAI's API: the config says how to start it and how to tell that it is ready."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import aiohttp

from modelswap.engines import greedy
from modelswap.engines import http as ask
from modelswap.engines.base import Address, CannotSleep, CannotWake, Diagnosis, Launch, Readiness
from modelswap.engines.diagnosis import cause, explain
from modelswap.engines.programs import folder, placed
from modelswap.protocol.errors import Code, ModelswapError
from modelswap.spec.config import Model

_PORT: Final = 8000
_SLOTS: Final = 4
_STOP_GRACE: Final = 10.0


class Custom:
    """The `Engine` for a command of the user's own; 4 slots by default."""

    kind = "custom"

    def launch(self, name: str, model: Model, address: Address, program: Sequence[str] | None = None) -> Launch:
        """Return ``command`` and ``args`` with ``{host}`` and ``{port}`` replaced, also in the values of ``env``.

        In an image they follow its entrypoint, as compose's ``command`` does.
        """
        if not model.command and not program:
            why = "" if program is None else ": its image has no entrypoint that would start by itself"
            raise ModelswapError(f"models.{name}: engine 'custom' needs a 'command'{why}", code=Code.MODEL_BROKEN)
        argv = tuple(placed(word, address) for word in (*(program or ()), *(model.command or ()), *model.args))
        return Launch(argv, {key: placed(value, address) for key, value in model.env.items()}, folder(model))

    def slots(self, model: Model) -> int:
        """Return ``concurrency``, by default 4."""
        return model.concurrency or _SLOTS

    def standby(self, model: Model, launch: Launch, weights: Path | None = None) -> None:
        """Return None: it has none."""

    def caches(self) -> tuple[()]:
        """Return none: nothing is known of it."""
        return ()

    def port(self) -> int:
        """Return 8000; containers of this engine had better say ``port``."""
        return _PORT

    def upstream_name(self, name: str, model: Model) -> str:
        """Return ``model`` if it is given, else our name; aliases are unknown to the server."""
        return model.model or name

    def stop_grace(self, model: Model) -> float:
        """Return 10 s by default, as Docker does."""
        return _STOP_GRACE if model.stop_grace is None else model.stop_grace

    def device_bytes(self, model: Model, total: int) -> int | None:
        """Return what the config says, if anything."""
        return int(model.memory) if model.memory is not None else None

    async def readiness(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> Readiness:
        """Ask the ``ready`` path; only 200 counts."""
        try:
            status = await ask.status(http, model, address, model.ready)
        except aiohttp.ClientConnectorError:
            return Readiness(ready=False, stage="starting")
        return Readiness(ready=True, stage="ready") if status == 200 else Readiness(ready=False, stage="loading")

    async def running(self, http: aiohttp.ClientSession, model: Model, address: Address) -> int | None:
        """Return None: nothing is known of it."""
        return None

    async def healthy(self, http: aiohttp.ClientSession, model: Model, address: Address) -> bool:
        """Return whether the ``ready`` path answers 200."""
        return await ask.status(http, model, address, model.ready) == 200

    async def canary(self, http: aiohttp.ClientSession, name: str, model: Model, address: Address) -> None:
        """Send what ``canary`` says, by default nothing."""
        await ask.canary(http, self.upstream_name(name, model), model, address, "none")

    def sleep_levels(self, model: Model) -> tuple[int, ...]:
        """Return none: nothing is known of how it would."""
        return ()

    async def sleep(self, http: aiohttp.ClientSession, model: Model, address: Address, level: int) -> None:
        """Refuse."""
        raise CannotSleep(f"engine '{self.kind}' has no sleep")

    async def wake(self, http: aiohttp.ClientSession, model: Model, address: Address, level: int) -> None:
        """Refuse."""
        raise CannotWake(f"engine '{self.kind}' has no sleep")

    async def asleep(self, http: aiohttp.ClientSession, model: Model, address: Address) -> None:
        """Return None: it never sleeps."""

    async def greedy(
        self, http: aiohttp.ClientSession, name: str, model: Model, address: Address, tokens: int
    ) -> tuple[str, ...] | None:
        """Ask as the canary asks, if that is for text."""
        return await greedy.answer(http, self.upstream_name(name, model), model, address, tokens, None)

    def diagnose(self, exit_code: int | None, log: Sequence[str]) -> Diagnosis:
        """Return a usage error as permanent; else the last error line."""
        return explain(_CAUSES if exit_code == 2 else (), exit_code, log)


_CAUSES: Final = (
    cause(r"(?ms)^usage: .*?error: (.+?)$", "it doesn't accept its command line: {0}; mend 'command' or 'args'"),
)
