"""FLOPs of pairs from their true lengths, for balancing the ranks' work and for throughput metrics.

A multiply-add counts as two FLOPs; only matrix products count. Attention counts the keys that a query sees, so causal
attention is half a square; the head counts response tokens only; padding and recomputation do not count.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FlopRates:
    """FLOPs of a model's forward pass per token of the stream, per key that a query sees, and per response token."""

    per_token: int
    per_key: int
    per_response_token: int


def flop_rates(
    *,
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    num_attention_heads: int,
    num_query_groups: int,
    head_dim: int,
    vocab_size: int,
) -> FlopRates:
    """FlopRates of a dense decoder with gated feed-forward layers."""
    query, key_value = num_attention_heads * head_dim, num_query_groups * head_dim
    projections = 2 * hidden_size * (query + key_value)  # query and output, key and value
    return FlopRates(
        per_token=2 * num_layers * (projections + 3 * hidden_size * ffn_hidden_size),
        per_key=2 * num_layers * 2 * query,  # scores, and the sum of values
        per_response_token=2 * hidden_size * vocab_size,
    )


def pair_flops(rates: FlopRates, prompt: int, chosen: int, rejected: int, *, share_prompt: bool) -> int:
    """FLOPs of one forward pass over a pair with these lengths; see `data.batch.build_batch` for `share_prompt`."""
    if share_prompt:
        tokens = prompt + chosen + rejected
        keys = _causal(prompt + chosen) + rejected * prompt + _causal(rejected)
    else:
        tokens = 2 * prompt + chosen + rejected
        keys = _causal(prompt + chosen) + _causal(prompt + rejected)
    return rates.per_token * tokens + rates.per_key * keys + rates.per_response_token * (chosen + rejected)


def step_flops(policy_forward: int, reference_forward: int) -> int:
    """FLOPs of a training step from those of its forward passes; the policy's backward costs two more forwards."""
    return 3 * policy_forward + reference_forward


def achieved_flops(flops_per_s: float, *, ranks: int, peak: float | None) -> dict[str, float]:
    """Throughput metrics: the FLOP/s of a rank, and their share of a GPU's `peak` if that is known (MFU)."""
    per_rank = flops_per_s / ranks
    achieved = {"throughput/tflops_per_rank": per_rank / 1e12}
    return achieved if peak is None else {**achieved, "throughput/mfu": per_rank / peak}


def _causal(length: int) -> int:
    """Number of keys that all queries of a causal sequence see together."""
    return length * (length + 1) // 2
