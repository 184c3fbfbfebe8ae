"""What a GPU does in a swap: bandwidth, how soon freed memory is free, and swaps of several GB of real weights.

Two test engines built on PyTorch (`bench/gpu_engine.py`) behave as vLLM does toward a real ``modelswap up``: requests
go through its gateway, it drains, puts out, verifies the release by NVML, brings in and compares answers. Measured are
stop and cold start, and sleep at both levels; modelswap chooses, among what the engines of that part can do.

Writes a section with the hardware's name into docs/benchmarks.md (``--into``), replacing an earlier one of the same
hardware. It does so after each part, so that what was measured stays if the time is over. ``--device cpu --gib 0.25``
rehearses it all on a simulated device, and only prints.

Usage: python -m bench.gpu [--python PYTHON] [--gib 8] [--rounds 8] [--limit 400] [--device cuda|cpu]; this Python needs
modelswap, PYTHON only PyTorch (default: MODELSWAP_TORCH_PYTHON, else this one or python3, if it has that).
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import psutil

from bench.gpu_device import Device, Gpu, Rehearsal
from bench.gpu_layout import FILE
from bench.gpu_release import Run, kills, sleeps
from bench.gpu_report import COLD, GIB, LATER, Found, Machine, Release, kinds, put_into, render, same_answers
from bench.gpu_stack import OVERTIME, Failed, Stack, asleep, engines, turns
from modelswap.cli.weights import default_cache
from modelswap.devices.errors import DeviceUnavailable

ROOT: Final = Path(__file__).resolve().parent.parent
SHARE: Final = 0.9
"""The part of the device that an engine fills, as vLLM does by default."""
MODELS: Final = ("ada", "grace")
COPY: Final = 1 << 30
"""Bytes that are copied to measure bandwidth, at most."""
RELEASE_ROUNDS: Final = 8
COLD_ROUNDS: Final = 5
"""Cold starts take seconds each; more of them would leave no time for the rest."""
KILLS_END: Final = 0.3
SLEEPS_END: Final = 0.4
"""The parts of all time after which no more rounds of these begin."""
SWAPS_END: Final = {1: 0.65, 0: 0.8, 2: 1.0}
"""The same for swaps, by sleep level (0: none), what matters most first."""
SPARE_DISK: Final = 1 << 30


class Bench:
    """One run: what it was told, where it measures, what it found."""

    def __init__(self, said: argparse.Namespace, folder: Path) -> None:
        self.said = said
        self.size = int(said.gib * GIB)
        self._folder = folder
        self._limit = float(said.limit)
        self._end = time.monotonic() + self._limit
        self.device: Device = Gpu(said.index) if said.device == "cuda" else Rehearsal(folder, self.size)
        self.run = Run(said.python or _python(), ROOT, self.device, folder / "log")
        checked = _checked(self.run, said.device)
        self._roomy()
        machine = Machine(
            name=self.device.name,
            driver=self.device.driver,
            torch=checked["torch"],
            date=dt.datetime.now(dt.UTC).date().isoformat(),
            cores=len(os.sched_getaffinity(0)),
            gpu_bytes=self.device.total,
            host_bytes=psutil.virtual_memory().total,
        )
        say(f"{machine.name}, driver {machine.driver}; torch {machine.torch} in {self.run.python}")
        self._folders = self._made()
        weights = (self._folders[MODELS[0]] / FILE).stat().st_size
        self.found = Found(machine=machine, weights=weights, share=SHARE)

    def measure(self) -> None:
        """Measure everything, one part after the other; what can't be is noted, and the next part goes on."""
        self._part("bandwidth", 1.0, self._bandwidth)
        self._part("release after a process's end", KILLS_END, self._kills)
        self._part("release by a sleeper", SLEEPS_END, self._sleeps)
        for level, part in SWAPS_END.items():
            name = f"swaps by sleep level {level}" if level else "swaps by stop and cold start"
            self._part(name, part, functools.partial(self._swaps, level))

    def _part(self, name: str, part: float, work: Callable[[Callable[[], float]], None]) -> None:
        def left() -> float:
            return self._end - time.monotonic() - self._limit * (1 - part)

        say(f"{name} …")
        try:
            if left() <= 0:
                raise Failed("the time is over")
            work(left)
        except Failed as failed:
            say(f"not measured: {failed}")
            self.found.missing.append(name)
        self._write()

    def _bandwidth(self, _left: Callable[[], float]) -> None:
        self.found.bandwidth = self.run.probe("bandwidth", str(min(COPY, self.size)))
        say("  " + "  ".join(f"{way} {rate / 1e9:.1f} GB/s" for way, rate in self.found.bandwidth.items()))

    def _kills(self, left: Callable[[], float]) -> None:
        sizes = (self.size, int(SHARE * self.device.total))
        self._released(kills(self.run, sizes, RELEASE_ROUNDS, left))

    def _sleeps(self, left: Callable[[], float]) -> None:
        self._released(sleeps(self.run, self._folders[MODELS[0]], SHARE, RELEASE_ROUNDS, left))

    def _released(self, releases: Sequence[Release]) -> None:
        for each in releases:
            say(f"  {each.event}, {each.size / GIB:.2f} GiB: {' '.join(f'{s * 1e3:.1f}' for s in each.seconds)} ms")
        self.found.releases += [each for each in releases if each.seconds]

    def _swaps(self, level: int, left: Callable[[], float]) -> None:
        models = engines(self._folders, self.run.python, self.device, root=ROOT, share=SHARE, level=level)
        rounds = self.said.rounds if level else min(self.said.rounds, COLD_ROUNDS)
        with Stack(self._folder / f"level-{level}", models, self.device) as stack:
            if level == 2:  # level 1 would be tried first, and three times until it is off
                for model in models:
                    stack.calibrate(model, limit=max(left() + OVERTIME, 1.0))
            self.found.swaps[level] = turns(stack, level, rounds, left, say)
            kept = asleep(stack.status(), level) if level else None
        if kept is not None:
            self.found.asleep[level] = kept
        if (LATER if level else COLD) not in kinds(self.found.swaps[level]):
            raise Failed("the time was over before such a swap")

    def _write(self) -> None:
        """Write what there is so far, so that it is there if this is killed."""
        if self.said.device == "cuda":
            page = self.said.into.read_text() if self.said.into.is_file() else ""
            self.said.into.write_text(put_into(page, self.found.machine.name, render(self.found)))

    def _made(self) -> dict[str, Path]:
        """Return the folder of each model's weights, which are made if they aren't there."""
        folders = {name: self.said.weights / f"{name}-{self.size}" for name in MODELS}
        missing = [folder for folder in folders.values() if not (folder / FILE).is_file()]
        self.said.weights.mkdir(parents=True, exist_ok=True)
        if missing and shutil.disk_usage(self.said.weights).free < len(missing) * self.size + SPARE_DISK:
            sys.exit(
                f"{self.said.weights} has too little room for {len(missing)} times {self.said.gib:g} GiB: --weights"
            )
        for seed, folder in enumerate(folders.values()):
            if folder in missing:
                say(f"making {folder} …")
                self.run.probe("make", str(folder), str(self.size), str(seed))
        return folders

    def _roomy(self) -> None:
        if (free := self.device.free()) < SHARE * self.device.total:
            sys.exit(
                f"{self.device.name} has {free / GIB:.1f} GiB free of {self.device.total / GIB:.1f};"
                f" {SHARE:.0%} must be: end what else uses it (nvidia-smi names it)"
            )
        if self.size > SHARE * self.device.total * 2 / 3:
            sys.exit(f"--gib {self.said.gib:g} leaves too little of {self.device.total / GIB:.1f} GiB for a KV cache")


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def _checked(run: Run, device: str) -> dict[str, str]:
    """Return what the engines' Python has; ends with the remedy if that can't use the device."""
    if subprocess.run([run.python, "-c", "import torch"], capture_output=True, check=False).returncode:
        sys.exit(f"{run.python} can't import PyTorch; install it there, or name another Python: --python")
    checked: dict[str, str] = run.probe("check")
    if device == "cuda" and not checked["cuda"]:
        sys.exit(f"PyTorch {checked['torch']} in {run.python} is a build without CUDA; install one with it: --python")
    if checked["problem"]:
        sys.exit(f"PyTorch {checked['torch']} in {run.python} can't be used here: {checked['problem']}")
    return checked


