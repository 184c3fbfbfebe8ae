"""What `bench.gpu` has PyTorch do in the engines' Python: look, make weights, copy, and hold memory until killed.

Usage: python -m bench.gpu_probe check | make FOLDER BYTES SEED | bandwidth BYTES | hold NAME, each with
[--device cuda|cpu] [--ledger FILE]. What was found is the last line, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch

from bench.gpu_memory import Account
from bench.gpu_weights import make

COPIES: Final = 9
HOLD_LIMIT: Final = 120
"""Seconds after which a child ends by itself, if whoever was to kill it is gone."""


def check(said: argparse.Namespace) -> dict[str, Any]:
    """Return PyTorch's version, and why it can't use the device (empty if it can)."""
    problem = ""
    try:
        if said.device == "cpu":
            Account(said.device, said.ledger, "check")
        else:
            torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError, ImportError) as error:
        problem = str(error).partition("\n")[0]
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "problem": problem}


def bandwidth(said: argparse.Namespace) -> dict[str, float]:
    """Return bytes a second, medians: pinned and pageable, to the device and from it."""
    found, cuda = {}, said.device != "cpu"
    there = torch.empty(said.size, dtype=torch.uint8, device=said.device)
    for kind in ("pinned", "pageable"):
        # Filled, since pages that nobody has touched are not there yet.
        here = torch.ones(said.size, dtype=torch.uint8, pin_memory=cuda and kind == "pinned")
        for way, source, target in (("in", here, there), ("out", there, here)):
            taken = []
            for _ in range(COPIES):
                _settle(cuda)
                began = time.perf_counter()
                target.copy_(source, non_blocking=True)
                _settle(cuda)
                taken.append(time.perf_counter() - began)
            found[f"{kind}_{way}"] = said.size / statistics.median(taken)
    return found


def hold(said: argparse.Namespace) -> int:
    """For each number of bytes on standard input, have a child hold so many, and say its PID once it does.

    A child is forked before anything touches CUDA, so that it needs none of the seconds that PyTorch's import takes.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            _child(said, int(line))
            return 0
    return 0


def _child(said: argparse.Namespace, size: int) -> None:
    signal.alarm(HOLD_LIMIT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as engines end: the interpreter lets go of all it has
    try:
        Account(said.device, said.ledger, said.name).hold(size)
        held = torch.empty(size, dtype=torch.uint8, device=said.device)
        if said.device != "cpu":
            held.zero_()
            torch.cuda.synchronize()
    except (RuntimeError, MemoryError) as error:
        print(f"failed: {error}".partition("\n")[0], flush=True)
        return
    print(os.getpid(), flush=True)
    while True:
        signal.pause()


def _settle(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def main() -> int:
    """Do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    one = {name: actions.add_parser(name) for name in ("check", "make", "bandwidth", "hold")}
    one["make"].add_argument("folder", type=Path)
    one["make"].add_argument("size", type=int)
    one["make"].add_argument("seed", type=int)
    one["bandwidth"].add_argument("size", type=int)
    one["hold"].add_argument("name")
    for action in one.values():
        action.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        action.add_argument("--ledger")
    said = parser.parse_args()
    match said.action:
        case "check":
            print(json.dumps(check(said)))
        case "make":
            print(json.dumps(make(said.folder, said.size, said.seed, said.device)))
        case "bandwidth":
            print(json.dumps(bandwidth(said)))
        case _:
            return hold(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
