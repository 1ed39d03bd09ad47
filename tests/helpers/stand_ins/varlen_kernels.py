"""Stand-ins for torch's variable-length attention kernel: its meaning written plainly, under each version's signature.

Strict where the kernel would read or leave garbage. Legend: T query rows, K key rows, A and G heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def _attention(
    q_TAD: torch.Tensor,
    k_KGD: torch.Tensor,
    v_KGD: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    scale: float | None,
    *,
    causal: bool,
) -> torch.Tensor:
    """Attention of each sequence on its own, aligned at the bottom right when causal; NaN in rows of no sequence."""
    for starts, longest in ((starts_q, longest_q), (starts_k, longest_k)):
        assert starts.dtype is torch.int32
        assert type(longest) is int
        assert longest == starts.diff().max()
    assert starts_k[-1] == len(k_KGD) == len(v_KGD)
    outputs = []
    for (q0, q1), (k0, k1) in zip(*(starts.unfold(0, 2, 1).tolist() for starts in (starts_q, starts_k)), strict=True):
        repeats = q_TAD.shape[1] // k_KGD.shape[1]
        q_AQD = q_TAD[q0:q1].transpose(0, 1)
        k_ALD, v_ALD = (t[k0:k1].transpose(0, 1).repeat_interleave(repeats, 0) for t in (k_KGD, v_KGD))
        scores_AQL = q_AQD @ k_ALD.transpose(1, 2) * (scale or q_TAD.shape[2] ** -0.5)
        if causal:
            hidden_QL = torch.ones(q1 - q0, k1 - k0).triu(k1 - k0 - (q1 - q0) + 1).bool()
            scores_AQL = scores_AQL.masked_fill(hidden_QL, -math.inf)
        outputs.append((scores_AQL.softmax(-1) @ v_ALD).transpose(0, 1))
    covered = torch.cat(outputs)
    return torch.cat([covered, covered.new_full((len(q_TAD) - len(covered), *covered.shape[1:]), math.nan)])


def torch_2_10(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
    scale: float | None = None,
) -> torch.Tensor:
    return _attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, causal=is_causal)


def torch_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    causal = window_size == (-1, 0)
    return _attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, causal=causal)


def torch_2_12(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    assert enable_gqa or query.shape[1] == key.shape[1]
    return torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


KERNELS: dict[str, Callable[..., torch.Tensor]] = {"2.10": torch_2_10, "2.11": torch_2_11, "2.12": torch_2_12}
