"""Which `Engine` serves which ``engine:`` of the config file."""

from __future__ import annotations

import functools
from typing import Final

from modelswap.engines.base import Engine
from modelswap.engines.custom import Custom
from modelswap.engines.llamacpp import LlamaCpp
from modelswap.engines.sglang import SGLang
from modelswap.engines.vllm import Vllm
from modelswap.spec.config import EngineName

FROM_HUB: Final[tuple[EngineName, ...]] = ("vllm", "sglang")
"""Those that load from the Hugging Face hub what we download, split models over GPUs, and take a share of a GPU."""


@functools.cache
def engine_for(kind: EngineName) -> Engine:
    """Return the engine called ``kind``; always the same one, since engines have no state."""
    match kind:
        case "vllm":
            return Vllm()
        case "llamacpp":
            return LlamaCpp()
        case "sglang":
            return SGLang()
        case "custom":
            return Custom()
        case "openvino":
            # Only who uses the embedded engine pays for its imports.
            from modelswap.engines.openvino import OpenVino

            return OpenVino()