def _python() -> str:
    """Return a Python that has PyTorch, as far as can be told quickly."""
    found = os.environ.get("MODELSWAP_TORCH_PYTHON")
    candidates = [found] if found else [sys.executable, shutil.which("python3") or sys.executable]
    has = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    for python in candidates:
        if subprocess.run([python, "-c", has], capture_output=True, check=False).returncode == 0:
            return python
    sys.exit(f"no PyTorch in {' or '.join(candidates)}; say --python /path/to/python of one that has it, with CUDA")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", help="the engines' Python, which has PyTorch")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse, and only print")
    parser.add_argument("--index", type=int, default=0, help="which GPU, as NVML counts")
    parser.add_argument("--gib", type=float, default=8.0, help="size of each of the two models")
    parser.add_argument("--rounds", type=int, default=8, help="swaps of each kind")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds after which nothing new is begun")
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "benchmarks.md", help="the page for the figures")
    parser.add_argument("--weights", type=Path, default=default_cache() / "bench-gpu", help="where weights are made")
    return parser.parse_args()


def main() -> int:
    """Measure, print, write; status 1 if answers differ or something could not be measured."""
    said = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started is to end, too
    with tempfile.TemporaryDirectory(prefix="modelswap-bench-gpu-") as name:
        try:
            bench = Bench(said, Path(name))
        except (DeviceUnavailable, Failed) as failed:
            sys.exit(f"{failed}\nNothing was measured. --device cpu --gib 0.25 rehearses it without a GPU.")
        bench.measure()
    found = bench.found
    say("\n" + render(found))
    if said.device == "cuda":
        say(f"written into {said.into}; the weights stay in {said.weights}")
    return not same_answers(found) or bool(found.missing)


if __name__ == "__main__":
    sys.exit(main())
