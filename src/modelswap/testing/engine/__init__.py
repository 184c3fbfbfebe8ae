"""A simulated engine: OpenAI's endpoints, SSE at a set rate, a simulated GPU, sleep, and faults on demand.

``python -m modelswap.testing.engine --help`` runs it as a process; `SimEngine` runs it on a test's event loop.
"""

from modelswap.testing.engine.behaviour import USUAL, Behaviour, overlay
from modelswap.testing.engine.options import Options, command
from modelswap.testing.engine.server import SimEngine
from modelswap.testing.engine.stats import Report, Stats

__all__ = ["USUAL", "Behaviour", "Options", "Report", "SimEngine", "Stats", "command", "overlay"]
