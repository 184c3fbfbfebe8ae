"""What would make starts quicker, told once for all models that it holds for; never of what the user has chosen.

Options as in vLLM 0.32 (`engine/arg_utils.py`, `config/load.py`, `envs.py`, `v1/worker/gpu_worker.py`,
`model_executor/model_loader/weight_utils.py`) and in SGLang's list of server arguments:

- vLLM captures a CUDA graph for each batch size and kind. ``-O0`` (or ``--enforce-eager``) compiles nothing either.
- It measures at each start what is left for the KV cache. ``--kv-cache-memory-bytes`` and a plan remembered with
  ``VLLM_ENABLE_STARTUP_PLAN=1`` skip that.
- It reads safetensors through ``mmap`` in one thread for each GPU. Other formats need packages that are extras.
- It reads ahead by itself (``--safetensors-load-strategy prefetch``) on NFS and Lustre only.
- SIGTERM lets requests finish for ``--shutdown-timeout`` seconds, then workers end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import psutil

from modelswap.cli.doctor import mechanisms, reading
from modelswap.cli.doctor.finding import Finding, note
from modelswap.cli.doctor.mechanisms import MAKE_IT_OURS, SAY_SLEEP, Verdict
from modelswap.cli.doctor.scene import in_thread
from modelswap.cli.doctor.subjects import Kept, Subject, Subjects
from modelswap.cli.words import duration, size
from modelswap.engines import options
from modelswap.engines.registry import engine_for
from modelswap.orchestrator.measurements import waking

_GRAPHS: Final = (
    *("--enforce-eager", "-cc", "--compilation-config", "--cudagraph-capture-sizes", "--max-cudagraph-capture-size"),
    *("-O", "--optimization-level"),
)
_SGLANG_GRAPHS: Final = ("--disable-cuda-graph", "--cuda-graph-max-bs", "--cuda-graph-bs", "--cuda-graph-config")
_KV: Final = "--kv-cache-memory"
_PLAN: Final = "VLLM_ENABLE_STARTUP_PLAN"
_LARGE: Final = 4 << 30
"""Smaller weights are read in a moment, whatever reads them."""
_NETWORK: Final = ("cifs", "smb3", "9p", "ceph", "glusterfs", "beegfs", "gpfs", "fuse", "virtiofs")
"""File systems that answer slowly, and that vLLM doesn't know as such."""
_MORE_MEMORY: Final = "quantised models, a faster disk or more memory help; so do fewer sleepers (device.host_memory)"
_SPARE_GRACE: Final = 5.0
_GAIN: Final = "with which vLLM took a fifth of the time (docs/benchmarks.md)"
_USUAL: Final = {
    "vllm": "vLLM came in after 26 s cold and 5.7 s from a standby",
    "llamacpp": "llama.cpp after 0.24 s",
    "openvino": "OpenVINO after 1.1 s",
}
"""The medians of docs/benchmarks.md."""


async def of(subjects: Subjects) -> list[Finding]:
    """Return all hints."""
    found = [*fixed(subjects.models), *could_sleep(subjects)]
    if subjects.readable:  # what follows is about GPUs
        starting = [each for each in subjects.models if not each.sleep.used and not each.cpu]
        found += [*graphs(starting), *cache_size(starting), *load_format(starting)]
    disks = [(disk.mountpoint, disk.fstype) for disk in await in_thread(lambda: psutil.disk_partitions(all=True))]
    found += await in_thread(lambda: list(prefetch(subjects.models, disks)))  # a network disk may not answer
    found += short_grace(subjects.models)
    if overflows(subjects):
        largest = max(_places(subjects.models), key=lambda kept: kept.size)
        place = largest.place
        rate = None if place is None else await in_thread(lambda: reading.speed(place))
        found.append(page_cache(subjects, rate))
    return found + list(unmeasured(subjects.models))


