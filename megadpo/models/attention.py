"""Core attention behind an AttentionPlan: the kernels that Megatron's attention layers call.

Legend: T rows of the packed stream, A query heads and G key/value heads of this rank, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from megadpo.attention_plan import AttentionPlan, Segment


@dataclass
class PlanParams(PackedSeqParams):
    """Megatron's packed-sequence argument, carrying the plan to the core attention.

    `qkv_format` stays 'sbhd': Megatron then leaves the tensors as [T, 1, heads, dim] and rotates row by row, which is
    what restarting positions need; 'thd' would restart at every segment on its own.
    """

    plan: AttentionPlan | None = None

    @classmethod
    def of(cls, plan: AttentionPlan) -> PlanParams:
        """The argument that carries `plan`."""
        return cls(qkv_format="sbhd", plan=plan)


class SegmentAttention(torch.nn.Module):
    """Scaled-dot-product attention, one call per segment of the plan: no T×T mask, runs on every device."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,  # context-parallel arguments that Megatron passes to every core attention
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: torch.Tensor | None,
        packed_seq_params: PlanParams,
    ) -> torch.Tensor:
        """Attention output [T, 1, A·D] of query [T, 1, A, D] and key, value [T, 1, G, D] under the plan.

        The mask arguments belong to Megatron's interface; who attends to whom is the plan's word alone.
        """
        plan = packed_seq_params.plan
        if attention_bias is not None:
            raise ValueError("attention biases are not supported")
        if plan is None or plan.num_tokens != query.shape[0]:
            raise ValueError(f"attention over {query.shape[0]} rows needs a plan for as many, got {plan}")
        # [T, 1, heads, D] → [1, heads, T, D], the layout of SDPA
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        outputs = [self._segment(query, key, value, segment) for segment in plan.segments]
        out_1ATD = torch.cat(outputs, dim=2)
        return out_1ATD.permute(2, 0, 1, 3).flatten(start_dim=2)

    def _segment(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segment: Segment) -> torch.Tensor:
        """Attention output [1, A, rows, D] of one segment's queries."""
        q = query[:, :, segment.start : segment.stop]
        if len(segment.key_ranges) == 1:
            start, stop = segment.key_ranges[0]
            k, v = key[:, :, start:stop], value[:, :, start:stop]
        else:
            k = torch.cat([key[:, :, start:stop] for start, stop in segment.key_ranges], dim=2)
            v = torch.cat([value[:, :, start:stop] for start, stop in segment.key_ranges], dim=2)
        square = q.shape[2] == k.shape[2]
        return scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if square else causal_lower_right(q.shape[2], k.shape[2]),
            is_causal=square,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
