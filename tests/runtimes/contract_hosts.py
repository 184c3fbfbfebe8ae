"""What the contract of `Runtime` is tested on: each runtime with a way to start stand-in engines on it."""

from __future__ import annotations

from typing import Protocol

import pytest

from modelswap.engines.base import Launch
from modelswap.runtimes.base import Exit, Running, Runtime, StartFailed
from tests.runtimes.conftest import Host
from tests.runtimes.docker_host import PYTHON, DockerHost


class ContractHost(Protocol):
    """Starts stand-in engines of one model on one runtime."""

    side_by_side: bool
    """Several instances of a model can run at once, and an old one's log stays when a different one is started."""

    @property
    def runtime(self) -> Runtime:
        """The runtime under test."""
        ...

    async def start(self, behaviour: str, argument: object = None) -> Running:
        """Start a stand-in engine; its argument is its port if not told otherwise."""
        ...

    async def says(self, running: Running, word: str) -> list[str]:
        """Return the log's words after ``word``, once the engine has said it."""
        ...

    async def renew(self) -> Runtime:
        """Open another runtime on the same state, as a new orchestrator would."""
        ...

    async def explains(self, program: str) -> str:
        """Return what is said when a program that isn't there is started."""
        ...


class OnProcesses:
    """Engines are processes."""

    side_by_side = True

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def runtime(self) -> Runtime:
        """See `ContractHost`."""
        return self._host.runtime

    async def start(self, behaviour: str, argument: object = None) -> Running:
        """See `ContractHost`."""
        return await self._host.start(behaviour, argument)

    async def says(self, running: Running, word: str) -> list[str]:
        """See `ContractHost`."""
        return await self._host.says(running, word)

    async def renew(self) -> Runtime:
        """See `ContractHost`."""
        return self._host.renew()

    async def explains(self, program: str) -> str:
        """See `ContractHost`: at once."""
        order = self._host.order(Launch((program,), {}), await self._host.allocate())
        with pytest.raises(StartFailed) as failed:
            await self.runtime.start(order)
        return str(failed.value)


class OnDocker:
    """Engines run in a container that is made for their model."""

    side_by_side = False

    def __init__(self, host: DockerHost) -> None:
        self._host = host

    @property
    def runtime(self) -> Runtime:
        """See `ContractHost`."""
        return self._host.runtime

    async def start(self, behaviour: str, argument: object = None) -> Running:
        """See `ContractHost`."""
        place = await self._host.runtime.allocate(self._host.models[self._host.model].spec)
        argument = place.address.port if argument is None else argument
        launch = Launch((*PYTHON, behaviour, str(argument)), {})
        return await self._host.runtime.start(self._host.order(launch, place.address))

    async def says(self, running: Running, word: str) -> list[str]:
        """See `ContractHost`."""
        return await self._host.says(running, word)

    async def renew(self) -> Runtime:
        """See `ContractHost`."""
        return await self._host.open()

    async def explains(self, program: str) -> str:
        """See `ContractHost`: in the log, since it is the container's init that doesn't find it."""
        place = await self._host.runtime.allocate(self._host.models[self._host.model].spec)
        running = await self._host.runtime.start(self._host.order(Launch((program,), {}), place.address))
        assert await self._host.runtime.wait(running) == Exit(127)
        return "\n".join(await self._host.runtime.log_tail(running.model, 10, running.instance))