def fixed(subjects: Sequence[Subject]) -> Iterator[Finding]:
    """Tell what it costs that somebody else's containers have a fixed command, and what would help."""
    groups: dict[tuple[str, ...], list[Subject]] = {}
    for each in subjects:
        if each.model.runtime == "adopted" and not each.sleep.used:
            ways = (each.sleep, each.standby)
            helps = tuple(way.help for way in ways if way.verdict is Verdict.MISSED and way.common)
            if helps:
                groups.setdefault(helps, []).append(each)
    for helps, group in groups.items():
        costs = ", ".join(f"{each.name}{f' ({duration(each.cold)})' if each.cold else ''}" for each in group)
        told = [f"to let it sleep: {way}" for way in helps if way != MAKE_IT_OURS]
        told += [f"for a standby, {_GAIN}: {way}" for way in helps if way == MAKE_IT_OURS]
        yield note(f"a fixed command costs a whole cold start at each swap: {costs}", "\n".join(told))


def could_sleep(subjects: Subjects) -> Iterator[Finding]:
    """Tell which of our own models could sleep, and what that takes."""
    told = []
    for each in subjects.models:
        if each.sleep.help != SAY_SLEEP or each.cpu:
            continue
        needed = mechanisms.pinned(each.size)
        if needed is None or needed <= subjects.room:
            told.append(f"{each.name} ({size(needed)})" if needed else each.name)
        elif 2 in mechanisms.levels_if_willing(each.model):
            told.append(f"{each.name} (level 2: its weights are read again)")
    if told:
        message = f"these could sleep instead of being stopped: {', '.join(told)}"
        remedy = (
            f"{SAY_SLEEP}; in brackets the host memory that each then takes (1.5 times its weights, and 2 GiB), of"
            f" {size(max(subjects.room, 0))} that may be spent"
        )
        yield note(message, remedy)


def graphs(subjects: Iterable[Subject]) -> Iterator[Finding]:
    """Tell which starts capture all the CUDA graphs that there are by default."""
    vllm, sglang = [], []
    for each in subjects:
        if each.model.engine == "vllm" and not _said(each, *_GRAPHS):
            vllm.append(each.name)
        elif each.model.engine == "sglang" and not _said(each, *_SGLANG_GRAPHS):
            sglang.append(each.name)
    message = "each start captures CUDA graphs for many batch sizes: "
    if vllm:
        remedy = (
            "fewer: --max-cudagraph-capture-size 64, or -cc.cudagraph_mode=PIECEWISE (or NONE); --enforce-eager, which"
            " compiles nothing either, starts soonest and answers slowest"
        )
        yield note(message + ", ".join(vllm), remedy)
    if sglang:
        remedy = (
            "fewer: --cuda-graph-max-bs 16 (newer versions: --cuda-graph-max-bs-decode); none: --disable-cuda-graph"
        )
        yield note(message + ", ".join(sglang), remedy)


def cache_size(subjects: Iterable[Subject]) -> Iterator[Finding]:
    """Tell which starts measure how large the KV cache may be."""
    names = [
        each.name for each in subjects if each.model.engine == "vllm" and not _said(each, _KV) and _PLAN not in each.env
    ]
    if names:
        remedy = (
            f"{_PLAN}=1 in env has vLLM (0.32) remember it in its cache; or --kv-cache-memory-bytes with what its log"
            " advises to fit into the requested memory"
        )
        yield note(f"each start measures how large the KV cache can be: {', '.join(names)}", remedy)


def load_format(subjects: Iterable[Subject]) -> Iterator[Finding]:
    """Tell which large weights are read by one thread."""
    told = [
        f"{each.name} ({size(each.size)})"
        for each in subjects
        if each.model.engine == "vllm" and (each.size or 0) >= _LARGE and not _gguf(each)
        if not _said(each, "--load-format", "--model-loader-extra-config")
    ]
    if told:
        remedy = (
            "--load-format runai_streamer or fastsafetensors reads with several, if the engine's image or environment"
            " has the package (vllm[runai], vllm[fastsafetensors])"
        )
        yield note(f"one thread for each GPU reads the weights: {', '.join(told)}", remedy)


