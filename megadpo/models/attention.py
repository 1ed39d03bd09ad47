"""Core attention of every layer: rotates queries and keys, then calls the microbatch's kernel.

Legend: T rows of the packed stream, A query heads and G key/value heads of this rank, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megadpo.models.rotary import RotaryTable, rotate
from megadpo.models.sdpa import Attend


@dataclass(kw_only=True)
class MicrobatchAttention(PackedSeqParams):
    """The microbatch's kernel and rotary angles, passed to the layers as Megatron's packed-sequence argument.

    `qkv_format` stays 'sbhd', with which Megatron leaves the tensors as [T, 1, heads, D]. `attend` is prepared for the
    plan of a stream of `num_tokens` rows.
    """

    qkv_format: str = "sbhd"
    num_tokens: int
    attend: Attend
    rotary: RotaryTable


class PlanAttention(torch.nn.Module):
    """Core attention that follows the microbatch's MicrobatchAttention: its plan, rotary table and kernel.

    Megatron gets no rotary table, so that it rotates nothing itself.
    """

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
        packed_seq_params: MicrobatchAttention,
    ) -> torch.Tensor:
        """Returns the attention output [T, 1, A·D] of query [T, 1, A, D] and key, value [T, 1, G, D].

        The mask arguments belong to Megatron's interface and are ignored; the plan alone decides which keys are seen.
        """
        microbatch = packed_seq_params
        if attention_bias is not None:
            raise ValueError("attention biases are not supported")
        if microbatch.num_tokens != query.shape[0]:
            raise ValueError(f"attention over {query.shape[0]} rows has a plan for {microbatch.num_tokens}")
        query, key = rotate(query, microbatch.rotary), rotate(key, microbatch.rotary)
        out_TAD = microbatch.attend(query.squeeze(1), key.squeeze(1), value.squeeze(1), self.softmax_scale)
        return out_TAD.flatten(start_dim=1)[:, None]
