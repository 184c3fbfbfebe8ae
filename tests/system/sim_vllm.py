"""A simulated engine behind vLLM's command line: ``python sim_vllm.py --model … --served-model-name … [--fault …]``."""

from __future__ import annotations

import argparse
import asyncio
import sys

import uvloop

from modelswap.testing.engine.__main__ import serve
from modelswap.testing.engine.options import parse


def main() -> int:
    """Serve as a simulated engine with what vLLM's options say and, unchanged, what else there is."""
    reader = argparse.ArgumentParser()
    reader.add_argument("--model")
    reader.add_argument("--served-model-name", nargs="+")
    reader.add_argument("--gpu-memory-utilization")
    reader.add_argument("--enable-sleep-mode", action="store_true")
    said, rest = reader.parse_known_args()
    name, *aliases = said.served_model_name
    argv = [*rest, "--model", name, *(f"--alias={alias}" for alias in aliases)]
    if said.enable_sleep_mode:
        argv.append("--sleepable")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
