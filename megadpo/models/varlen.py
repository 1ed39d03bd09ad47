"""torch's variable-length flash attention behind an AttentionPlan: all segments of a stream in one kernel call.

The kernel takes queries and keys as sequences laid end to end, each with its own two lengths, and aligns causality at
the bottom right if they differ. So a segment is one sequence: its rows are the queries, its key ranges the keys, the
last of which ends with it.

Legend: T rows of the stream, A query heads and G key/value heads of this rank, D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from megadpo.models.attention_plan import AttentionPlan
from megadpo.models.sdpa import Attend
from megadpo.models.segments import Segments
from megadpo.runtime.device import Device

_MAX_HEAD_DIM = 256


def why_not_varlen(device: Device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason why the kernel can't be used for such a model on `device`, as a clause; None if it can."""
    if device.kind != "cuda":
        return "needs a CUDA device"
    if find_spec("torch.nn.attention.varlen") is None:
        return f"needs torch 2.10 or newer, this is {torch.__version__}"
    # On ROCm torch calls another kernel, whose alignment of unequal lengths has not been checked.
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return f"needs a build of torch for CUDA with flash attention, {torch.__version__} is another"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bf16 or fp16, the model is in {str(dtype).removeprefix('torch.')}"
    if head_dim > _MAX_HEAD_DIM or head_dim % 8:
        return f"needs a head dimension that is a multiple of 8 up to {_MAX_HEAD_DIM}, the model's is {head_dim}"
    capability = device.compute_capability()
    shown = ".".join(map(str, capability))
    if capability < (8, 0):
        return f"needs compute capability 8.0 or newer, the device has {shown}"
    # These GPUs have too little shared memory for the backward of such head dimensions.
    if 192 < head_dim <= 224 and ((8, 6) <= capability <= (8, 9) or capability[0] == 12):
        return f"has no backward for head dimension {head_dim} on compute capability {shown}"
    return None


def varlen_attend(plan: AttentionPlan, torch_device: torch.device) -> Attend:
    """Prepares attention under the plan once per microbatch; no layer waits for the device.

    The forward is deterministic; the kernel's backward is only under torch.use_deterministic_algorithms(True).
    """
    from torch.nn.attention.varlen import varlen_attn

    kernel: Callable[..., Any] = varlen_attn
    options = _causal_options(kernel)
    segments = Segments.of(plan)
    starts_q, starts_k = segments.query_starts(torch_device), segments.key_starts(torch_device)
    longest_q, longest_k = max(segments.query_lengths), max(segments.key_lengths)

    def attend(q_TAD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, scale: float | None) -> torch.Tensor:
        keys, values = segments.gathered_keys(k_TGD), segments.gathered_keys(v_TGD)
        out_TAD: torch.Tensor = kernel(
            q_TAD, keys, values, starts_q, starts_k, longest_q, longest_k, scale=scale, **options
        )
        return out_TAD

    return attend


def _causal_options(kernel: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that make torch's kernel causal and let it take fewer key heads than query heads.

    torch 2.10 takes `is_causal`, 2.11 takes `window_size`; 2.12 also needs an argument for fewer key heads.
    """
    known = inspect.signature(kernel).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    return {**options, "enable_gqa": True} if "enable_gqa" in known else options