def prefetch(subjects: Iterable[Subject], disks: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """Tell which weights lie on a network disk that vLLM takes for a local one; ``disks`` are (mount point, kind)."""
    for engine, option in (
        ("vllm", "--safetensors-load-strategy prefetch"),
        ("sglang", "--weight-loader-prefetch-checkpoints"),
    ):
        told = []
        for each in subjects:
            kinds = {kind for kept in each.weights if kept.place and (kind := _network(kept.place, disks))}
            ahead = _said(each, option.partition(" ")[0], "--load-format")
            if each.model.engine == engine and kinds and not ahead and not _gguf(each):
                told.append(f"{each.name} ({', '.join(sorted(kinds))})")
        if told:
            message = f"weights lie on a network disk, where small reads are slow: {', '.join(told)}"
            yield note(message, f"{option} in args has them read ahead in large ones")


def short_grace(subjects: Iterable[Subject]) -> Iterator[Finding]:
    """Tell whose time to finish requests is longer than the time until it is killed."""
    for each in subjects:
        told = options.whole(options.value(each.args, "--shutdown-timeout")) if each.model.engine == "vllm" else None
        grace = engine_for(each.model.engine).stop_grace(each.model)
        if told is not None and grace < told + _SPARE_GRACE:
            message = f"{each.name}: it may take {told} s to finish requests (--shutdown-timeout), and is killed after"
            remedy = f"say models.{each.name}.stop_grace: {told + _SPARE_GRACE:g}"
            yield note(f"{message} {grace:g} s", remedy)


def overflows(subjects: Subjects) -> bool:
    """Return whether the host's memory can't keep all weights that are here between two turns."""
    return sum(kept.size for kept in _places(subjects.models)) > subjects.total


def page_cache(subjects: Subjects, rate: float | None) -> Finding:
    """Tell what it costs that weights are read from disk again; ``rate`` in bytes a second, None if not measured."""
    places = _places(subjects.models)
    whole, largest = sum(kept.size for kept in places), max(kept.size for kept in places)
    message = (
        f"the weights here ({size(whole)}) don't fit in host memory ({size(subjects.total)}), so that swaps read them"
        f" from disk: up to {size(largest)}"
    )
    if rate:
        return note(f"{message}, {duration(largest / rate)} at {size(int(rate))}/s as measured now", _MORE_MEMORY)
    return note(f"{message} ({duration(largest / 5e8)} at 500 MB/s, {duration(largest / 5e9)} at 5 GB/s)", _MORE_MEMORY)


def unmeasured(subjects: Sequence[Subject]) -> Iterator[Finding]:
    """Tell what isn't measured, with figures of another machine to compare."""
    without = [
        each
        for each in subjects
        if each.cold is None or (each.sleep.used and each.seconds(*map(waking, each.sleep.levels)) is None)
    ]
    if without:
        engines = {each.model.engine for each in without}
        usual = ", ".join(text for engine, text in _USUAL.items() if engine in engines)
        message = f"not measured yet: {', '.join(each.name for each in without)}"
        if usual:
            message += f"; usual with a 135M model on two cores (docs/benchmarks.md): {usual}"
        yield note(message, "modelswap calibrate measures it, and swaps do in passing")


def _said(subject: Subject, *names: str) -> bool:
    """Return whether its arguments have one of the options, also as ``-cc.key=…``, ``-O2`` or an abbreviation."""
    return any(word.replace("_", "-").startswith(names) for word in subject.args)


def _gguf(subject: Subject) -> bool:
    return ".gguf" in (subject.model.model or "") or any(".gguf" in word for word in subject.args)


def _places(subjects: Iterable[Subject]) -> list[Kept]:
    """Return what lies here, each once."""
    return list({kept.place: kept for each in subjects for kept in each.weights if kept.place is not None}.values())


def _network(place: Path, disks: Sequence[tuple[str, str]]) -> str | None:
    around = [(mount, kind) for mount, kind in disks if place.resolve().is_relative_to(mount)]
    kind = max(around, key=lambda disk: len(disk[0]), default=("", ""))[1]
    return kind if kind.startswith(_NETWORK) and kind not in ("fuseblk", "fuse.lxcfs") else None
