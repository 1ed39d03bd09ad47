"""Attention over sequences laid end to end, each with its own lengths of queries and keys."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch

_MASK = "padding_causal_bottom_right"


class DotProductAttention(torch.nn.Module):
    """Only what it is used for here: 'thd', causal at the bottom right, by the fused kernel."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
    ) -> None:
        super().__init__()
        assert (qkv_format, attn_mask_type, attention_type) == ("thd", _MASK, "cross")
        assert attention_dropout == 0.0 and not sequence_parallel and tp_size == 1
        assert window_size is tp_group is cp_group is None
        self.heads, self.kv_heads, self.head_dim = num_attention_heads, num_gqa_groups, kv_channels
        self.scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        num_splits: int | None = 1,
    ) -> torch.Tensor:
        """[T, A·D]; NaN in rows that no sequence covers."""
        enabled = [name for name in ("FLASH", "FUSED", "UNFUSED") if os.environ.get(f"NVTE_{name}_ATTN", "1") == "1"]
        assert enabled == ["FUSED"], f"another kernel could have been taken: {enabled}"
        assert (qkv_format, attn_mask_type) == ("thd", _MASK)
        # Padded starts would be read back from the device, and so would longest lengths that are not given.
        assert attention_mask is cu_seqlens_q_padded is cu_seqlens_kv_padded is None
        for starts, longest, rows in (
            (cu_seqlens_q, max_seqlen_q, query_layer),
            (cu_seqlens_kv, max_seqlen_kv, key_layer),
        ):
            assert starts.dtype is torch.int32 and type(longest) is int
            assert longest >= starts.diff().max() and starts[-1] == len(rows)
        assert cu_seqlens_q.shape == cu_seqlens_kv.shape
        assert query_layer.shape[1:] == (self.heads, self.head_dim)
        assert key_layer.shape[1:] == value_layer.shape[1:] == (self.kv_heads, self.head_dim)
        spans = (starts.unfold(0, 2, 1).tolist() for starts in (cu_seqlens_q, cu_seqlens_kv))
        outputs = [
            self._one(query_layer[q0:q1], key_layer[k0:k1], value_layer[k0:k1])
            for (q0, q1), (k0, k1) in zip(*spans, strict=True)
        ]
        covered = torch.cat(outputs).flatten(1)
        rest = covered.new_full((len(query_layer) - len(covered), covered.shape[1]), math.nan)
        return torch.cat([covered, rest])

    def _one(self, q_QAD: torch.Tensor, k_LGD: torch.Tensor, v_LGD: torch.Tensor) -> torch.Tensor:
        repeats = self.heads // self.kv_heads
        q_AQD = q_QAD.transpose(0, 1)
        k_ALD, v_ALD = (t.transpose(0, 1).repeat_interleave(repeats, 0) for t in (k_LGD, v_LGD))
        scores_AQL = q_AQD @ k_ALD.transpose(1, 2) * self.scale
        hidden_QL = torch.ones(scores_AQL.shape[1:]).triu(len(k_LGD) - len(q_QAD) + 1).bool()
        return (scores_AQL.masked_fill(hidden_QL, -math.inf).softmax(-1) @ v_ALD).transpose(0, 1)
