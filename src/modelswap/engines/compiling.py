"""Where engines keep what they compile at a first start, which may take minutes.

Read in vLLM 0.32 (`envs.py`, `utils/deep_gemm.py`, `compilation/compiler_interface.py`), Triton 3.9 (`knobs.py`),
PyTorch 2.13 (`_inductor/runtime/cache_dir_utils.py`), FlashInfer (`jit/env.py`), SGLang (`srt/environ.py`) and NVIDIA's
CUDA programming guide (environment variables):

- vLLM's graphs, its choices of kernels and DeepGEMM's code are below ``VLLM_CACHE_ROOT``, by default ``vllm`` in
  ``$XDG_CACHE_HOME`` or ``~/.cache``.
- SGLang's are in ``SGLANG_CACHE_DIR``; some have a variable of their own as well, or had before there was that one.
- Triton appends ``.triton/cache`` to ``$TRITON_HOME``, FlashInfer ``.cache/flashinfer`` to its workspace's base.
- Inductor's default is below the temporary folder, with the user's name in it.

Engines may share one such folder, also at the same time: names are digests of what went in (code, versions, device,
model), and files are renamed into place when they are complete, or written under a lock.
"""

from __future__ import annotations

from typing import Final

import msgspec


class Cache(msgspec.Struct, frozen=True):
    """One cache of compiled code.

    ``variable`` tells the engine its folder; ``folder`` is what we call that below a common one, empty for the common
    one itself. ``usual`` is where its content lies for root if neither ``variable`` nor one of ``also`` says otherwise.
    """

    variable: str
    folder: str
    usual: str
    also: tuple[str, ...] = ()


PYTORCH: Final = (
    Cache("TRITON_CACHE_DIR", "triton", "/root/.triton/cache", ("TRITON_HOME",)),
    Cache("TORCHINDUCTOR_CACHE_DIR", "inductor", "/tmp/torchinductor_root"),  # noqa: S108 - in a container of its own
    Cache("FLASHINFER_WORKSPACE_BASE", "", "/root/.cache/flashinfer"),
    Cache("CUDA_CACHE_PATH", "cuda", "/root/.nv/ComputeCache"),
)
"""Of what engines on PyTorch have in common."""
VLLM: Final = (Cache("VLLM_CACHE_ROOT", "vllm", "/root/.cache/vllm", ("XDG_CACHE_HOME",)), *PYTORCH)
SGLANG: Final = (
    Cache("SGLANG_CACHE_DIR", "sglang", "/root/.cache/sglang"),
    Cache("SGLANG_JIT_CACHE_DIR", "sglang/jit", "/root/.cache/sglang/jit", ("SGLANG_CACHE_DIR",)),
    Cache("SGLANG_DG_CACHE_DIR", "sglang/deep_gemm", "/root/.cache/deep_gemm", ("SGLANG_CACHE_DIR",)),
    Cache("TVM_FFI_CACHE_DIR", "tvm-ffi", "/root/.cache/tvm-ffi"),
    *PYTORCH,
)
