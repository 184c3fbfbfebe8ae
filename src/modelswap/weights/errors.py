"""Why weights can't be had, each with its remedy."""

from __future__ import annotations

from modelswap.protocol.errors import Code, ModelswapError


class WeightsUnavailable(ModelswapError):
    """The weights could not be had. With `Code.MODEL_BROKEN` where trying again is of no use."""

    code = Code.MODEL_START_FAILED


class NotFound(WeightsUnavailable):
    """The hub has no such repository, revision or weights, or shows it to others only."""

    code = Code.MODEL_BROKEN


class Gated(WeightsUnavailable):
    """The repository's licence has to be accepted first."""

    code = Code.MODEL_BROKEN


class Unauthorized(WeightsUnavailable):
    """The hub doesn't accept the token, or the token may not read the repository."""

    code = Code.MODEL_BROKEN


class Unreachable(WeightsUnavailable):
    """The hub can't be reached now, or doesn't answer as it should."""


class Offline(WeightsUnavailable):
    """The weights are not here, and the environment forbids to ask the hub."""

    code = Code.MODEL_BROKEN


class NotWritable(WeightsUnavailable):
    """The cache folder may not be written."""

    code = Code.MODEL_BROKEN


class Interrupted(WeightsUnavailable):
    """The download ended before it was complete; what came is kept."""


class DiskFull(WeightsUnavailable):
    """There is no room for the weights.

    ``folder`` is the cache; ``needed`` bytes were still to come when ``free`` bytes were left.
    """

    def __init__(self, message: str, *, folder: str, needed: int, free: int) -> None:
        super().__init__(message)
        self.folder = folder
        self.needed = needed
        self.free = free
