"""Starts a stand-in engine and is killed at once: ``python starter.py STATE_DIR INSTANCE ENGINE_SCRIPT BEHAVIOUR``."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from modelswap.engines.base import Launch
from modelswap.runtimes.base import StartOrder
from modelswap.runtimes.process import ProcessRuntime
from modelswap.spec.config import Model


async def main(state_dir: str, instance: str, script: str, behaviour: str) -> None:
    """Start it and die as hard as can be."""
    runtime = ProcessRuntime(Path(state_dir), 64 * 1024)
    spec = Model(engine="custom", command=["stand-in"])
    address = (await runtime.allocate(spec)).address
    launch = Launch((sys.executable, "-S", "-E", script, behaviour, str(address.port)), {})
    await runtime.start(
        StartOrder(
            instance=instance, model="some/model", definition="digest", spec=spec, launch=launch, address=address
        )
    )
    os.kill(os.getpid(), signal.SIGKILL)


asyncio.run(main(*sys.argv[1:]))
