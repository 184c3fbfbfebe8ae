"""Connections between gateways and the orchestrator: messages arrive in order, or not at all once it is closed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from modelswap.protocol.messages import GatewayMessage, OrchestratorMessage
from modelswap.simulator.tasks import Task
from modelswap.simulator.traffic import Request


@dataclass(slots=True, eq=False)
class Link:
    """One connection of one gateway, with what is on its way in both directions and since when."""

    gateway: str
    id: int
    up: deque[tuple[float, GatewayMessage]] = field(default_factory=deque)
    down: deque[tuple[float, OrchestratorMessage]] = field(default_factory=deque)
    lost_at: float | None = None
    """When it was closed, if the orchestrator hasn't noticed yet."""


class Observer(Protocol):
    """A driver that makes things happen later must hear when they begin."""

    def said(self, link: Link, *, up: bool) -> None:
        """Hear that a message is on its way."""
        ...

    def began(self, task: Task) -> None:
        """Hear that the orchestrator's shell has begun a task."""
        ...

    def sent(self, request: Request) -> None:
        """Hear that a request runs on an engine."""
        ...

    def ended(self, request: Request) -> None:
        """Hear that a request has its outcome."""
        ...


class Nobody:
    """An observer for drivers that look at the world instead."""

    def said(self, link: Link, *, up: bool) -> None:
        """See `Observer.said`."""

    def began(self, task: Task) -> None:
        """See `Observer.began`."""

    def sent(self, request: Request) -> None:
        """See `Observer.sent`."""

    def ended(self, request: Request) -> None:
        """See `Observer.ended`."""
