"""An orchestrator in this process over simulated engines in processes of their own that can sleep."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil

from modelswap.core import effects, events
from modelswap.devices.simulated import SimulatedDevice
from modelswap.engines.registry import engine_for
from modelswap.orchestrator.hosting import Hosted
from modelswap.orchestrator.measurements import COLD
from modelswap.orchestrator.service import Parts, Service, running
from modelswap.protocol.errors import Code
from modelswap.runtimes.process import ProcessRuntime
from modelswap.spec.config import Config
from modelswap.testing.ledger import Ledger

GIB: Final = 1 << 30
CAPACITY: Final = 8 * GIB
HELD: Final = 6 * GIB
SIM: Final = Path(__file__).with_name("sim_vllm.py")
DEADLINE: Final = 60.0


def sleepable(folder: Path, *options: str, **settings: Any) -> dict[str, Any]:
    """Return the config of a model that a simulated vLLM serves, which takes three quarters of the device."""
    weights = folder / "weights"
    weights.mkdir(exist_ok=True)
    device = [f"--gpu-ledger={folder / 'gpu.json'}", f"--gpu-bytes={HELD}"]
    return {
        "engine": "vllm",
        "model": str(weights),
        "program": [sys.executable, str(SIM)],
        "args": ["--gpu-memory-utilization", "0.75", *device, *options],
        "sleep": "on",
        "standby": False,
        **settings,
    }


class Rig:
    """One orchestrator, as its tests see it."""

    def __init__(self, folder: Path, service: Service, ledger: Ledger, http: aiohttp.ClientSession) -> None:
        self.folder = folder
        self.service = service
        self.ledger = ledger
        self.http = http

    @property
    def measured(self) -> Any:
        """What was measured."""
        return self.service.outside.measurements

    def definition(self, model: str) -> str:
        """Return a model's definition."""
        return self.service.configured.definitions[model]

    def hosted(self, model: str) -> Hosted:
        """Return the model's instance."""
        return next(one for one in self.service.outside.hosted.values() if one.model == model)

    def state(self, model: str) -> str:
        """Return the state of the model's instance."""
        return next(str(view.state) for view in self.service.shell.snapshot().models if view.name == model)

    def sleep_level(self, model: str) -> int:
        """Return at which level a model is to sleep, as the scheduler knows it; 0: it is to be stopped."""
        return next(view.sleep_level for view in self.service.shell.snapshot().models if view.name == model)

    async def ensure(self, model: str) -> effects.Answer:
        """Make a model resident as an operator does; fails the test if that is refused."""
        number, future = self.service.answers.expect()
        self.service.post(events.Ensure(at=time.monotonic(), request=number, model=model))
        async with asyncio.timeout(DEADLINE):
            answer = await future
        assert answer.code is None or answer.code in Code, answer
        return answer

    async def until(self, true: Callable[[], bool | Awaitable[bool]], what: str) -> None:
        """Wait until a condition holds; fails the test if it doesn't in time."""
        deadline = time.monotonic() + DEADLINE
        while True:
            answer = true()
            if answer if isinstance(answer, bool) else await answer:
                return
            assert time.monotonic() < deadline, f"not within {DEADLINE} s: {what}"
            await asyncio.sleep(0.01)

    async def fault(self, model: str, **behaviour: Any) -> None:
        """Tell a model's engine what to do wrong from now on."""
        address = self.hosted(model).address
        assert address is not None
        async with self.http.post(f"{address.url}/sim/fault", json=behaviour) as answer:
            assert answer.status == 200, await answer.text()

    def knows(self, model: str, level: int = 1) -> None:
        """Have it known that a model starts slowly and answers as it does, and sleep at ``level`` wanted."""
        definition = self.definition(model)
        for _ in range(2):
            self.measured.answered(model, definition, (f"model={model}", " quick", " brown", " fox"))
            self.measured.took(model, definition, COLD, 30.0)
        if level:
            self.service.chooser.forced[model] = level
        self.service.chooser.tell()

    def level(self, model: str, level: int) -> bool | None:
        """Return what is known of one sleep level: good, off, or not yet tried."""
        found: bool | None = self.measured.of(model, self.definition(model), f"sleep{level}").ok
        return found

    def assert_sound(self) -> None:
        """Assert that the device was never over-committed, and that nothing of ours failed."""
        account = self.ledger.read()
        assert account.overlaps == 0, account.history
        assert account.peak <= CAPACITY
        assert self.service.shell.failures == 0 and self.service.tasks.failures == 0


@contextlib.asynccontextmanager
async def rig(
    folder: Path, models: dict[str, Any] | None = None, *, anew: bool = True, sweep: bool = True, **sections: Any
) -> AsyncIterator[Rig]:
    """Run an orchestrator over models ``a`` and ``b`` (by default); no process is left in the end.

    With ``sweep`` False they are left to the next one, which is not to begin ``anew``.
    """
    ledger = Ledger.create(folder / "gpu.json", CAPACITY) if anew else Ledger(folder / "gpu.json")
    config = Config.model_validate(
        {
            "models": models or {name: sleepable(folder) for name in "ab"},
            "orchestrator": {"state_dir": str(folder / "state")},
            "scheduling": {"linger": 0.0, "min_residency": 0.0},
            "device": {
                "kind": "simulated",
                "ledger": str(folder / "gpu.json"),
                "release_timeout": 5.0,
                **sections.pop("device", {}),
            },
            **sections,
        },
        strict=False,
    )
    state = folder / "state"
    state.mkdir(exist_ok=True)
    runtime = ProcessRuntime(state, 1 << 20)
    parts = Parts(
        runtime=runtime,
        device=SimulatedDevice(ledger.path),
        engine_for=engine_for,
        load=lambda _path: config,
        token="token",
        database=state / "modelswap.db",
    )
    try:
        async with running(folder / "modelswap.yaml", config, parts) as service, aiohttp.ClientSession() as http:
            # The sleepers' memory is only simulated: what this machine has to spare is of no concern.
            service.outside.memory.available = lambda: 8 * CAPACITY
            service.outside.memory.total = 8 * CAPACITY
            made = Rig(folder, service, ledger, http)
            await made.until(lambda: service.reading is not None, "the device is read")
            yield made
    finally:
        if sweep:
            await runtime.sweep(set())
            assert not engines(folder)


def engines(folder: Path) -> list[psutil.Process]:
    """Return the engines that are alive."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        ours = f"--gpu-ledger={folder / 'gpu.json'}" in (process.info["cmdline"] or [])
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found
