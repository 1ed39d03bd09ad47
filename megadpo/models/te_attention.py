"""Transformer Engine's fused attention (cuDNN's) behind an AttentionPlan: all segments of a stream in one kernel call.

As in `varlen.py`, a segment is one sequence with a length of queries and one of keys, causal at the bottom right.

Legend: T rows of the stream, A query heads and G key/value heads of this rank, D head dimension.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from megadpo.models.attention_plan import AttentionPlan
from megadpo.models.backend import why_not_transformer_engine
from megadpo.models.sdpa import Attend
from megadpo.models.segments import Segments
from megadpo.runtime.device import Device

_MASK = "padding_causal_bottom_right"
_MAX_HEAD_DIM = 256


def why_not_te_attention(device: Device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason why the kernel can't be used for such a model on `device`, as a clause; None if it can."""
    problem = why_not_transformer_engine(device, dtype)
    if problem is not None:
        return problem
    from transformer_engine.pytorch import get_cudnn_version

    if head_dim > _MAX_HEAD_DIM or head_dim % 8:
        return f"needs a head dimension that is a multiple of 8 up to {_MAX_HEAD_DIM}, the model's is {head_dim}"
    capability = device.compute_capability()
    if capability[0] not in (9, 10):
        return f"is known for compute capability 9 and 10, the device has {'.'.join(map(str, capability))}"
    cudnn = tuple(get_cudnn_version())
    if cudnn < (9, 7):
        return f"needs cuDNN 9.7 or newer for sequences of any length, this is {'.'.join(map(str, cudnn))}"
    if _deterministic() and capability[0] == 9 and cudnn < (9, 25):
        # Its workspace would be as large as all scores: 256 GiB for an 8B model's stream of 8192 tokens.
        return f"needs cuDNN 9.25 or newer to be deterministic on Hopper, this is {'.'.join(map(str, cudnn))}"
    return None


def _deterministic() -> bool:
    """True if Transformer Engine will choose deterministic kernels, by its own rule."""
    return torch.are_deterministic_algorithms_enabled() or os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0"


def dot_product_attention(*, heads: int, kv_heads: int, head_dim: int) -> Callable[..., torch.Tensor]:
    """Builds Transformer Engine's attention over a rank's heads, for sequences with fewer queries than keys.

    It must not become a submodule of a model, or its state would appear in checkpoints. It gets this rank's heads only
    and knows nothing of tensor parallelism. With attention_type 'self' it would use the queries' lengths for keys too.
    """
    from transformer_engine.pytorch import DotProductAttention

    core: Callable[..., torch.Tensor] = DotProductAttention(
        num_attention_heads=heads,
        kv_channels=head_dim,
        num_gqa_groups=kv_heads,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type=_MASK,
        tp_size=1,
        attention_type="cross",
    )
    return core


def te_attend(plan: AttentionPlan, torch_device: torch.device, core: Callable[..., torch.Tensor]) -> Attend:
    """Prepares attention under the plan by `core` once per microbatch; no layer waits for the device.

    Maximum lengths are passed as numbers, since Transformer Engine would read them back from the device, and rounded up
    to powers of two, since it chooses its kernel anew whenever they change.
    """
    segments = Segments.of(plan)
    lengths: dict[str, Any] = {
        "cu_seqlens_q": segments.query_starts(torch_device),
        "cu_seqlens_kv": segments.key_starts(torch_device),
        "max_seqlen_q": _power_of_two(max(segments.query_lengths)),
        "max_seqlen_kv": _power_of_two(max(segments.key_lengths)),
    }

    def attend(q_TAD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, scale: float | None) -> torch.Tensor:
        if scale is not None:
            raise ValueError(f"Transformer Engine's kernel is built with the scale 1/√D, not {scale}")
        keys, values = segments.gathered_keys(k_TGD), segments.gathered_keys(v_TGD)
        return core(q_TAD, keys, values, qkv_format="thd", attn_mask_type=_MASK, **lengths).view_as(q_TAD)

    return attend


def _power_of_two(length: int) -> int:
    return max(64, 1 << (length - 1).bit_length())
