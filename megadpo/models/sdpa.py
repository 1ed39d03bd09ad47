"""The attention kernel for any device: torch's scaled-dot-product attention, one call per segment.

Legend: T rows of the stream, A query heads and G key/value heads of this rank, D head dimension;
Q rows of one segment, L rows of its keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch.nn.functional import scaled_dot_product_attention

from megadpo.models.attention_plan import AttentionPlan
from megadpo.models.segments import Segments

# Maps query [T, A, D], key and value [T, G, D] and the softmax scale (None: 1/√D) to the output [T, A, D].
Attend: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]
# Maps a microbatch's plan to the Attend function of all its layers.
PrepareAttention: TypeAlias = Callable[[AttentionPlan, torch.device], Attend]


def sdpa_attend(plan: AttentionPlan, torch_device: torch.device, dtype: torch.dtype) -> Attend:
    """Prepares attention under the plan once per microbatch: every layer uses the same masks.

    A segment whose keys are its queries is causal and needs no mask. The others get one that is aligned at the bottom
    right; torch's own mask for that alignment would be created, and saved for the backward, by every layer.
    """
    segments = Segments.of(plan)
    lengths = list(zip(segments.query_lengths, segments.key_lengths, strict=True))
    masks = [None if q == k else _bottom_right_mask(q, k, torch_device, dtype) for q, k in lengths]

    def attend(q_TAD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, scale: float | None) -> torch.Tensor:
        # Split, not sliced: the gradient of a slice is a tensor of the whole stream's size.
        queries = q_TAD.split(segments.query_lengths)
        keys, values = segments.keys(k_TGD), segments.keys(v_TGD)
        outputs = [_attend_segment(*states, scale) for states in zip(queries, keys, values, masks, strict=True)]
        return torch.cat(outputs)

    return attend


def _bottom_right_mask(queries: int, keys: int, torch_device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """0 where a query sees a key, else minus infinity: the last query sees all keys, each before it one key less."""
    mask_QL = torch.full((queries, keys), float("-inf"), dtype=dtype, device=torch_device)
    return mask_QL.triu_(keys - queries + 1)


def _attend_segment(
    q_QAD: torch.Tensor, k_LGD: torch.Tensor, v_LGD: torch.Tensor, mask_QL: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """Returns the attention output [Q, A, D] of one segment, causal if there is no mask."""
    q, k, v = (states.transpose(0, 1)[None] for states in (q_QAD, k_LGD, v_LGD))
    if q.is_meta:
        # On meta tensors torch would take a kernel that saves all scores; this is the one that it takes on CPU.
        output_1AQD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask_QL is None, attn_mask=mask_QL, scale=scale
        )[0]
        return output_1AQD[0].transpose(0, 1)
    output_1AQD = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask_QL,
        is_causal=mask_QL is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output_1AQD[0].transpose(0, 1)
