"""Fused linear + vocab-parallel log-probabilities: the logits never exist in full.

Legend: N response rows, H hidden size, V vocabulary slice of this tensor-parallel rank, C rows of one chunk.

Each rank multiplies a chunk of rows with its slice of the head, keeps the rows' local maximum, sum of exponentials and
target logit in fp32, and drops the chunk's logits. Two small all-reduces combine the slices. The backward computes the
chunk's logits again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# Upper bound on one chunk's fp32 logits (in bf16 a copy of half the size stands beside them).
_CHUNK_BYTES = 64 * 2**20


def response_log_probs(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    group: dist.ProcessGroup,
    vocab_start: int,
    vocab_size: int,
) -> torch.Tensor:
    """log p(target) of each row as fp32 [N], differentiable in `hidden_NH` and `weight_VH`.

    `weight_VH` is the rank's rows [vocab_start, vocab_start + V) of the head; rows from `vocab_size` on are padding and
    get no probability. `hidden_NH` is replicated over `group`; its gradient is the rank's own contribution, which
    the caller sums over the group (a reduce-scatter or an all-reduce, whichever made it replicated). Targets lie in
    [0, vocab_size): the data are checked for it. Collectives in the forward: one max and one sum all-reduce of [N] and
    [2, N] over `group`. None in the backward.
    """
    result: torch.Tensor = _ResponseLogProbs.apply(hidden_NH, weight_VH, targets_N, group, vocab_start, vocab_size)
    return result


def _chunks(num_rows: int, vocab: int) -> list[slice]:
    """Row slices whose fp32 logits stay within the chunk's memory budget; every rank of a group gets the same ones."""
    rows = max(1, _CHUNK_BYTES // (4 * vocab))
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def _chunk_logits(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, real_columns: int) -> torch.Tensor:
    """fp32 logits [C, V] of one chunk, padding columns at minus infinity."""
    logits_CV = torch.nn.functional.linear(hidden_CH, weight_VH).float()
    logits_CV[:, real_columns:] = float("-inf")
    return logits_CV


class _ResponseLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_N: torch.Tensor,
        group: dist.ProcessGroup,
        vocab_start: int,
        vocab_size: int,
    ) -> torch.Tensor:
        num_rows, local_vocab = hidden_NH.shape[0], weight_VH.shape[0]
        real_columns = min(max(vocab_size - vocab_start, 0), local_vocab)
        local_targets_N = targets_N - vocab_start
        is_local_N = (local_targets_N >= 0) & (local_targets_N < real_columns)
        local_targets_N = torch.where(is_local_N, local_targets_N, 0)

        max_N = hidden_NH.new_empty(num_rows, dtype=torch.float32)
        sums_2N = hidden_NH.new_empty(2, num_rows, dtype=torch.float32)  # Σ exp(logit − max), target logit
        for rows in _chunks(num_rows, local_vocab):
            logits_CV = _chunk_logits(hidden_NH[rows], weight_VH, real_columns)
            # A slice that is all padding has no maximum; the floor keeps exp(−inf − max) at zero instead of NaN.
            max_N[rows] = logits_CV.amax(dim=-1).clamp_(min=torch.finfo(torch.float32).min)
            target_C = logits_CV.gather(1, local_targets_N[rows, None]).squeeze(1)
            sums_2N[1, rows] = torch.where(is_local_N[rows], target_C, 0.0)
            sums_2N[0, rows] = logits_CV.sub_(max_N[rows, None]).exp_().sum(dim=-1)
        if group.size() > 1 and num_rows > 0:
            local_max_N = max_N.clone()
            dist.all_reduce(max_N, op=dist.ReduceOp.MAX, group=group)
            sums_2N[0] *= (local_max_N - max_N).exp_()
            dist.all_reduce(sums_2N, group=group)
        log_normaliser_N = max_N + sums_2N[0].log()

        ctx.save_for_backward(hidden_NH, weight_VH, local_targets_N, is_local_N, log_normaliser_N)
        ctx.real_columns = real_columns
        return sums_2N[1] - log_normaliser_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_N,) = grad_outputs
        hidden_NH, weight_VH, local_targets_N, is_local_N, log_normaliser_N = ctx.saved_tensors
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for rows in _chunks(hidden_NH.shape[0], weight_VH.shape[0]):
            logits_CV = _chunk_logits(hidden_NH[rows], weight_VH, ctx.real_columns)
            # d log p(target) / d logit = [target] − softmax
            grad_CV = logits_CV.sub_(log_normaliser_N[rows, None]).exp_().mul_(-grad_N[rows, None])
            own_C = torch.where(is_local_N[rows], grad_N[rows], 0.0)
            grad_CV.scatter_add_(1, local_targets_N[rows, None], own_C[:, None])
            grad_hidden_NH[rows] = grad_CV.to(weight_VH.dtype) @ weight_VH
            grad_weight_VH += (grad_CV.to(hidden_NH.dtype).T @ hidden_NH[rows]).float()
        return grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None


def sequence_sums(logps_N: torch.Tensor, sequence_index_N: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Per-sequence sums of token log-probs as fp64 [num_sequences]; fp32 would lose 1e-3 at sums of −8 000."""
    sums = torch.zeros(num_sequences, dtype=torch.float64, device=logps_N.device)
    return sums.index_add(0, sequence_index_N, logps_N.double())
